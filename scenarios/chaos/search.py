"""Many seeds on all cores, or one; what was found is data, not an exception."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backends.nn.trainer import TrainingInterrupted
from backends.threads import core_count
from scenarios.chaos.checks import Violation
from scenarios.chaos.log import EventLog
from scenarios.chaos.model import Subject
from scenarios.chaos.options import draw_options
from scenarios.chaos.world import World

_PATIENCE_S = 1.0
_PATH = re.compile(r"'/[^']*'")


@dataclass(frozen=True)
class Result:
    """What came of one seed. `violation` is empty when every promise was kept.

    wraps  results of accepted answers that had wrapped, and those that were repaired, by `thin`
    """

    seed: int
    violation: str
    injected: Counter[str]
    trained_s: float
    bound_s: float
    wraps: Counter[str] = field(default_factory=Counter)


class Bench:
    """Runs seeds one after the other in this process, below a scratch directory.

    scheme  of OpenFHE, in place of the ciphers that are drawn
    """

    def __init__(self, directory: Path, scheme: str | None = None) -> None:
        self._directory, self._scheme = directory, scheme
        self._subjects: dict[str, Subject] = {}
        torch.set_num_threads(1)

    def run(self, seed: int, log: EventLog | None = None) -> Result:
        """One seed, from draws to verdict. Raises only what the user asked for (Ctrl-C)."""
        options = draw_options(seed, self._scheme)
        if options.kind not in self._subjects:
            self._subjects[options.kind] = Subject(options.kind, self._directory / "models")
        with tempfile.TemporaryDirectory(dir=self._directory) as checkpoints:
            world = World(options, self._subjects[options.kind], Path(checkpoints), log)
            violation = ""
            try:
                world.run()
            except TrainingInterrupted as error:
                raise KeyboardInterrupt from error
            except Violation as error:
                violation = str(error)
            except Exception as error:
                # Whatever else comes out of a run is a defect too; tell where it is from.
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno} {place.name}"
                violation = f"{type(error).__name__} at {where}: {_PATH.sub('a file', str(error))}"
        wire = world.wire
        return Result(seed, violation, wire.injected, world.trained_s, world.bound_s, world.wraps)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that is gone afterwards; in memory where the system has such a place."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=place) as name:
        yield Path(name)


def search(
    first: int, count: int, stop_at_first: bool = False, processes: int | None = None,
    scheme: str | None = None,
) -> Generator[Result, None, None]:  # fmt: skip
    """Results of seeds first .. first + count - 1 as they come, from all cores.

    Leaving the loop early ends the processes.
    """
    # Children are started afresh: a fork would copy torch's thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    following = context.Value("q", first)
    results = context.Queue()
    wanted = max(1, min(count, processes or core_count()))
    with scratch() as directory:
        children = [
            context.Process(
                target=_child,
                args=(index, following, first + count, results, directory / str(index), scheme),
                daemon=True,
            )
            for index in range(wanted)
        ]
        for child in children:
            child.start()
        try:
            yield from _collect(children, results, count, stop_at_first)
        finally:
            for child in children:
                child.kill()
                child.join()


def _collect(
    children: list[Any], results: Any, count: int, stop_at_first: bool
) -> Iterator[Result]:
    received = 0
    while received < count:
        try:
            result: Result = results.get(timeout=_PATIENCE_S)
        except queue.Empty:
            dead = [child for child in children if child.exitcode]
            if dead:
                raise RuntimeError(
                    f"a process of the search ended with status {dead[0].exitcode}; its output is "
                    "above. Run again with --processes 1"
                ) from None
            continue
        received += 1
        yield result
        if stop_at_first and result.violation:
            return


def _child(
    index: int, following: Any, end: int, results: Any, directory: Path, scheme: str | None
) -> None:
    # Ctrl-C goes to the parent alone; it ends the children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        # One core a process: the kernels then do not split work this small over threads.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})

    parent = os.getppid()
    finished = threading.Event()

    def work() -> None:
        directory.mkdir()
        bench = Bench(directory, scheme)
        # A parent that was killed cannot end its children; they notice.
        while os.getppid() == parent:
            with following.get_lock():
                seed = following.value
                following.value += 1
            if seed >= end:
                break
            results.put(bench.run(seed))
        finished.set()

    # Not on the main thread: there the trainer listens for Ctrl-C.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if not finished.is_set():
        sys.exit(1)  # the thread has shown its traceback; the parent must not wait for its results
