"""The owner's machine when workers fall silent or are lost: who is asked next, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import pytest

from protocol.events import (
    Abort,
    CancelTimer,
    Discard,
    Effect,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
)
from protocol.messages import (
    Hello,
    Message,
    Multiply,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
)
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.placement import Placement
from tests.protocol.toys import (
    HELLO,
    MODEL,
    PARAMETERS,
    SESSION,
    OwnerDesk,
    all_of,
    compute,
    encrypt,
    is_dropped,
    one,
    requests,
)

TWO = ("w1", "w2")
THREE = ("w1", "w2", "w3")
FOUR = ("w1", "w2", "w3", "w4")
DAY_S = 86_400.0


# --- silence and loss ---------------------------------------------------------------------------


def test_a_lost_workers_calls_go_to_another_with_the_same_bytes() -> None:
    """It waits no longer than any other request that is sent for the first time."""
    config = OwnerConfig(slow_bytes_per_s=inf)
    desk = OwnerDesk(TWO, config).open()
    first = one(desk.ask(1), Send)
    effects = desk.lose()
    assert desk.owner.state("w1") is State.LOST
    assert one(effects, Send) == Send("w2", first.frame)
    assert all_of(effects, SetTimer) == [
        SetTimer("session:w1", config.revive_s),
        SetTimer("call:1", config.request_timeout_s),
    ]
    assert not all_of(effects, Abort)


@pytest.mark.parametrize("how", ["silence", "connection"])
def test_losing_the_last_worker_aborts(how: str) -> None:
    """Every call fails with the Abort's text, and so do later ones; no timer goes on."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=1)).open()
    desk.ask(1)
    desk.do(LinearWanted(2, 0, 1, (1,)))
    effects = desk.fire("call:1") if how == "silence" else desk.lose()
    reason = one(effects, Abort).reason
    assert ("no answer" if how == "silence" else "connection lost") in reason
    assert all_of(effects, FailCall) == [FailCall(1, reason), FailCall(2, reason)]
    assert {timer.timer for timer in all_of(effects, CancelTimer)} == {"call:1", "session:w1"}
    assert desk.do(LinearWanted(3, 0, 1, (1,))) == [FailCall(3, reason)]
    made = encrypt((1,), serial=2)
    assert desk.do(TaskDone(2, made)) == [Discard(2, made[1])]


def test_an_answer_of_a_worker_that_was_given_up_is_dropped() -> None:
    """The call now belongs to another worker, whose answer counts."""
    desk = OwnerDesk(TWO).open()
    desk.ask()
    assert requests(desk.lose("w1")) == [("w2", 1)]
    assert is_dropped(desk.product(peer="w1"))
    assert all_of(desk.product(peer="w2"), RunTask)


def test_a_worker_lost_before_the_start_does_not_stop_the_others() -> None:
    """A transport may fail before the driver starts the machine."""
    desk = OwnerDesk(TWO)
    desk.lose("w2")
    assert decode(one(desk.do(Start()), Send).frame) == Hello(SESSION, PARAMETERS, MODEL)


def test_a_lost_worker_is_greeted_once_now_and_then() -> None:
    """One Hello, the first patience, lost again for twice as long, up to a bound."""
    config = OwnerConfig(revive_s=60.0, revive_s_max=300.0, hello_timeout_s=5.0)
    desk = OwnerDesk(TWO, config).open()
    assert desk.lose("w1") == [SetTimer("session:w1", 60.0)]
    for delay_s in (120.0, 240.0, 300.0, 300.0):
        assert desk.fire("session:w1") == [
            Send("w1", encode(HELLO)),
            SetTimer("session:w1", 5.0),
        ]
        assert desk.owner.state("w1") is State.REVIVING
        assert desk.fire("session:w1") == [SetTimer("session:w1", delay_s)]
        assert desk.owner.state("w1") is State.LOST
    desk.fire("session:w1")
    assert desk.welcome("w1") == [CancelTimer("session:w1")]
    assert [requests(desk.ask(call)) for call in (1, 2)] == [[("w1", 1)], [("w2", 2)]]


def test_a_revived_worker_takes_what_waits() -> None:
    """The only one with room."""
    desk = OwnerDesk(TWO, OwnerConfig(window=1)).open()
    desk.lose("w1")
    assert requests(desk.ask(1) + desk.ask(2)) == [("w2", 1)]
    desk.fire("session:w1")
    assert requests(desk.welcome("w1")) == [("w1", 2)]


def test_a_worker_that_comes_back_has_a_full_set_of_attempts() -> None:
    """Forgetting once after that is forgiven with as many greetings as any other time."""
    desk = OwnerDesk(TWO, OwnerConfig(greetings_max=3)).open()
    desk.lose("w1")
    desk.fire("session:w1")
    desk.welcome("w1")
    desk.ask()
    hellos = len([s for s in all_of(desk.refuse(Reason.NO_SESSION), Send) if s.peer == "w1"])
    while desk.owner.state("w1") is State.GREETING:
        hellos += len([s for s in all_of(desk.fire("session:w1"), Send) if s.peer == "w1"])
    assert hellos == 3


