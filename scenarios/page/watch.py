"""The trace of a run for its page: a few steps, and one request as a worker gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.events import Effect, Event, Send
from protocol.messages import Multiply, decode
from scenarios.page.content import Request
from scenarios.real_trace import RealTrace

STEPS = 3
"""Steps that a page needs: the first is a poor example, for it warms everything up."""
LEAST_BYTES, KEPT_BYTES = 1 << 12, 1 << 20
"""Of a request: so many for its statistics to mean something, and at most so many are kept."""


@dataclass
class Watch(RealTrace):
    """A trace that also keeps the first large request of training: ciphertext, as it was sent.

    A payload that stays on a GPU is not kept.
    """

    request: Request | None = None

    def _owner_handled(self, event: Event, effects: Sequence[Effect]) -> None:
        super()._owner_handled(event, effects)
        for effect in effects if self.recording else ():
            if self.request is not None:
                return
            if isinstance(effect, Send) and isinstance(effect.frame, bytes):
                self._look_at(effect.frame)

    def _look_at(self, frame: bytes) -> None:
        message = decode(frame)
        if isinstance(message, Multiply) and len(message.payload) >= LEAST_BYTES:
            payload = bytes(message.payload[:KEPT_BYTES])
            name = self._name(message.matrix)
            self.request = Request(payload, len(message.payload), message.tokens, name)
