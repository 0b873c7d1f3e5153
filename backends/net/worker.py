"""A worker on the real clock: the public weights, the worker's machine, a product per request.

Nothing this module imports can hold a secret; a test walks its imports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import WorkerCipher, carried
from backends.net.joining import Joiner
from backends.net.loop import Hooks, MachineLoop, Meter
from protocol.catalogue import Catalogue
from protocol.events import (
    Dropped,
    Effect,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Task,
    TaskDone,
    TaskFailed,
)
from protocol.messages import Frame, Payload
from protocol.worker import Worker, WorkerConfig

log = logging.getLogger(__name__)

_WAITING = 4
"""Requests a launch may have waiting for it, on threads of their own."""


class WorkerServer:
    """Serves products of ciphertexts with `weights`.

    weights   int8[N, K], one per linear group; matrix 2g is group g forward, 2g+1 backward
    reply     sends (peer, frame) back
    threads   that compute; more than the cipher's launches lets requests wait and be joined
    """

    def __init__(
        self,
        catalogue: Catalogue,
        weights: Sequence[NDArray[np.int8]],
        cipher: WorkerCipher,
        reply: Callable[[str, Frame], None],
        config: WorkerConfig | None = None,
        threads: int | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        if 2 * len(weights) != len(catalogue.matrices):
            raise ValueError(
                f"{len(weights)} weights make {2 * len(weights)} matrices; the catalogue has "
                f"{len(catalogue.matrices)}"
            )
        self._cipher = cipher
        self._matrices = [
            cipher.load(weight, forward) for weight in weights for forward in (True, False)
        ]
        config, hooks = config or WorkerConfig(), hooks or Hooks()
        self._joiner = Joiner(
            self._multiply, cipher.launches, lambda request: request[1], config.max_tokens
        )
        if threads is None:
            threads = 1 if cipher.launches == 1 else _WAITING * cipher.launches
        self._loop = MachineLoop(
            "worker", Worker(catalogue, config), self._compute, reply, self._report,
            self._crashed, threads, self._observe, hooks.on_task,
        )  # fmt: skip
        self._observed = hooks.observe
        self._in_work: dict[int, str] = {}  # task -> whose it is; of the loop's thread

    @property
    def meter(self) -> Meter:
        """Counters of this worker."""
        return self._loop.meter

    def start(self) -> None:
        """Begin to serve."""
        self._loop.start()

    def deliver(self, peer: str, frame: Frame | memoryview) -> None:
        """Hand over a frame that arrived from `peer`."""
        self._loop.post(FrameArrived(peer, frame))

    def lost(self, peer: str) -> None:
        """The connection of `peer` has ended."""
        self._loop.post(PeerLost(peer))

    def stop(self) -> None:
        """Stop serving."""
        self._loop.stop()

    def _observe(self, event: Event, effects: Sequence[Effect]) -> None:
        """Work of a peer that is gone is given up: it must not be done before that of others.

        Nor may a peer that comes again and again, under new names, leave work behind without bound.
        """
        match event:
            case FrameArrived(peer):
                for effect in effects:
                    if isinstance(effect, RunTask):
                        self._in_work[effect.task] = peer
            case TaskDone(task) | TaskFailed(task):
                self._in_work.pop(task, None)
            case PeerLost(peer):
                for task in [task for task, whose in self._in_work.items() if whose == peer]:
                    self._loop.cancel(task)
        self._observed(event, effects)

    def _compute(self, task: Task) -> object:
        assert isinstance(task, MultiplyCiphertext)
        return carried(self._joiner.run(task.matrix, (task.payload, task.tokens)))

    def _multiply(self, matrix: int, requests: list[tuple[Payload, int]]) -> Sequence[Payload]:
        return self._cipher.multiply_many(requests, self._matrices[matrix])

    def _report(self, effect: Effect) -> None:
        if isinstance(effect, Dropped):
            self._loop.meter.dropped += 1
            log.info("dropped a frame of %s: %s", effect.peer, effect.reason)

    def _crashed(self, error: BaseException) -> None:
        log.critical("the worker cannot go on: %s", type(error).__name__)
