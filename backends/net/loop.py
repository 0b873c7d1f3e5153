"""Runs one machine on the real clock: one thread, one queue of events, timers, a task pool.

The loop interprets effects and nothing more. Frames leave through `transmit`, compute tasks run
on threads of the pool, everything else (Deliver, FailCall, Abort, ...) goes to `report`. Both
are called on the loop's thread and must not block.

Handing a task to the pool and its result back costs two changes of thread, which for a request of
one token is as much as the task. So a small one may run on the loop's own thread, when it is all
that there is to do: nothing waits in the queue, and nothing in the pool.

Where tasks are joined (`Joined`) the pool is given one turn a task, and each turn takes as many as
there are to take together, again and again until nothing is left that may begin: so a turn may find
nothing, and none waits without one.
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    CancelTimer,
    Effect,
    Event,
    Machine,
    RunTask,
    Send,
    SetTimer,
    Task,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import Frame

log = logging.getLogger(__name__)


def _where(error: BaseException) -> str:
    """Its type, and the lines it came through; not its text, which may quote private values."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__} at {lines}"


@dataclass
class Meter:
    """What a side has done so far. Sizes and durations only, nothing about content."""

    busy_s: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    frames_sent: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dropped: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_task(self, name: str, seconds: float) -> None:
        """Count one compute task of a kind."""
        with self._lock:
            self.busy_s[name] = self.busy_s.get(name, 0.0) + seconds
            self.tasks[name] = self.tasks.get(name, 0) + 1

    def total_busy_s(self) -> float:
        """Seconds spent in compute tasks, of all kinds and threads."""
        with self._lock:
            return sum(self.busy_s.values())


class Joined(Protocol):
    """Which of the tasks that wait are computed next, and together. Called from several threads."""

    def put(self, task: int, work: Task) -> None:
        """One more waits."""

    def take(self) -> list[int]:
        """Those to be computed now; they wait no more. Empty when there are none."""

    def done(self, tasks: Sequence[int]) -> None:
        """What was taken is computed, or given up."""

    def compute(self, works: Sequence[Task]) -> Sequence[object]:
        """One result each. Of a ValueError it is not known whose it is."""


@dataclass(frozen=True)
class Hooks:
    """Who wants to see what a side does. Times are seconds of `time.perf_counter`.

    They are told of private values too, and must keep numbers and names only.

    observe  (event, effects), on the loop's thread, before the effects take effect
    on_task  (task, work, started, ended) of a compute task, on its thread, before its end is an
             event
    on_call  (call, asked, answered) of a lane's remote linear, on the lane's thread
    """

    observe: Callable[[Event, Sequence[Effect]], None] = lambda event, effects: None
    on_task: Callable[[int, Task, float, float], None] = lambda task, work, start, end: None
    on_call: Callable[[int, float, float], None] = lambda call, asked, answered: None


