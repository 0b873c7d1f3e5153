"""Work on the machine's cores, for code that releases the interpreter lock.

`run_split` divides one kernel's range over them; `run_ahead` runs whole jobs in the background.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

T = TypeVar("T")


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


@dataclass(frozen=True)
class Job(Generic[T]):
    """Work for a background thread, and the bytes of memory it holds until it is collected."""

    size_bytes: int
    run: Callable[[], T]


def run_ahead(jobs: Iterable[Job[T]], threads: int, budget_bytes: int) -> Generator[T, None, None]:
    """The results of `jobs` in their order, each computed on one of `threads` threads.

    A job is taken from `jobs` in the caller's thread, as soon as there is room for it: at most
    threads + 1 are begun and not collected, and no more than `budget_bytes` (a larger one goes
    alone). With one thread, jobs run one after the other in order.

    A job's exception is raised in its turn. However this ends, all begun jobs have ended by then,
    those that no thread has taken up are dropped, and `jobs`, if it is a generator, is closed. Who
    may leave early closes this generator too.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    held_bytes = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        for job in jobs:
            while waiting and (
                len(waiting) > threads or held_bytes + job.size_bytes > budget_bytes
            ):
                size_bytes, future = waiting.popleft()
                yield future.result()
                held_bytes -= size_bytes
            waiting.append((job.size_bytes, pool.submit(job.run)))
            held_bytes += job.size_bytes
        for _, future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(jobs, Generator):
            jobs.close()
