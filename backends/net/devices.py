"""What multiplies for a worker, and which of the requests that wait each device takes next.

A worker's matrices lie on one device, or are spread over several, each of which holds some. A
device has a queue of its own, so that none waits for another; what is joined is joined there.

Nothing this module imports can hold a secret; a test walks its imports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from backends.he.interface import AnyPayload, WorkerCipher, WorkerMatrix, carried
from backends.he.store import WorkerPart
from backends.net.counts import Counts
from protocol.catalogue import Catalogue
from protocol.events import MultiplyCiphertext, Task
from protocol.fair import FairQueue, charged
from protocol.messages import Payload
from protocol.worker import WorkerConfig


class DevicesGoneError(Exception):
    """What multiplies is gone for good. The text says why: for whoever runs the worker."""


class Devices(Protocol):
    """The matrices of a catalogue, each on one device.

    count  devices
    each   products that a device may have at once
    here   whether they are computed in this process, so that a small one is soon done
    """

    catalogue: Catalogue
    count: int
    each: int
    here: bool

    def of(self, matrix: int) -> int:
        """The device that holds a matrix."""

    def multiply(
        self, matrix: int, requests: Sequence[tuple[AnyPayload, int]]
    ) -> Sequence[AnyPayload]:
        """Answers to requests (payload, tokens) for one matrix. Called from several threads.

        Raises ValueError where one of them has the wrong number of bytes, DevicesGoneError where
        no other request would be answered either, now or later.
        """


class OneDevice(Devices):
    """All matrices on the device of one cipher, in this process."""

    count, here = 1, True

    def __init__(
        self, catalogue: Catalogue, cipher: WorkerCipher, matrices: Sequence[WorkerMatrix]
    ) -> None:
        if len(matrices) != len(catalogue.matrices):
            raise ValueError(
                f"{len(matrices)} matrices; the catalogue has {len(catalogue.matrices)}"
            )
        self.catalogue, self.each, self._cipher = catalogue, cipher.launches, cipher
        self._loaded: list[Any] = [cipher.load(m.weight, m.forward, m.format) for m in matrices]

    @classmethod
    def holding(cls, part: WorkerPart, cipher: WorkerCipher) -> OneDevice:
        """All that a worker's part of a model has."""
        return cls(part.catalogue, cipher, part.matrices)

    def of(self, matrix: int) -> int:
        return 0

    def multiply(
        self, matrix: int, requests: Sequence[tuple[AnyPayload, int]]
    ) -> Sequence[AnyPayload]:
        return self._cipher.multiply_many(requests, self._loaded[matrix])


class Queues:
    """Requests that wait for devices: a fair share for each client, one matrix at a time.

    config     says how many tokens are joined, and what shares clients have
    client_of  whose a task is
    gone       is told why what multiplies will never do so again
    """

    def __init__(
        self,
        config: WorkerConfig,
        devices: Devices,
        client_of: Callable[[int], str],
        counts: Counts,
        gone: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._devices, self._client_of, self._gone = devices, client_of, gone
        self._queues = [
            FairQueue[int](config.max_tokens, config.shares) for _ in range(devices.count)
        ]
        self._busy = [0] * devices.count
        self._next = 0
        self._taken: dict[int, int] = {}  # the first task of a product -> its device
        self._lock = threading.Lock()
        self._since: dict[int, float] = {}
        self._counts = counts

    def __len__(self) -> int:
        """Requests that wait."""
        with self._lock:
            return sum(map(len, self._queues))

    def put(self, task: int, work: Task) -> None:
        assert isinstance(work, MultiplyCiphertext)
        size = self._devices.catalogue.both_bytes(work.matrix, charged(work.tokens))
        with self._lock:
            self._since[task] = time.monotonic()
            queue = self._queues[self._devices.of(work.matrix)]
            queue.push(task, self._client_of(task), work.matrix, work.tokens, size)

    def take(self) -> list[int]:
        with self._lock:
            device = self._free()
            if device is None:
                return []
            tasks, now = self._queues[device].pop(), time.monotonic()
            self._busy[device] += 1
            self._taken[tasks[0]] = device
            waited_s = sum(now - self._since.pop(task) for task in tasks)
        self._counts.waited(waited_s)
        return tasks

    def done(self, tasks: Sequence[int]) -> None:
        with self._lock:
            self._busy[self._taken.pop(tasks[0])] -= 1

    def forget(self, task: int) -> None:
        """It has been cancelled."""
        with self._lock:
            for queue in self._queues:
                queue.remove(task)
            self._since.pop(task, None)

    def compute(self, works: Sequence[Task]) -> Sequence[object]:
        matrix, requests = 0, list[tuple[Payload, int]]()
        for work in works:
            assert isinstance(work, MultiplyCiphertext)
            matrix = work.matrix
            requests.append((work.payload, work.tokens))
        start = time.perf_counter()
        try:
            answers = self._devices.multiply(matrix, requests)
        except DevicesGoneError as error:
            self._gone(str(error))
            raise
        self._counts.multiplied(time.perf_counter() - start)
        return [carried(answer) for answer in answers]

    def _free(self) -> int | None:
        """A device that may begin something that waits; in turn, where there are several."""
        count = self._devices.count
        for device in ((self._next + i) % count for i in range(count)):
            if self._busy[device] < self._devices.each and len(self._queues[device]):
                self._next = device + 1
                return device
        return None
