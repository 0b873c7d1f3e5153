"""One training under attack: its processes, its line, and what is seen of it from outside.

The books of each life of the owner: `began`, the newest complete checkpoint when it was started;
`kept`, the newest complete one when it was dead; `requests`, how many different ones of it passed
over the line, where that can be read.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scenarios.crashes import disk
from scenarios.crashes.line import HOST, Line, free_port
from scenarios.crashes.wire import Life, Wire
from scenarios.crashes.zygote import Child, Starter, kill, wait

KILLED = -9
STUCK_S = 300.0
"""A training in which nothing is kept for so long, with every process up, will never end."""
_POLL_S = 0.0005
_LIMIT_BYTES = (16_000, 44_000)
"""A file may grow to so much while the disk is "full": logs fit, one of a checkpoint's does not."""


class Failure(Exception):
    """The product broke a promise that has no count of its own; the text says which."""


@dataclass(frozen=True)
class Bench:
    """What all trainings of a campaign share.

    owner  the module whose `main` is the owner's command, and what more it is told
    """

    starter: Starter
    model: Path
    certificates: Path
    logs: Path
    steps: int
    owner: tuple[str, ...] = ("scenarios.crashes.owner",)


@dataclass
class Book:
    """One life of the owner, see above; `adapter` is that of the checkpoint kept."""

    began: int
    life: Life | None
    kept: int = 0
    adapter: NDArray[np.float64] | None = field(default=None, repr=False)
    ended: bool = False


class Training:
    """An owner and a worker over a line that can be cut; all end with the `with`.

    wire  reads the line, where the training is in plain text
    """

    def __init__(self, bench: Bench, place: Path, transport: str, wire: Wire | None) -> None:
        self.place, self.transport = place, transport
        self.books: list[Book] = []
        self._bench, self._wire = bench, wire if transport == "plain" else None
        self._checkpoints = place / "checkpoints"
        self._port = free_port()
        self.line = Line(self._port, self._wire.reader if self._wire else None)
        self._worker: Child | None = None
        self._owner: Child | None = None
        self._seen = (-1, time.monotonic())
        place.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Training:
        self.start_worker()
        self.start_owner()
        return self

    def __exit__(self, *error: object) -> None:
        self.line.close()
        for child in (self._owner, self._worker):
            if child is not None:
                kill(child)

    def _tls(self, side: str) -> list[str]:
        return ["--tls", str(self._bench.certificates / side)] if self.transport == "tls" else []

    def _log(self, name: str) -> Path:
        return self._bench.logs / f"{self.place.name}-{name}.log"

    def start_worker(self) -> None:
        """At the address it had before."""
        self._worker = self._bench.starter.start(
            "scenarios.worker",
            ["--model", str(self._bench.model), "--listen", f"{HOST}:{self._port}",
             *self._tls("worker")],
            self._log("worker"),
        )  # fmt: skip

    def start_owner(self) -> None:
        """With the command that it was started with before."""
        life = self._wire.new_life() if self._wire else None
        self.books.append(Book(disk.newest(self._checkpoints), life))
        self._owner = self._bench.starter.start(
            self._bench.owner[0],
            [*self._bench.owner[1:], "--model", str(self._bench.model), "--out", str(self.place),
             "--steps", str(self._bench.steps), "--worker", f"{HOST}:{self.line.port}",
             *self._tls("owner")],
            self._log(f"owner-{len(self.books)}"),
        )  # fmt: skip

    def running(self) -> bool:
        """Whether the owner still trains. Raises Failure when it gave up, or is stuck."""
        assert self._owner is not None
        status = self._owner.poll()
        if status == 0:
            self._close_book()
            return False
        if status is not None:
            raise Failure(f"{self._who()} ended by itself with status {status}: {self._said()}")
        step, since = self._seen
        now = disk.newest(self._checkpoints)
        if now != step:
            self._seen = now, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            raise Failure(f"{self._who()} has kept no step after {step} for {STUCK_S:.0f} s")
        return True

    def forgive(self) -> None:
        """After a fault: from now on it has all the time it may take."""
        self._seen = (-1, time.monotonic())

    def wait(self, seconds: float) -> bool:
        """Let it train; whether it has not ended by then."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self.running():
                return False
            time.sleep(min(left, 0.02))
        return self.running()

    def wait_for_saving(self, timeout_s: float = 60.0) -> bool:
        """Wait until a checkpoint is begun; whether one was."""
        before, until = disk.being_written(self._checkpoints), time.monotonic() + timeout_s
        while not disk.being_written(self._checkpoints) - before:
            time.sleep(_POLL_S)
            if time.monotonic() > until or not self.running():
                return False
        return True

    def kill_owner(self) -> bool:
        """Whether it died of it, rather than having ended."""
        assert self._owner is not None
        if kill(self._owner) != KILLED:
            self.running()  # done, or it raises
            return False
        self._close_book()
        return True

    def kill_worker(self) -> bool:
        """Whether it died of it. Raises Failure when it had ended by itself."""
        assert self._worker is not None
        status = kill(self._worker)
        if status != KILLED:
            raise Failure(f"the worker ended by itself with status {status}")
        return True

    def fill_disk(self, share: float) -> bool:
        """No file grows any more beyond a few kB: whether the owner ended of it, with a reason.

        Raises Failure when it goes on without keeping what it does, or ends without a word.
        """
        assert self._owner is not None
        least, most = _LIMIT_BYTES
        limit = int(least + share * (most - least))
        if not self.running():
            return False
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self._owner.pid, resource.RLIMIT_FSIZE, (limit, hard))
        status = wait(self._owner, 120.0)
        if status == 0:
            self.running()
            return False
        if status is None:
            raise Failure(f"{self._who()} goes on while no checkpoint can be written")
        self._close_book()
        if "Traceback" in self._said(2000) or not self._said():
            raise Failure(f"{self._who()} did not say in a line that it cannot write a checkpoint")
        return True

    def _close_book(self) -> None:
        """The owner is dead: what it leaves behind is read."""
        self.line.drop()  # what was still on its way never arrives
        book = self.books[-1]
        book.kept = disk.newest(self._checkpoints)
        found = disk.kept(self._checkpoints).get(book.kept)
        book.adapter = None if found is None else disk.adapter_of(found)
        assert self._owner is not None
        book.ended = self._owner.poll() == 0

    def kept(self) -> int:
        """The last step of which a complete checkpoint is there."""
        return disk.newest(self._checkpoints)

    def losses(self) -> list[float]:
        """Of all steps, as the newest checkpoint has them."""
        return disk.losses_of(disk.kept(self._checkpoints)[disk.newest(self._checkpoints)])

    def left_behind(self) -> int:
        """Directories of checkpoints that were never finished, and were not cleared away."""
        return len(disk.being_written(self._checkpoints))

    def accused(self) -> bool:
        """Whether the owner holds its honest worker for a liar."""
        return (self.place / "retired-workers.json").exists()

    def clear_away(self) -> None:
        """Delete the run's directory."""
        shutil.rmtree(self.place)

    def _who(self) -> str:
        return f"{self.place.name}, life {len(self.books)} of the owner"

    def _said(self, most: int = 300) -> str:
        path = self._log(f"owner-{len(self.books)}")
        return path.read_text(errors="replace").strip()[-most:]


