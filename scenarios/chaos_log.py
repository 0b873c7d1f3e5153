"""The history of a run in words: who saw what, when, and what followed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from protocol.events import (
    Decrypt,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    RunTask,
    Send,
)
from scenarios.chaos_checks import digest, read

_NAMES = ("?", "Hello", "Welcome", "Multiply", "Product", "Refuse", "Bye", "Farewell")


class EventLog:
    """An observer that keeps one line an event; frames appear as their digests only."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Write down one event of an actor."""
        followed = ", ".join(in_words(effect) for effect in effects) or "nothing"
        self.lines.append(f"{now:12.6f} {actor:8} {in_words(event)} -> {followed}")

    def sha256(self) -> str:
        """Digest of all lines."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def in_words(item: Event | Effect) -> str:
    """An event or effect without anything private or long."""
    match item:
        case FrameArrived(peer, frame):
            return f"{_frame(frame)} from {peer}"
        case Send(peer, frame):
            return f"send {_frame(frame)} to {peer}"
        case RunTask(task, Encrypt(matrix)):
            return f"encrypt #{task} for matrix {matrix}"
        case RunTask(task, Decrypt(matrix)):
            return f"decrypt #{task} of matrix {matrix}"
        case RunTask(task, MultiplyCiphertext(matrix)):
            return f"multiply #{task} by matrix {matrix}"
        case Dropped(peer, reason):
            return f"drop ({reason}) of {peer}"
        case _:
            # Opaque handles (inputs, results) are left out of these dataclasses' own texts.
            return repr(item)


def _frame(frame: Any) -> str:
    seen = read(frame)
    if seen is None:
        return f"garbage {digest(frame)}"
    return f"{_NAMES[seen.kind]} {seen.request} {digest(frame)}"
