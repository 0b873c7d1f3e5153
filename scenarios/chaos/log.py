"""The history of a run: in words, as a digest, and as a picture.

One line an event: when, who, what it saw, what it asked for. Frames appear as their digests. Two
runs are the same when their lines are. The spans are for Perfetto: each frame on its way, each
task, each call of a lane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from protocol.events import (
    AnswerRejected,
    Decrypt,
    Deliver,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    RunTask,
    Send,
    TaskDone,
    TaskFailed,
)
from scenarios.chaos.checks import digest, read
from sim.trace import Span

_NAMES = ("?", "Hello", "Welcome", "Multiply", "Product", "Refuse", "Bye", "Farewell")


class EventLog:
    """An observer that keeps one line an event, and a span of time for all that lasts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.spans: list[Span] = []
        self._open: dict[tuple[str, object], tuple[float, str]] = {}

    def __call__(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Write down one event of an actor."""
        followed = ", ".join(in_words(effect) for effect in effects) or "nothing"
        self.lines.append(f"{now:12.6f} {actor:8} {in_words(event)} -> {followed}")
        self._ends(actor, now, event)
        for effect in effects:
            self._begins(actor, now, effect)
        if isinstance(event, LinearWanted):
            self._open["owner/calls", event.call] = (now, f"call {event.call}")

    def note(self, actor: str, now: float, what: str) -> None:
        """Write down what happened to an actor; what it was doing has ended."""
        self.lines.append(f"{now:12.6f} {actor:8} *** {what}")
        self.spans.append(Span(f"{actor}/faults", what, now, now))
        if "crash" in what or "again" in what:
            gone = [key for key in self._open if key[0].startswith(f"{actor}/")]
            for key in gone:
                del self._open[key]

    def sha256(self) -> str:
        """Digest of all lines."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def _ends(self, actor: str, now: float, event: Event) -> None:
        match event:
            case FrameArrived(peer, frame):
                self._close(f"{peer}->{actor}", digest(frame), now)
            case TaskDone(task) | TaskFailed(task) | AnswerRejected(task):
                self._close(f"{actor}/tasks", task, now)
            case _:
                pass

    def _begins(self, actor: str, now: float, effect: Effect) -> None:
        match effect:
            case Send(peer, frame):
                # A retry before the first copy arrived is shown from the first on.
                key = (f"{actor}->{peer}", digest(frame))
                self._open.setdefault(key, (now, _frame(frame)))
            case RunTask(task):
                self._open[f"{actor}/tasks", task] = (now, in_words(effect))
            case Deliver(call) | FailCall(call):
                self._close("owner/calls", call, now)
            case _:
                pass

    def _close(self, track: str, key: object, now: float) -> None:
        begun = self._open.pop((track, key), None)
        if begun is not None:
            self.spans.append(Span(track, begun[1], begun[0], now))


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
