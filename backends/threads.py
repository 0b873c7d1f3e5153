"""Split a range over the machine's cores, for kernels that release the interpreter lock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def core_count() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, core_count() - 1), thread_name_prefix="kernel")


def run_split(work: Callable[[int, int], object], size: int, grain: int = 1) -> None:
    """Call work(first, last) over disjoint parts of range(size), one part a core, and wait.

    The caller's thread does the last part itself. `grain` is the least size worth a thread.
    An exception in any part is raised here, after all parts have ended.
    """
    parts = max(1, min(core_count(), size // max(1, grain)))
    bounds = [size * i // parts for i in range(parts + 1)]
    others = itertools.pairwise(bounds[:-1])
    futures = [_pool().submit(work, first, last) for first, last in others]
    try:
        work(bounds[-2], bounds[-1])
    finally:
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
