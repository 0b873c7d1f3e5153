"""A worker on the real clock: the public weights, the worker's machine, a product per request.

Nothing this module imports can hold a secret; a test walks its imports.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from backends.net.counts import REFUSED, Counts, LineEvent, guarded, small_message
from backends.net.devices import Devices, Queues
from backends.net.loop import Hooks, MachineLoop, Meter
from protocol.errors import ProtocolError
from protocol.events import (
    Dropped,
    Effect,
    Event,
    FrameArrived,
    PeerLost,
    RunTask,
    Send,
    Task,
    TaskDone,
    TaskFailed,
)
from protocol.messages import (
    Frame,
    Hello,
    Multiply,
    Reason,
    Refuse,
    decode,
    encode,
)
from protocol.worker import Worker, WorkerConfig

log = logging.getLogger(__name__)

_NOBODY = ""
"""A peer that does not exist: the loss of one means nothing, but that all before it was handled."""
_REASONS_TOLD = 4096
"""Peers whose refusals are remembered, so that each is told once."""


def client_of(peer: str) -> str:
    """Whose link a peer is: links of one certificate are one client."""
    return peer.partition("#")[0]


class WorkerServer:
    """Serves products of ciphertexts with matrices.

    devices   hold the matrices
    reply     sends (peer, frame) back
    counts    where to count what it does
    tell      is told why a peer was refused something, once for each peer and reason
    on_crash  is told that it cannot go on, see `failure`, on any thread
    """

    def __init__(
        self,
        devices: Devices,
        reply: Callable[[str, Frame], None],
        config: WorkerConfig | None = None,
        hooks: Hooks | None = None,
        counts: Counts | None = None,
        tell: Callable[[LineEvent], None] = lambda event: None,
        on_crash: Callable[[], None] = lambda: None,
    ) -> None:
        catalogue = devices.catalogue
        self.counts, self.failure = counts or Counts(), ""
        self._catalogue, self._reply, self._tell = catalogue, reply, guarded(tell)
        self._on_crash = on_crash
        self._told: set[tuple[str, Reason]] = set()
        self._draining, self._finished = threading.Event(), threading.Event()
        config, self._hooks = config or WorkerConfig(), hooks or Hooks()
        self._in_work: dict[int, str] = {}  # task -> whose it is; of the loop's thread
        self._queues = Queues(
            config, devices,
            lambda task: client_of(self._in_work[task]), self.counts, self._cannot_go_on,
        )  # fmt: skip
        self._loop = MachineLoop(
            "worker", Worker(catalogue, config, client_of), self._compute, reply, self._report,
            self._crashed, devices.count * devices.each, self._observe, self._hooks.on_task,
            lambda task: devices.here and task.tokens == 1, self._queues,
        )  # fmt: skip

    @property
    def meter(self) -> Meter:
        """Counters of this worker."""
        return self._loop.meter

    def start(self) -> None:
        """Begin to serve."""
        self._loop.start()

    def deliver(self, peer: str, frame: Frame | memoryview) -> bool:
        """Hand over a frame that arrived from `peer`; False where the machine will not see it."""
        if self._draining.is_set() and self._put_off(peer, frame):
            return False
        self._loop.post(FrameArrived(peer, frame))
        return True

    def lost(self, peer: str) -> None:
        """The connection of `peer` has ended."""
        self._loop.post(PeerLost(peer))

    def finish(self, seconds: float) -> bool:
        """Refuse requests from now on, and wait until those in hand are answered.

        False when that takes longer than so many seconds.
        """
        self._draining.set()
        self._loop.post(PeerLost(_NOBODY))
        return self._finished.wait(seconds)

    def stop(self) -> None:
        """Stop serving."""
        self._loop.stop()

    def _put_off(self, peer: str, frame: Frame | memoryview) -> bool:
        """Answer a request with BUSY; False for anything else, which the machine may have."""
        try:
            message = decode(frame)
        except ProtocolError:
            return False
        if not isinstance(message, Multiply):
            return False
        answer = encode(Refuse(message.session, message.request, Reason.BUSY))
        self.counts.put_off(len(frame), len(answer))
        self._reply(peer, answer)
        return True

    def _observe(self, event: Event, effects: Sequence[Effect]) -> None:
        """On the loop's thread, before the effects take effect."""
        self.counts.observe(event, effects)
        for effect in effects:
            if isinstance(effect, Send):
                self._notice_refusal(event, effect)
        if self._draining.is_set() and not self.counts.in_hand:
            if event == PeerLost(_NOBODY):
                self._finished.set()  # whatever was sent before this has been handed over
            elif not self._finished.is_set():
                self._loop.post(PeerLost(_NOBODY))
        self._give_up_work(event, effects)
        self._hooks.observe(event, effects)

    def _give_up_work(self, event: Event, effects: Sequence[Effect]) -> None:
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
                theirs = [task for task, whose in self._in_work.items() if whose == peer]
                for task in reversed(theirs):  # the last first: it is not charged for them
                    self._queues.forget(task)
                    self._loop.cancel(task)

    def _notice_refusal(self, event: Event, effect: Send) -> None:
        message = small_message(effect.frame)
        if not isinstance(message, Refuse) or (effect.peer, message.reason) in self._told:
            return
        if len(self._told) >= _REASONS_TOLD:
            self._told.clear()
        self._told.add((effect.peer, message.reason))
        detail = ""
        if isinstance(event, FrameArrived) and message.reason is Reason.OTHER_MODEL:
            asked = small_message(event.frame)
            assert isinstance(asked, Hello)
            ours = self._catalogue.model_digest
            detail = f"it asks for model {asked.model_digest.hex()}, this one is {ours.hex()}"
        owner = client_of(effect.peer)
        self._tell(LineEvent(REFUSED, owner, message.reason.name.lower(), detail))

    def _compute(self, task: Task) -> object:
        return self._queues.compute([task])[0]

    def _report(self, effect: Effect) -> None:
        if isinstance(effect, Dropped):
            self._loop.meter.dropped += 1
            log.info("dropped a frame of %s: %s", effect.peer, effect.reason)

    def _crashed(self, error: BaseException) -> None:
        self._cannot_go_on(f"{type(error).__name__}, which is a mistake in it")

    def _cannot_go_on(self, why: str) -> None:
        if not self.failure:
            self.failure = why
            log.critical("the worker cannot go on: %s", why)
            self._on_crash()