def test_a_worker_that_came_back_is_not_blamed() -> None:
    """The Abort tells why workers are missing now, not what once happened to one."""
    desk = OwnerDesk(TWO, placement=Placement((TWO, ("w2",)))).open()
    desk.lose("w1")
    desk.fire("session:w1")
    desk.welcome("w1")
    assert one(desk.lose("w2"), Abort).reason == "no worker left: 'w2': connection lost"


def test_when_all_are_over_no_timer_is_left() -> None:
    """One retired, one lost, one just greeted again: nobody serves, so nobody is waited for."""
    desk = OwnerDesk(FOUR).open()
    desk.ask()
    desk.reject()
    desk.lose("w3")
    desk.lose("w4")
    desk.fire("session:w4")
    effects = desk.lose("w2")
    assert one(effects, Abort)
    cancelled = {timer.timer for timer in all_of(effects, CancelTimer)}
    assert cancelled == {"call:1", *(f"session:{name}" for name in FOUR)}
    last = [effect for effect in effects if isinstance(effect, SetTimer | CancelTimer)][-4:]
    assert all(isinstance(effect, CancelTimer) for effect in last)


# --- workers that answer too little ---------------------------------------------------------------


def ends_within(
    days: float,
    reply: Callable[[Message], Iterable[Message]],
    desk: OwnerDesk,
    before: Iterable[Effect] = (),
) -> str:
    """A lane asks, and workers answer as `reply` says; what the lane got in the end.

    Timers fire when due, those of the effects `before` among them. Raises AssertionError when
    nothing has ended after so long.
    """
    now_s = 0.0
    timers = {timer.timer: timer.delay_s for timer in all_of(before, SetTimer)}
    inbox: list[Event] = [LinearWanted(1, 0, 1, (7,))]
    while now_s <= days * DAY_S:
        if inbox:
            effects = desk.do(inbox.pop(0))
        else:
            timer = min(timers, key=lambda timer: timers[timer])
            now_s = timers.pop(timer)
            effects = desk.fire(timer)
        for effect in effects:
            match effect:
                case SetTimer(timer, delay_s):
                    timers[timer] = now_s + delay_s
                case CancelTimer(timer):
                    timers.pop(timer, None)
                case Send(peer, frame):
                    inbox += [FrameArrived(peer, encode(m)) for m in reply(decode(frame))]
                case RunTask(task, work):
                    inbox.append(compute(task, work))
                case FailCall(_, reason):
                    return reason
    raise AssertionError(f"still waiting after {days} days")


def test_two_dead_workers_do_not_keep_each_other_waiting() -> None:
    """Lost at different times and greeted in turn, one of them always seems about to serve."""
    # With these waits w1 is being greeted whenever w2 is given up, and the other way round.
    desk = OwnerDesk(TWO, OwnerConfig(hello_timeout_s=90.0, revive_s=50.0)).open()
    assert "no worker left" in ends_within(1.0, lambda message: [], desk, desk.lose("w1"))


def test_a_worker_that_is_just_greeted_again_is_no_reason_to_wait() -> None:
    """It serves once it has answered, and not before."""
    desk = OwnerDesk(TWO).open()
    desk.lose("w1")
    desk.fire("session:w1")
    assert "'w1': connection lost" in one(desk.lose("w2"), Abort).reason


@pytest.mark.parametrize("names", [("w1",), TWO, FOUR], ids=len)
def test_workers_that_greet_but_never_answer_are_found_out(names: tuple[str, ...]) -> None:
    """Lost, revived, asked, lost again ...: a call is tried a bounded number of times."""

    def greets_only(message: Message) -> list[Message]:
        if isinstance(message, Hello):
            return [Welcome(message.session, PARAMETERS, MODEL, 64)]
        return []

    desk = OwnerDesk(names).open()
    reason = ends_within(1.0, greets_only, desk)
    assert ("no worker left" if len(names) == 1 else "no worker answered layer.up") in reason


def test_workers_that_always_forget_are_found_out() -> None:
    """Welcome, forget, welcome, forget ... ends as well."""

    def forgets(message: Message) -> list[Message]:
        if isinstance(message, Hello):
            return [Welcome(message.session, PARAMETERS, MODEL, 64)]
        assert isinstance(message, Multiply)
        return [Refuse(message.session, message.request, Reason.NO_SESSION)]

    assert "no such session" in ends_within(1.0, forgets, OwnerDesk(THREE).open())


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.FAILED])
def test_workers_that_always_refuse_are_found_out(reason: Reason) -> None:
    """A call fails after refusals_max refusals, whoever gave them."""
    asked: list[Message] = []

    def refuses(message: Message) -> list[Message]:
        assert isinstance(message, Multiply)
        asked.append(message)
        return [Refuse(message.session, message.request, reason)]

    desk = OwnerDesk(TWO, OwnerConfig(refusals_max=6)).open()
    assert "refused layer.up" in ends_within(1.0, refuses, desk)
    assert len(asked) == 6
