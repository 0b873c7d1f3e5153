"""The owner's machine when connections end: the worker is greeted again, the same bytes go out."""

from __future__ import annotations

import pytest

from protocol.events import Abort, CancelTimer, Deliver, Send, SetTimer, TaskDone
from protocol.messages import Hello, Multiply, decode
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState, State
from tests.protocol.toys import OwnerDesk, all_of, one, requests

TWO = ("w1", "w2")


def test_a_lost_connection_to_the_only_worker_is_survived() -> None:
    """Greeted over the next connection, and what was on its way goes out again, the same bytes."""
    desk = OwnerDesk().open()
    sent = [one(desk.ask(call), Send) for call in (1, 2)]
    effects = desk.disconnect()
    assert isinstance(decode(one(effects, Send).frame), Hello)
    assert {CancelTimer("call:1"), CancelTimer("call:2")} <= set(effects)
    assert one(effects, SetTimer).timer == "session:w1"
    assert desk.owner.call_state(1) is CallState.WAITING
    assert all_of(desk.welcome(), Send) == sent
    desk.product(2)
    assert desk.do(TaskDone(2, "value")) == [Deliver(2, "value")]


def test_another_worker_takes_over_meanwhile() -> None:
    """Nobody waits for a line to come back while somebody else can do it."""
    desk = OwnerDesk(TWO).open()
    sent = one(desk.ask(1), Send)
    effects = desk.disconnect()
    assert Send("w2", sent.frame) in effects
    assert requests(desk.welcome()) == []


def test_a_hello_lost_with_its_connection_is_sent_again_by_its_timer() -> None:
    """While the line is down each attempt ends like the first; the wait grows."""
    desk = OwnerDesk(config=OwnerConfig(hello_timeout_s=1, attempts_max=5)).open()
    desk.disconnect()
    waits = []
    for _ in range(3):
        assert desk.disconnect() == []
        effects = desk.fire("session:w1")
        assert isinstance(decode(one(effects, Send).frame), Hello)
        waits.append(one(effects, SetTimer).delay_s)
    assert waits == [2.0, 4.0, 8.0]
    assert requests([*desk.welcome(), *desk.ask(1)]) == [("w1", 1)]


def test_a_line_that_does_not_come_back_is_given_up() -> None:
    """Bounded attempts, then there is nobody left."""
    desk = OwnerDesk(config=OwnerConfig(greetings_max=3)).open()
    desk.ask(1)
    desk.disconnect()
    desk.fire("session:w1")
    desk.fire("session:w1")
    assert "no answer" in one(desk.fire("session:w1"), Abort).reason


@pytest.mark.parametrize("answers", [True, False])
def test_connections_that_end_before_an_answer_are_counted(answers: bool) -> None:
    """A worker that welcomes and hangs up each time is lost; an answer in between clears it."""
    desk = OwnerDesk(TWO, OwnerConfig(attempts_max=3, window=1)).open()
    for call in range(1, 12):
        effects = desk.ask(call)
        if requests(effects) != [("w1", call)]:
            break
        if answers:
            desk.product(call)
            desk.do(TaskDone(call, "value"))
        desk.disconnect()
        if desk.owner.state("w1") is not State.GREETING:
            break
        desk.welcome()
        if not answers:
            desk.product(call, peer="w2")
            desk.do(TaskDone(call, "value"))
    assert (call == 11) == answers
    assert (desk.owner.state("w1") is State.READY) == answers
    if not answers:
        assert desk.owner.state("w1") is State.LOST


def test_a_late_answer_of_a_connection_that_ended_is_dropped() -> None:
    """Its request is on its way again; the next answer counts, once."""
    desk = OwnerDesk().open()
    desk.ask(1)
    desk.disconnect()
    assert all_of(desk.product(1), Send) == []
    frames = all_of(desk.welcome(), Send)
    assert isinstance(decode(frames[0].frame), Multiply)
    assert desk.owner.call_state(1) is CallState.IN_FLIGHT
