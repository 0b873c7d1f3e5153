"""Some owners of `benchmarks.load`, in a process of their own: real machines over real TLS.

    python -m benchmarks.load.owners PLACE WORKER TOKENS ROUNDS LANES NAME...

An owner here has the protocol's machine, a link and a certificate of its own, and sends what was
encrypted before (`made.Recording`), so that the processor is the worker's. It asks for every matrix
in turn, `ROUNDS` times in each lane, and compares each answer with the one it got alone, bit for
bit. Prints "ready" when all have been welcomed, begins when a line comes on its standard input, and
prints one JSON object an owner as it ends: `processor_s` is its process's, `rounds_s` are the
seconds of its rounds, one lane after the other.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import Encrypted, OwnerCipher
from backends.he.store import WorkerPart
from backends.he.wire import Packing
from backends.net.owner import OwnerClient, RemoteLinearError
from backends.net.remote import connected
from backends.net.tls import Tls
from benchmarks.load.made import Recording, load_recordings
from protocol.catalogue import Catalogue


@dataclass(frozen=True)
class Public:
    """What an owner that replays knows of the model: names and sizes."""

    known: Catalogue

    def catalogue(self, packing: Packing | None = None) -> Catalogue:
        """Of the model; a cipher that replays has no packing of its own."""
        return self.known

    def owner_matrices(self) -> list[str]:
        """Their names, for `Replayed`."""
        return [matrix.name for matrix in self.known.matrices]


class Replayed(OwnerCipher):
    """Sends recorded ciphertexts and hands over answers as they came, for whoever compares them.

    It holds no secret that could open one, so nothing private rests on it.
    """

    def __init__(self, names: Sequence[str], recordings: Sequence[Recording]) -> None:
        self._requests = {n: r.request for n, r in zip(names, recordings, strict=True)}
        self._bytes = {n: len(r.answer) for n, r in zip(names, recordings, strict=True)}

    @property
    def simulated_randomness(self) -> bool:
        return False

    def weakness(self, matrices: Sequence[str]) -> str | None:
        return None

    def guard(self, matrix: str, weight: NDArray[np.int8], forward: bool) -> None:
        """Whoever replays compares all of every answer."""

    def up_bytes(self, matrix: str, tokens: int) -> int:
        return len(self._requests[matrix])

    def down_bytes(self, matrix: str, tokens: int) -> int:
        return self._bytes[matrix]

    def encrypt(self, x: Any, matrix: str) -> Encrypted:
        return Encrypted(self._requests[matrix], None)

    def decrypt(self, sealed: Any, payload: Any, matrix: str, worker: str = "") -> Any:
        return np.frombuffer(payload, np.uint8)

    def discard(self, sealed: Any) -> None:
        """There is nothing to wipe."""


class Owner:
    """One owner: its lanes, and what became of their requests."""

    def __init__(
        self, name: str, client: OwnerClient, recordings: Sequence[Recording], tokens: int
    ) -> None:
        self.name, self._client, self._recordings = name, client, recordings
        self._x = np.zeros((tokens, 1), np.float32)
        self._lock = threading.Lock()
        self.right = self.wrong = self.lost = 0
        self.seconds = self.processor_s = 0.0
        self.rounds_s: list[float] = []

    def welcomed(self) -> None:
        """Until the worker has answered a request."""
        self._client.linear(0, self._x)

    def work(self, rounds: int, lanes: int) -> None:
        """Ask for every matrix so often in each lane, and say how it went."""
        start, processor_s = time.perf_counter(), time.process_time()
        threads = [threading.Thread(target=self._lane, args=(rounds,)) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.perf_counter() - start
        self.processor_s = time.process_time() - processor_s
        facts = ("name", "right", "wrong", "lost", "seconds", "processor_s", "rounds_s")
        print(json.dumps({fact: getattr(self, fact) for fact in facts}), flush=True)

    def _lane(self, rounds: int) -> None:
        right = wrong = lost = 0
        took_s = []
        for _ in range(rounds):
            start = time.perf_counter()
            for matrix, recording in enumerate(self._recordings):
                try:
                    answer = self._client.linear(matrix, self._x)
                except RemoteLinearError:
                    lost += 1
                    continue
                same = np.array_equal(answer, recording.answer)
                right, wrong = right + same, wrong + (not same)
            took_s.append(time.perf_counter() - start)
        with self._lock:
            self.rounds_s += took_s
            self.right, self.wrong, self.lost = (
                self.right + right, self.wrong + wrong, self.lost + lost,
            )  # fmt: skip


@contextmanager
def owners_at(place: Path, worker: str, names: Sequence[str], tokens: int) -> Iterator[list[Owner]]:
    """Owners who replay, each with a link and a certificate of its own, welcomed by the worker."""
    public = Public(WorkerPart.open(place / "model").catalogue)
    with ExitStack() as stack:
        owners = []
        for name in names:
            recordings = load_recordings(place / f"{name}.npz")
            cipher = Replayed(public.owner_matrices(), recordings)
            client = stack.enter_context(connected(public, cipher, [worker], Tls(place / name)))
            owners.append(Owner(name, client, recordings, tokens))
        for owner in owners:
            owner.welcomed()
        yield owners


def work_all(owners: Sequence[Owner], rounds: int, lanes: int) -> None:
    """All of them at once, until each has finished."""
    threads = [threading.Thread(target=owner.work, args=(rounds, lanes)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    place, worker, tokens, rounds, lanes, *names = sys.argv[1:]
    with owners_at(Path(place), worker, names, int(tokens)) as owners:
        print("ready", flush=True)
        sys.stdin.readline()
        work_all(owners, int(rounds), int(lanes))


if __name__ == "__main__":
    main()
