"""Frames that have been read and wait to be handled: counted, so that reading can stop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from backends.net.loop import Hooks
from protocol.events import Effect, Event, FrameArrived
from protocol.messages import Frame

UNHANDLED_BYTES = 32 << 20
"""What may wait, of all links of a side together, before nothing more is read."""
_COST_BYTES = 512
"""Of a frame that waits, beyond its length."""
_EACH = 32
"""Frames of one link that may wait. All links' wait in one line: whoever sends more than can be
handled would have the others wait behind all that fits."""


class Backlog:
    """Bytes of frames that wait, of all links of one side.

    most   beyond it `full` is true
    hooks  who else sees what is handled
    """

    def __init__(self, most: int, hooks: Hooks) -> None:
        self._most, self._hooks = most, hooks
        self._bytes = 0
        self._each = Counter[str]()
        self._lock = threading.Lock()

    def arrived(self, peer: str, frame: memoryview) -> None:
        """A frame of a peer is about to be handed over."""
        with self._lock:
            self._bytes += len(frame) + _COST_BYTES
            self._each[peer] += 1

    def handled(self, peer: str, frame: Frame | bytearray | memoryview) -> None:
        """A frame that was handed over waits no more; `observe` says so of those of events."""
        with self._lock:
            self._bytes -= len(frame) + _COST_BYTES
            self._each[peer] -= 1
            if not self._each[peer]:
                del self._each[peer]

    def full(self, peer: str = "") -> bool:
        """Whether reading should wait: at all, or that of a peer's link."""
        return self._bytes > self._most or self._each.get(peer, 0) >= _EACH

    def observe(self, event: Event, effects: Sequence[Effect]) -> None:
        """An event has been handled; for `Hooks`."""
        if isinstance(event, FrameArrived):
            self.handled(event.peer, event.frame)
        self._hooks.observe(event, effects)
