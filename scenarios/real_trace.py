"""The trace of a real run, in the format of the simulated ones, so that both can be compared.

Tracks are named as in `sim.hosts`: "owner0/lane 1" (a lane's own layers), "owner0/cipher",
"owner0->worker0" and back, "worker0/gpu" (whatever the worker computes on), "owner0/steps". In one
process a frame's way is the hand-over between two threads. Of a worker elsewhere only the time from
a request to its answer is known, "owner0<->worker0", and it is not said what of it is the line's.

Of what the hooks see only times, numbers and names of layers are kept.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from backends.net.loop import Hooks
from protocol.events import (
    Decrypt,
    Effect,
    Encrypt,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    RunTask,
    Send,
    Task,
)
from protocol.messages import Multiply, Product, decode
from sim.trace import HEAD, Recorder, Span, write_perfetto

OWNER = "owner0"


@dataclass
class _Lane:
    """A lane's thread: its track, when it first asked in this step, when it last got an answer, and
    which matrix it asked for last."""

    track: str
    matrix: int = 1
    first: tuple[str, float] | None = None
    since_s: float = 0.0


@dataclass
class RealTrace:
    """Collects what the hooks of a real run tell, once started. Safe to be told from any thread.

    layers      names of the groups, in the catalogue's order
    most_steps  after which nothing more is collected
    """

    layers: Sequence[str]
    most_steps: float = math.inf
    _recorder: Recorder = field(default_factory=Recorder)
    _lanes: dict[int, _Lane] = field(default_factory=dict)
    _lane_of_call: dict[int, str] = field(default_factory=dict)
    _requested: dict[tuple[str, int], float] = field(default_factory=dict)
    _call_of_task: dict[tuple[str, int], int] = field(default_factory=dict)
    _queued_s: dict[tuple[str, int, type], float] = field(default_factory=dict)
    _matrix_of_call: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _zero_s: float = math.inf
    _until_s: float = math.inf
    _steps: int = 0

    def hooks(self, side: str) -> Hooks:
        """Those of "owner" or of a worker."""
        if side == "owner":
            return Hooks(self._owner_handled, self._owner_computed, self._answered)
        return Hooks(
            lambda event, effects: self._worker_handled(side, event, effects),
            lambda task, work, start, end: self._worker_computed(side, task, work, start, end),
        )

    def start(self) -> None:
        """From now on; what warming up did is left out."""
        self._zero_s = time.perf_counter()

    def stop(self) -> None:
        """What comes later is left out too, an evaluation for instance."""
        self._until_s = min(self._until_s, time.perf_counter())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is computed between steps, an evaluation for instance, is left out."""
        zero, self._zero_s = self._zero_s, math.inf
        try:
            yield
        finally:
            self._zero_s = zero

    @property
    def recording(self) -> bool:
        """Whether it has been started, and not ended."""
        return self._zero_s <= time.perf_counter() < self._until_s

    def step_ended(self, seconds: float) -> None:
        """A step that took so long has just ended."""
        end = time.perf_counter()
        begin = end - seconds
        with self._lock:
            for lane in self._lanes.values():
                if lane.first is None:
                    continue
                name, asked = lane.first
                self._add(lane.track, name, begin, asked, lane.track, 0)
                self._add(lane.track, "last gradients", lane.since_s, end, lane.track, 0)
                lane.first = None
            self._add(f"{OWNER}/steps", f"step {self._steps}", begin, end, kind="step")
            self._steps += 1
            if self._steps >= self.most_steps:
                self._until_s = min(self._until_s, end)

    def spans(self) -> list[Span]:
        """All spans so far, each with the lane it was for."""
        with self._lock:
            return [
                replace(span, lane=span.lane or self._lane_of_call.get(span.call, ""))
                for span in self._recorder.spans
            ]

    def write(self, path: Path, title: str) -> None:
        """As a file for ui.perfetto.dev."""
        write_perfetto(path, self.spans(), title)
        print(f"trace of {self._steps} steps in {path} (drop it on https://ui.perfetto.dev)")

    # --- the owner's side ---------------------------------------------------------------------

    def _owner_handled(self, event: Event, effects: Sequence[Effect]) -> None:
        now = time.perf_counter()
        if now > self._until_s:
            return
        with self._lock:
            if isinstance(event, FrameArrived):
                self._product_arrived(event, now)
            for effect in effects:
                if isinstance(effect, RunTask):
                    self._queued_s[OWNER, effect.task, type(effect.work)] = now
                elif isinstance(effect, Send) and isinstance(
                    message := decode(effect.frame), Multiply
                ):
                    self._requested["up", message.request] = now
                    self._matrix_of_call[message.request] = message.matrix

    def _product_arrived(self, event: FrameArrived, now: float) -> None:
        message = decode(event.frame)
        if isinstance(message, Product):
            call = message.request
            asked = self._requested.pop(("up", call), None)
            if asked is not None:  # nobody here has seen it arrive: the worker is elsewhere
                track = f"{OWNER}<->{event.peer}"
                self._add(track, "line and worker", asked, now, call=call, kind="")
                return
            sent = self._requested.pop(("down", call), now)
            self._add(f"{event.peer}->{OWNER}", "answer", sent, now, call=call, kind="down")

    def _owner_computed(self, task: int, work: Task, start: float, end: float) -> None:
        assert isinstance(work, Encrypt | Decrypt)
        name = f"{type(work).__name__.lower()} {self._name(work.matrix)}"
        with self._lock:
            self._waited(OWNER, "cipher", task, work, start, task, "owner")
            self._add(f"{OWNER}/cipher", name, start, end, call=task, kind="owner")

    def _answered(self, call: int, asked: float, answered: float) -> None:
        """On the lane's own thread: what came before was its own layers."""
        with self._lock:
            if asked < self._zero_s or answered > self._until_s:
                return
            lane = self._lanes.setdefault(
                threading.get_ident(), _Lane(f"{OWNER}/lane {len(self._lanes)}")
            )
            self._lane_of_call[call] = lane.track
            matrix = self._matrix_of_call.get(call, 0)
            turns = matrix % 2 == 1 and lane.matrix % 2 == 0  # from forward to backward
            name = HEAD if turns else f"before {self._name(matrix)}"
            lane.matrix = matrix
            if lane.first is None:  # the step's beginning is known when it has ended
                lane.first = (name, asked)
            else:
                self._add(lane.track, name, lane.since_s, asked, lane.track, 0)
            lane.since_s = answered

    # --- a worker's side ----------------------------------------------------------------------

    def _worker_handled(self, worker: str, event: Event, effects: Sequence[Effect]) -> None:
        now = time.perf_counter()
        if now > self._until_s:
            return
        with self._lock:
            message = decode(event.frame) if isinstance(event, FrameArrived) else None
            for effect in effects:
                if isinstance(effect, RunTask) and isinstance(message, Multiply):
                    self._request_arrived(worker, message.request, effect, now)
                elif isinstance(effect, Send) and isinstance(
                    answer := decode(effect.frame), Product
                ):
                    self._requested["down", answer.request] = now

    def _request_arrived(self, worker: str, call: int, effect: RunTask, now: float) -> None:
        sent = self._requested.pop(("up", call), now)
        self._add(f"{OWNER}->{worker}", "request", sent, now, call=call, kind="up")
        self._call_of_task[worker, effect.task] = call
        self._queued_s[worker, effect.task, type(effect.work)] = now

    def _worker_computed(
        self, worker: str, task: int, work: Task, start: float, end: float
    ) -> None:
        assert isinstance(work, MultiplyCiphertext)
        with self._lock:
            call = self._call_of_task.pop((worker, task), 0)
            self._waited(worker, "gpu", task, work, start, call, "worker")
            name = self._name(work.matrix)
            self._add(f"{worker}/gpu", name, start, end, call=call, kind="worker")

    # --- both ---------------------------------------------------------------------------------

    def _waited(
        self, side: str, device: str, task: int, work: Task, start: float, call: int, what: str
    ) -> None:
        """The time a task spent in a queue, where there was any to speak of."""
        queued = self._queued_s.pop((side, task, type(work)), start)
        self._add(f"{side}/{device} queue", what, queued, start, call=call, kind="wait")

    def _name(self, matrix: int) -> str:
        return f"{self.layers[matrix // 2]} {'backward' if matrix % 2 else 'forward'}"

    def _add(
        self, track: str, name: str, start: float, end: float, lane: str = "", call: int = 0,
        kind: str = "owner",
    ) -> None:  # fmt: skip
        zero = self._zero_s
        if zero <= start < end <= self._until_s:
            self._recorder.add(Span(track, name, start - zero, end - zero, lane, call, kind))
