"""What an owner can see of the line to its workers: how long requests are under way, and bytes.

Nothing is asked of a worker for this: it is the time from sending a request to its answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.net.counts import small_message
from backends.net.loop import Hooks
from protocol.events import Effect, Event, FrameArrived, Send
from protocol.messages import LocalFrame, Refuse
from sim.frames import call_of

_UNDER_WAY_MAX = 4096
"""Calls at once, of lanes and what their requests are split into: hundreds at most. Of those whose
answer never comes, the oldest are forgotten."""


@dataclass
class LineWatch:
    """Told of frames by the owner's loop (see `Hooks.observe`). Safe to read from any thread.

    away_s  seconds that requests were under way, each from its sending to its answer, summed
    held_s  seconds for which workers have told requests to come back later, until they did, summed
    """

    away_s: float = 0.0
    held_s: float = 0.0
    _sent: dict[int, float] = field(default_factory=dict)
    _told: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, event: Event, effects: Sequence[Effect]) -> None:
        """Note what was sent and what has arrived."""
        now = time.perf_counter()
        with self._lock:
            if isinstance(event, FrameArrived) and not isinstance(event.frame, LocalFrame):
                told = small_message(event.frame)
                later = isinstance(told, Refuse) and told.after_ms > 0
                call = told.request if isinstance(told, Refuse) and later else _call(event.frame)
                sent = self._sent.pop(call, None)
                if sent is not None:
                    self.away_s += now - sent
                    if later:
                        self._told[call] = now
            for effect in effects:
                if isinstance(effect, Send) and not isinstance(effect.frame, LocalFrame):
                    call = _call(effect.frame)
                    if call:
                        self._sent.setdefault(call, now)
                        self.held_s += now - self._told.pop(call, now)
            for calls in (self._sent, self._told):
                while len(calls) > _UNDER_WAY_MAX:
                    del calls[next(iter(calls))]


def _call(frame: bytes | bytearray | memoryview) -> int:
    """As `call_of`; 0 for a frame that is too short to tell."""
    try:
        return call_of(bytes(frame[:64]))
    except (IndexError, ValueError, ArithmeticError, LookupError):
        return 0


def watched(hooks: Hooks, watch: LineWatch) -> Hooks:
    """The hooks of an owner, with a watch beside them."""

    def observe(event: Event, effects: Sequence[Effect]) -> None:
        watch.observe(event, effects)
        hooks.observe(event, effects)

    return Hooks(observe, hooks.on_task, hooks.on_call)


def waits_for(
    step_s: float, lanes: int, away_s: float, worker_s: float, held_s: float = 0.0
) -> str:
    """What most of a step went to: "owner", "line", "worker", or "quota".

    A lane's time is divided: its requests are away, or told to come back later, or the owner works
    for it. Of the time away, what the products take by the speed that the probe has found is the
    worker's, the rest the line's.

    away_s    of all lanes' requests
    worker_s  that the worker needs for the step's products
    held_s    of all lanes' requests: the worker takes no more of this owner's (see Quota)
    """
    remote_s = min(step_s, away_s / lanes)
    quota_s = min(step_s - remote_s, held_s / lanes)
    worker_s = min(worker_s, remote_s)
    parts = {
        "owner": step_s - remote_s - quota_s, "line": remote_s - worker_s, "worker": worker_s,
        "quota": quota_s,
    }  # fmt: skip
    return max(parts, key=parts.__getitem__)