class MachineLoop:
    """Drives `machine` until `stop`. Events may be posted from any thread.

    compute   runs one task, on a pool thread or the loop's, and returns its result; a
              WrongAnswerError it raises becomes AnswerRejected, a ValueError TaskFailed with its
              text, anything else TaskFailed with its type named
    threads   of the pool
    small     whether a task may run on the loop's thread; not asked where the pool has several
    joined    computes the tasks of the pool, several together, in its own order
    transmit  hands (peer, frame) to the transport
    report    receives every effect that is not about frames, tasks or timers
    on_crash  receives an exception the machine itself raised; the loop has then stopped
    observe   sees every event and what it led to, on the loop's thread, before it takes effect
    on_task   sees every compute task when it has ended, on its thread, see `Hooks`
    """

    def __init__(
        self,
        name: str,
        machine: Machine,
        compute: Callable[[Task], object],
        transmit: Callable[[str, Frame], None],
        report: Callable[[Effect], None],
        on_crash: Callable[[BaseException], None],
        threads: int = 1,
        observe: Callable[[Event, Sequence[Effect]], None] = lambda event, effects: None,
        on_task: Callable[[int, Task, float, float], None] = lambda task, work, start, end: None,
        small: Callable[[Task], bool] = lambda task: False,
        joined: Joined | None = None,
    ) -> None:
        self.meter = Meter()
        self._machine = machine
        self._compute, self._joined = compute, joined
        self._transmit = transmit
        self._report = report
        self._on_crash = on_crash
        self._observe = observe
        self._on_task = on_task
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._waiting: dict[int, Task] = {}  # for a thread of the pool
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"{name}-task")
        self._small = small if threads == 1 else lambda task: False
        self._pooled: Future[None] | None = None  # the last that was given to the pool
        self._put_off: int | None = None  # a task that this thread does after all other effects
        self._timers: list[tuple[float, int, str]] = []
        self._armed: dict[str, int] = {}
        self._timer_count = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-loop", daemon=True)

    def start(self) -> None:
        """Begin to handle events."""
        self._thread.start()

    def post(self, event: Event) -> None:
        """Queue an event."""
        self._events.put(event)

    def cancel(self, task: int) -> None:
        """Let go of a task that no thread has begun: it ends with TaskFailed."""
        if self._waiting.pop(task, None) is not None:
            self.post(TaskFailed(task, "cancelled"))

    def stop(self) -> None:
        """Stop after the events already queued; waits for the running task."""
        self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        try:
            while True:
                event = self._next()
                if event is None:
                    return
                effects = self._machine.handle(event, time.monotonic())
                self._observe(event, effects)
                for effect in effects:
                    self._interpret(effect)
                if self._put_off is not None:
                    task, self._put_off = self._put_off, None
                    self._perform(task)
        except BaseException as error:
            log.error("%s stopped: %s", self._thread.name, type(error).__name__)
            self._on_crash(error)

    def _next(self) -> Event | None:
        while True:
            while self._timers and self._armed.get(self._timers[0][2]) != self._timers[0][1]:
                heapq.heappop(self._timers)
            wait_s = None
            if self._timers:
                wait_s = self._timers[0][0] - time.monotonic()
                if wait_s <= 0:
                    _, _, timer = heapq.heappop(self._timers)
                    del self._armed[timer]
                    return TimerFired(timer)
            try:
                return self._events.get(timeout=wait_s)
            except queue.Empty:
                continue

    def _interpret(self, effect: Effect) -> None:
        match effect:
            case Send(peer, frame):
                self.meter.frames_sent += 1
                self.meter.bytes_sent += len(frame)
                self._transmit(peer, frame)
            case RunTask(task, work):
                self._waiting[task] = work
                if self._put_off is not None:  # it is not all that there is to do
                    self._give_to_pool(self._put_off)
                    self._put_off = None
                    self._give_to_pool(task)
                elif self._may_run_here(work):
                    self._put_off = task
                else:
                    self._give_to_pool(task)
            case SetTimer(timer, delay_s):
                self._timer_count += 1
                self._armed[timer] = self._timer_count
                due = time.monotonic() + delay_s
                heapq.heappush(self._timers, (due, self._timer_count, timer))
            case CancelTimer(timer):
                self._armed.pop(timer, None)
            case _:
                self._report(effect)

    def _give_to_pool(self, task: int) -> None:
        if self._joined is None:
            self._pooled = self._pool.submit(self._perform, task)
            return
        work = self._waiting.get(task)
        if work is not None:
            self._joined.put(task, work)
            self._pooled = self._pool.submit(self._perform_joined, self._joined)

    def _may_run_here(self, work: Task) -> bool:
        idle = self._events.empty() and (self._pooled is None or self._pooled.done())
        return idle and self._small(work)

    def _perform(self, task: int) -> None:
        work = self._waiting.pop(task, None)
        if work is not None:  # not cancelled
            self._run_tasks([(task, work)], lambda works: [self._compute(works[0])])

    def _perform_joined(self, joined: Joined) -> None:
        while not self._stopped and (taken := joined.take()):
            found = [(task, self._waiting.pop(task, None)) for task in taken]
            tasks = [(task, work) for task, work in found if work is not None]
            try:
                if tasks:
                    self._run_tasks(tasks, joined.compute)
            finally:
                joined.done(taken)

    def _run_tasks(
        self, tasks: list[tuple[int, Task]], compute: Callable[[list[Task]], Sequence[object]]
    ) -> None:
        """Compute and post the ends of tasks that are computed together."""
        start = time.perf_counter()
        try:
            results = compute([work for _, work in tasks])
            if len(results) != len(tasks):
                raise RuntimeError(f"{len(results)} results for {len(tasks)} tasks")
        except WrongAnswerError as error:
            for task, _ in tasks:
                self.post(AnswerRejected(task, str(error)))
        except ValueError as error:
            if len(tasks) > 1:  # one of them is at fault: only that one must hear of it
                for one in tasks:
                    self._run_tasks([one], compute)
                return
            self.post(TaskFailed(tasks[0][0], str(error)))
        except Exception as error:
            name = type(tasks[0][1]).__name__
            for task, _ in tasks:
                self.post(TaskFailed(task, f"{name} failed: {type(error).__name__}"))
            log.error("%s failed: %s", name, _where(error))
        else:
            end = time.perf_counter()
            for (task, work), result in zip(tasks, results, strict=True):
                self.meter.add_task(type(work).__name__, (end - start) / len(tasks))
                self._on_task(task, work, start, end)
                self.post(TaskDone(task, result))
