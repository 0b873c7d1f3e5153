"""Runs one protocol machine on the simulated clock. Makes no protocol decision.

The counterpart of `backends.net.loop`: events go in one at a time, effects come out and are
handed on. Frames leave through `transmit`, compute tasks through `perform`, everything that is
not about frames, tasks or timers goes to `report`. What the world does to an actor (crash it,
jump its clock) is asked from outside; the machine never knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from protocol.events import (
    AnswerRejected,
    CancelTimer,
    Effect,
    Event,
    Machine,
    RunTask,
    Send,
    SetTimer,
    TaskDone,
    TaskFailed,
    TimerFired,
)

if TYPE_CHECKING:
    import simpy

TaskEnd: TypeAlias = TaskDone | TaskFailed | AnswerRejected


class Observer(Protocol):
    """Sees everything an actor does, before it takes effect."""

    def __call__(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """One event of `actor` at simulated time `now` (seconds), and what it led to."""


def _nobody(actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
    """The observer of a world nobody looks at."""


class Actor:
    """A machine in the simulated world.

    transmit  hands (peer, frame) to the network
    perform   runs a task and calls `done` with its end, at the simulated time it ends
    report    receives every other effect
    """

    def __init__(
        self,
        env: simpy.Environment,
        name: str,
        machine: Machine,
        transmit: Callable[[str, bytes], None],
        perform: Callable[[RunTask, Callable[[TaskEnd], None]], None],
        report: Callable[[Effect], None] = lambda effect: None,
        observe: Observer = _nobody,
    ) -> None:
        self.name = name
        self.machine = machine
        self._env = env
        self._transmit = transmit
        self._perform = perform
        self._report = report
        self._observe = observe
        self._inbox: deque[Event] = deque()
        self._handling = False
        self._life = 0
        self._offset_s = 0.0
        self._deadlines: dict[str, float] = {}
        self._armed = 0
        self._arming: dict[str, int] = {}

    @property
    def clock_s(self) -> float:
        """What the machine believes the time is."""
        return float(self._env.now) + self._offset_s

    def post(self, event: Event) -> None:
        """Hand over one event, now. Events posted meanwhile wait their turn."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._inbox:
                event = self._inbox.popleft()
                effects = self.machine.handle(event, self.clock_s)
                self._observe(self.name, self._env.now, event, effects)
                for effect in effects:
                    self._interpret(effect)
        finally:
            self._handling = False

    def reborn(self, machine: Machine) -> None:
        """A crash with loss of memory: tasks in work, timers and queued events are gone."""
        self.machine = machine
        self._life += 1
        self._inbox.clear()
        self._deadlines.clear()
        self._arming.clear()

    def jump(self, delta_s: float) -> None:
        """The actor's clock jumps: timers fire early (delta_s > 0) or late."""
        self._offset_s += delta_s
        for timer in list(self._deadlines):
            self._arm(timer)

    def _interpret(self, effect: Effect) -> None:
        match effect:
            case Send(peer, frame):
                assert isinstance(frame, bytes)  # no device, hence no LocalFrame, in this world
                self._transmit(peer, frame)
            case RunTask():
                life = self._life
                self._perform(effect, lambda end: self._ended(life, end))
            case SetTimer(timer, delay_s):
                self._deadlines[timer] = self.clock_s + delay_s
                self._arm(timer)
            case CancelTimer(timer):
                self._deadlines.pop(timer, None)
                self._arming.pop(timer, None)
            case _:
                self._report(effect)

    def _ended(self, life: int, end: TaskEnd) -> None:
        if life == self._life:
            self.post(end)

    def _arm(self, timer: str) -> None:
        self._armed += 1
        arming = self._arming[timer] = self._armed
        # SimPy cannot take an event back: a timer that was set again or cancelled runs out unheard.
        event = self._env.timeout(max(0.0, self._deadlines[timer] - self.clock_s))
        event.callbacks.append(lambda _: self._fire(timer, arming))

    def _fire(self, timer: str, arming: int) -> None:
        if self._arming.get(timer) != arming:
            return
        del self._arming[timer], self._deadlines[timer]
        self.post(TimerFired(timer))
