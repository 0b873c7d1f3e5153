"""The simulated driver: order, timers, crashes and jumps of a clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import simpy
from hypothesis import given
from hypothesis import strategies as st

from protocol.events import (
    CancelTimer,
    Closed,
    Effect,
    Encrypt,
    Event,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
    TimerFired,
)
from sim.driver import Actor, TaskEnd


class Script:
    """A machine that answers each event as it was told to, and remembers what it saw."""

    def __init__(self, react: Callable[[Event], list[Effect]] = lambda event: []) -> None:
        self.react = react
        self.seen: list[tuple[float, Event]] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """React to one event."""
        self.seen.append((now, event))
        return self.react(event)


def actor(env: simpy.Environment, machine: Script, **parts: Any) -> Actor:
    """An actor whose frames and tasks go nowhere unless told otherwise."""
    defaults: dict[str, Any] = {"transmit": lambda *_: None, "perform": lambda *_: None}
    return Actor(env, "a", machine, **(defaults | parts))


def test_events_posted_while_one_is_handled_wait_their_turn() -> None:
    """A frame that comes back at once is seen after all effects of the first event."""
    env = simpy.Environment()
    order: list[str] = []
    machine = Script(lambda event: [Send("b", b"1"), Send("b", b"2")] if event == Start() else [])

    def transmit(peer: str, frame: bytes) -> None:
        order.append(f"send {frame.decode()}")
        mine.post(TimerFired(frame.decode()))

    mine = actor(env, machine, transmit=transmit)
    mine.post(Start())
    assert order == ["send 1", "send 2"]
    assert [event for _, event in machine.seen] == [Start(), TimerFired("1"), TimerFired("2")]


def test_other_effects_are_reported_and_everything_is_observed() -> None:
    """The observer sees an event and its effects before any of them is carried out."""
    env = simpy.Environment()
    order: list[object] = []
    machine = Script(lambda event: [Closed()])
    mine = actor(
        env, machine, report=lambda effect: order.append(effect),
        observe=lambda name, now, event, effects: order.append((name, now, event, tuple(effects))),
    )  # fmt: skip
    mine.post(Start())
    assert order == [("a", 0.0, Start(), (Closed(),)), Closed()]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "set", "cancel", "jump"]),
            st.sampled_from("xyz"),
            st.integers(1, 40),
            st.integers(0, 15),
        ),
        max_size=25,
    )
)
def test_timers_against_a_slow_clock(steps: list[tuple[str, str, int, int]]) -> None:
    """Timers set, replaced, cancelled, and moved by jumps fire as a clock of ticks says."""
    env = simpy.Environment()
    told: list[Effect] = []
    rang: list[tuple[float, str]] = []

    def react(event: Event) -> list[Effect]:
        if isinstance(event, TimerFired):
            rang.append((float(env.now), event.timer))
            return []
        return [told.pop()]

    mine = actor(env, Script(react))
    due: dict[str, float] = {}
    expected: list[tuple[float, str]] = []
    now = offset = 0.0

    def pass_time(until: float) -> None:
        """By the book: whole ticks, and whatever is due rings in the order of being due."""
        nonlocal now
        while now < until:
            for timer, at in sorted(due.items(), key=lambda item: item[1]):
                if at - offset <= now:
                    expected.append((now, timer))
                    del due[timer]
            now += 1.0

    for kind, timer, ticks, wait in steps:
        if kind == "set":
            due[timer] = now + offset + ticks
            told.append(SetTimer(timer, float(ticks)))
            mine.post(Start())
        elif kind == "cancel":
            due.pop(timer, None)
            told.append(CancelTimer(timer))
            mine.post(Start())
        else:
            offset += ticks - 20
            mine.jump(float(ticks - 20))
        pass_time(now + wait)
        # Events at exactly this time are still to come, on both sides.
        if wait:
            env.run(until=now)
    pass_time(now + 1000)
    env.run(until=now)
    assert sorted(rang) == sorted(expected)


def test_a_reborn_actor_hears_nothing_of_its_former_life() -> None:
    """Timers and tasks of before are gone; those set since work."""
    env = simpy.Environment()
    ends: list[Callable[[TaskEnd], None]] = []
    effects: list[Effect] = [SetTimer("t", 1.0), RunTask(1, Encrypt(0, 1, None))]
    machine = Script(lambda event: effects if event == Start() else [])
    mine = actor(env, machine, perform=lambda run, done: ends.append(done))
    mine.post(Start())
    second = Script(lambda event: effects if event == Start() else [])
    mine.reborn(second)
    ends[0](TaskDone(1, "old"))
    env.run(until=5.0)
    assert [event for _, event in machine.seen] == [Start()]
    assert second.seen == []
    mine.post(Start())
    ends[1](TaskDone(1, "new"))
    env.run(until=10.0)
    assert [event for _, event in second.seen] == [Start(), TaskDone(1, "new"), TimerFired("t")]


def test_the_same_seed_gives_the_same_history() -> None:
    """A ping-pong with drawn waits, twice."""

    def history(seed: int) -> list[tuple[float, Event]]:
        env, rng = simpy.Environment(), random.Random(seed)
        machine = Script(lambda event: [SetTimer("t", rng.uniform(0.1, 1.0))])
        actor(env, machine).post(Start())
        env.run(until=20.0)
        return machine.seen

    assert history(3) == history(3)
    assert history(3) != history(4)
