"""Some owners of `benchmarks.load`, in a process of their own: real frames over real links and TLS.

    python -m benchmarks.load.owners PLACE WORKER TOKENS ROUNDS NAME...

An owner here has a link and a certificate of its own, speaks the protocol, and sends what was
encrypted before (`made.Recording`), so that the processor is the worker's. It asks for every matrix
in turn, `ROUNDS` times, one request after the other, and compares each answer with the one it got
alone, bit for bit. Prints "ready" when all have been answered once, begins when a line comes on its
standard input, and prints one JSON object an owner as it ends: `processor_s` is its process's,
`rounds_s` are the seconds of its rounds.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends.he.store import WorkerPart
from backends.net.addresses import address_of
from backends.net.tls import Tls, dial
from benchmarks.load.made import Recording, load_recordings
from protocol.catalogue import Catalogue
from protocol.messages import (
    HEADER_BYTES,
    SESSION_BYTES,
    Hello,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    announced_bytes,
    decode,
    encode,
)

_PATIENCE_S = 60.0


class Owner:
    """One owner, welcomed by the worker, and what became of its requests.

    Raises ConnectionError for a worker that does not take it.
    """

    def __init__(
        self, name: str, link: tuple[Any, Any], catalogue: Catalogue,
        recordings: Sequence[Recording], tokens: int,
    ) -> None:  # fmt: skip
        self.name, self._recordings, self._tokens = name, recordings, tokens
        self._incoming, self._outgoing = link
        self._incoming.settimeout(_PATIENCE_S)
        self._session = secrets.token_bytes(SESSION_BYTES)
        self._requests = 0
        self.right = self.wrong = self.lost = 0
        self.seconds = self.processor_s = 0.0
        self.rounds_s: list[float] = []
        hello = Hello(self._session, catalogue.parameters_digest, catalogue.model_digest)
        self._outgoing.sendall(encode(hello))
        if not isinstance(self._read(), Welcome) or self._answer(0) is None:
            raise ConnectionError(f"the worker does not take {name}")

    def work(self, rounds: int) -> None:
        """Ask for every matrix so often, and say how it went."""
        begin, processor_s = time.perf_counter(), time.process_time()
        for _ in range(rounds):
            start = time.perf_counter()
            for matrix, recording in enumerate(self._recordings):
                self._count(self._answer(matrix), recording)
            self.rounds_s.append(time.perf_counter() - start)
        self.seconds = time.perf_counter() - begin
        self.processor_s = time.process_time() - processor_s
        facts = ("name", "right", "wrong", "lost", "seconds", "processor_s", "rounds_s")
        # In one piece: others of this process may end at the same moment.
        sys.stdout.write(json.dumps({fact: getattr(self, fact) for fact in facts}) + "\n")
        sys.stdout.flush()

    def _count(self, answer: memoryview | None, recording: Recording) -> None:
        if answer is None:
            self.lost += 1
        elif np.array_equal(np.frombuffer(answer, np.uint8), recording.answer):
            self.right += 1
        else:
            self.wrong += 1

    def _answer(self, matrix: int) -> memoryview | None:
        """To the request for a matrix; None when it is refused. BUSY is waited for."""
        self._requests += 1
        payload = self._recordings[matrix].request.data
        frame = encode(Multiply(self._session, self._requests, matrix, self._tokens, payload))
        while True:
            self._outgoing.sendall(frame)
            message = self._read()
            if isinstance(message, Product) and message.request == self._requests:
                return memoryview(message.payload)
            if not isinstance(message, Refuse) or message.reason is not Reason.BUSY:
                return None
            time.sleep(message.after_ms / 1e3)

    def _read(self) -> Message:
        header = self._exactly(HEADER_BYTES)
        return decode(bytes(header) + bytes(self._exactly(announced_bytes(header))))

    def _exactly(self, size: int) -> memoryview:
        place, got = memoryview(bytearray(size)), 0
        while got < size:
            more = self._incoming.recv_into(place[got:])
            if not more:
                raise ConnectionError("the worker has gone")
            got += more
        return place


@contextmanager
def owners_at(place: Path, worker: str, names: Sequence[str], tokens: int) -> Iterator[list[Owner]]:
    """Owners who replay, each with a link and a certificate of its own, welcomed by the worker."""
    catalogue = WorkerPart.open(place / "model", range(0)).catalogue
    with ExitStack() as stack:
        owners = []
        for name in names:
            incoming, outgoing, _ = dial(*address_of(worker), Tls(place / name))
            stack.callback(incoming.close)
            stack.callback(outgoing.close)
            recordings = load_recordings(place / f"{name}.npz")
            owners.append(Owner(name, (incoming, outgoing), catalogue, recordings, tokens))
        yield owners


def work_all(owners: Sequence[Owner], rounds: int) -> None:
    """All of them at once, until each has finished."""
    threads = [threading.Thread(target=owner.work, args=(rounds,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    place, worker, tokens, rounds, *names = sys.argv[1:]
    with owners_at(Path(place), worker, names, int(tokens)) as owners:
        print("ready", flush=True)
        sys.stdin.readline()
        work_all(owners, int(rounds))


if __name__ == "__main__":
    main()
