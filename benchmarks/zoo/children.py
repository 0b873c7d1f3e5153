"""Work in forked children, each with a limit on time and memory, so that none costs the others."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Work: TypeAlias = Callable[[str, Path], Row]
"""(what, an empty directory of its own) -> what was found, as JSON has it."""


@dataclass(frozen=True)
class Limits:
    """Of one child; memory is address space beyond what it is forked with."""

    seconds: float = 90.0
    memory_bytes: int = 4 << 30


@dataclass
class _Child:
    what: str
    place: Path
    process: ForkProcess
    ends: float


def each(names: Sequence[str], work: Work, limits: Limits, at_once: int = 2) -> Iterator[Row]:
    """A row a name, as they end. One without a row says so: {"name", "status": "died", "why"}.

    The caller must not have computed with torch: threads do not survive a fork.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), list[_Child]()
    with tempfile.TemporaryDirectory(prefix="zoo-") as root:
        while waiting or running:
            while waiting and len(running) < at_once:
                what = waiting.pop()
                place = Path(tempfile.mkdtemp(dir=root))
                process = fork.Process(target=_child, args=(what, place, work, limits))
                process.start()
                running.append(_Child(what, place, process, time.monotonic() + limits.seconds))
            time.sleep(0.01)
            for child in list(running):
                late = time.monotonic() > child.ends
                if child.process.is_alive() and not late:
                    continue
                running.remove(child)
                yield _ended(child, late)


def _child(what: str, place: Path, work: Work, limits: Limits) -> None:
    import torch

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    directory = place / "work"
    directory.mkdir()
    (place / "row.json").write_text(json.dumps(work(what, directory)))


def _ended(child: _Child, late: bool) -> Row:
    if late:
        child.process.kill()
    child.process.join()
    try:
        row: Row = json.loads((child.place / "row.json").read_text())
    except (OSError, ValueError):
        why = "took too long" if late else f"ended with status {child.process.exitcode}"
        row = {"status": "died", "why": why}
    shutil.rmtree(child.place)
    return {"name": child.what} | row
