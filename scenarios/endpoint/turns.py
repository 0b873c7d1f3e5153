"""Requests of one training client in the order of their numbers, in whatever order they come.

The client numbers them from 1 on without gaps, and may send several at once, the first of them
last: what is after a gap waits for what is missing, and a step must not be made without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from scenarios.endpoint.fields import Fields, RequestError
from scenarios.endpoint.proto import read_address

PATIENCE_S = 10.0
"""How long those that follow a missing request wait, after the last of them came. One that was too
large to be read, or that the client gave up, never comes."""
_EARLY_MAX = 1024


@dataclass(frozen=True)
class Turn:
    """Whose request it is, and which of theirs; backward where gradients were to come of it."""

    model_id: str
    seq: int
    backward: bool


def turn_of(body: bytes, binary: bool) -> Turn | None:
    """As far as it can be told of a request that was refused; None where it cannot."""
    if binary:
        model_id, seq, forward_only = read_address(body)
        return Turn(model_id, seq, not forward_only) if seq > 0 else None
    try:
        held = Fields.of(body, "a request")
        return Turn(held.text("model_id"), held.whole("seq_id", 1, 2**62), backward=False)
    except RequestError:
        return None


class Turns:
    """Whose turn it is. Not safe by itself: all is called under one lock.

    lock  that lock, for what is done when patience ends
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._next = 1
        self._early: dict[int, Callable[[], None]] = {}
        self._lost = False
        self._timer: threading.Timer | None = None

    def came(self, seq: int) -> bool:
        """Whether this turn was taken, or is over."""
        return seq < self._next or seq in self._early

    def take(self, seq: int, start: Callable[[bool], None], settles: bool = False) -> None:
        """Have `start` called when all before it came; it is told whether gradients were lost.

        settles  no later request is told of these
        """

        def begin() -> None:
            start(self._lost)
            self._lost = self._lost and not settles

        self._early[seq] = begin
        self._go_on()

    def skip(self, seq: int, backward: bool) -> None:
        """It was refused: those after it need not wait; with it went gradients, if `backward`."""
        if self.came(seq) or len(self._early) >= _EARLY_MAX:
            return

        def lose() -> None:
            self._lost = self._lost or backward

        self._early[seq] = lose
        self._go_on()

    def end(self) -> None:
        """Wait for nothing any more."""
        while self._early:
            self._give_up()

    def _give_up(self) -> None:
        """What is missing will not come; gradients may have gone with it."""
        self._lost = True
        self._next = min(self._early)
        self._go_on()

    def _go_on(self) -> None:
        while self._next in self._early:
            self._early.pop(self._next)()
            self._next += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._early:
            self._timer = threading.Timer(PATIENCE_S, self._out_of_patience)
            self._timer.daemon = True
            self._timer.start()

    def _out_of_patience(self) -> None:
        with self._lock:
            # A timer that was cancelled while it waited for the lock is another one's by now.
            if self._early and threading.current_thread() is self._timer:
                self._give_up()