def undisturbed(
    bench: Bench, place: Path, transport: str, wire: Wire | None,
    look: Callable[[Path], None] = lambda checkpoints: None,
) -> Training:  # fmt: skip
    """A training that nothing happens to, to its end; `look` is called all the time meanwhile."""
    with Training(bench, place, transport, wire) as training:
        while training.running():
            look(place / "checkpoints")
            time.sleep(0.004)
    return training


def adapters_by_step(
    bench: Bench, place: Path, transport: str, wire: Wire | None
) -> tuple[NDArray[np.float64], list[float], Sequence[Book]]:
    """(float64[steps + 1, P], the losses, its books) of an undisturbed training.

    Its checkpoints are copied as they appear: an owner keeps its newest two only.
    """
    copies = place.with_name(f"{place.name}-copies")
    copies.mkdir(parents=True)

    def look(checkpoints: Path) -> None:
        for found in disk.kept(checkpoints).values():
            target = copies / found.name
            if not target.exists():
                disk.save_copy(found, target)

    training = undisturbed(bench, place, transport, wire, look)
    look(place / "checkpoints")
    found = disk.kept(copies)
    missing = set(range(bench.steps + 1)) - set(found)
    if missing:
        raise Failure(f"an undisturbed training shows no checkpoint of steps {sorted(missing)}")
    adapters = np.stack([disk.adapter_of(found[step]) for step in range(bench.steps + 1)])
    losses = training.losses()
    shutil.rmtree(copies)
    training.clear_away()
    return adapters, losses, training.books
