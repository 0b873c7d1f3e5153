"""The owner's machine: closing in order, and what only a wrong driver does."""

from __future__ import annotations

import pytest

from protocol.errors import MisuseError
from protocol.events import (
    Abort,
    AnswerRejected,
    CancelTimer,
    Closed,
    CloseWanted,
    Discard,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    PeerLost,
    Send,
    Start,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import (
    Bye,
    Farewell,
    decode,
    encode,
)
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState, State
from protocol.placement import Placement
from tests.protocol.toys import (
    CATALOGUE,
    SESSION,
    OwnerDesk,
    all_of,
    one,
    owner_in,
)

TWO = ("w1", "w2")


# --- closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(
    "end",
    [Farewell(SESSION), PeerLost("w1"), TimerFired("session:w1")],
    ids=["farewell", "lost", "silence"],
)
def test_closing_ends_in_exactly_one_closed(state: State, end: Event | Farewell) -> None:
    """From every state, however the worker takes it, and however often it is asked for."""
    desk = owner_in(state, attempts_max=2)
    closing = state in (State.CLOSING, State.CLOSED)
    effects = desk.do(CloseWanted())
    assert bool(effects) is not closing
    effects += desk.hear(Farewell(SESSION), "w2") + desk.do(CloseWanted())
    for _ in range(2):
        if desk.owner.state("w1") is State.CLOSING:
            effects += desk.hear(end) if isinstance(end, Farewell) else desk.do(end)
    effects += desk.hear(Farewell(SESSION)) + desk.lose() + desk.do(CloseWanted())
    assert len(all_of(effects, Closed)) == 1
    assert not all_of(effects, Abort)


def test_closing_twice_is_harmless() -> None:
    """The second wish says nothing more, and does not give the Bye new attempts."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=2)).open()
    assert one(desk.do(CloseWanted()), Send)
    assert desk.do(CloseWanted()) == []
    assert one(desk.fire("session:w1"), Send)
    assert desk.do(CloseWanted()) == []
    assert one(desk.fire("session:w1"), Closed)
    assert desk.do(CloseWanted()) == []


@pytest.mark.parametrize("state", [State.LOST, State.REVIVING, State.RETIRED])
def test_closing_leaves_no_timer_of_a_worker_that_is_gone(state: State) -> None:
    """A lost worker's revival is called off; one that was just greeted is told."""
    effects = owner_in(state).do(CloseWanted())
    told = [decode(send.frame) for send in all_of(effects, Send) if send.peer == "w1"]
    if state is State.REVIVING:
        assert told == [Bye(SESSION)]
    else:
        assert told == []
        assert CancelTimer("session:w1") in effects


@pytest.mark.parametrize("how", ["before", "after"])
def test_an_abort_can_be_closed(how: str) -> None:
    """Once, also when the worker that was left has to be told."""
    config = OwnerConfig(attempts_max=1)
    desk = OwnerDesk(TWO, config, Placement((("w1",), ("w2",)))).open()
    assert one(desk.lose("w1"), Abort)
    effects = desk.do(CloseWanted())
    assert [send.peer for send in all_of(effects, Send)] == ["w2"]
    assert not all_of(effects, Closed)
    effects = desk.lose("w2") if how == "before" else desk.hear(Farewell(SESSION), "w2")
    assert effects == [CancelTimer("session:w2"), Closed()]


def test_close_waits_for_every_worker() -> None:
    """Closed comes after the last Farewell, and a lost Bye is said again."""
    desk = OwnerDesk(TWO).open()
    byes = all_of(desk.do(CloseWanted()), Send)
    assert [decode(bye.frame) for bye in byes] == [Bye(SESSION)] * 2
    assert one(desk.do(TimerFired("session:w2")), Send) == byes[1]
    assert desk.hear(Farewell(SESSION), "w1") == [CancelTimer("session:w1")]
    assert desk.hear(Farewell(SESSION), "w2") == [CancelTimer("session:w2"), Closed()]


def test_a_close_has_attempts_of_its_own() -> None:
    """A greeting that took several leaves none the fewer for the Bye."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=2))
    desk.do(Start())
    desk.do(TimerFired("session:w1"))
    first = one(desk.do(CloseWanted()), Send)
    assert one(desk.do(TimerFired("session:w1")), Send) == first
    assert one(desk.do(TimerFired("session:w1")), Closed)


def test_close_fails_what_is_pending_and_what_comes_later() -> None:
    """Calls in any state end, and results of their tasks go nowhere."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.product(1)
    desk.ask(2)
    desk.ask(3)
    desk.do(LinearWanted(4, 0, 1, (1,)))
    states = [desk.owner.call_state(call) for call in (1, 2, 3, 4)]
    assert states == [
        CallState.DECRYPTING,
        CallState.IN_FLIGHT,
        CallState.WAITING,
        CallState.ENCRYPTING,
    ]
    effects = desk.do(CloseWanted())
    assert [failed.call for failed in all_of(effects, FailCall)] == [1, 2, 3, 4]
    assert all_of(effects, CancelTimer) == [CancelTimer("call:2")]
    # The secrets of call 1 are in the hands of its task still, those of call 4 not drawn yet.
    assert [gone.call for gone in all_of(effects, Discard)] == [2, 3]
    assert one(desk.do(TaskDone(1, "value")), Discard).call == 1
    assert desk.do(TaskFailed(4, "late")) == desk.do(AnswerRejected(1, "late")) == []
    assert one(desk.do(LinearWanted(5, 0, 1, (1,))), FailCall).call == 5


# --- mistakes of the driver ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        LinearWanted(2, 0, 1, (1,)),
        LinearWanted(1, 0, 1, (1,)),
        LinearWanted(3, len(CATALOGUE.matrices), 1, (1,)),
        LinearWanted(3, -1, 1, (1,)),
        TimerFired("call:9"),
        TimerFired("tea"),
        TimerFired("session:w1"),
        TimerFired("session:nobody"),
        PeerLost("nobody"),
        FrameArrived("nobody", encode(Farewell(SESSION))),
        TaskDone(2, "value"),
        AnswerRejected(2, "not one that was answered"),
        Start(),
    ],
    ids=repr,
)
def test_a_driver_that_breaks_the_rules_is_told(event: Event) -> None:
    """Calls that do not increase, timers that are not set, unknown names, a second start."""
    desk = OwnerDesk().open()
    desk.ask(1)
    desk.ask(2)
    with pytest.raises(MisuseError):
        desk.do(event)


def test_a_ciphertext_of_the_wrong_size_is_misuse() -> None:
    """It never reaches the wire."""
    desk = OwnerDesk().open()
    desk.do(LinearWanted(1, 0, 2, (1, 2)))
    with pytest.raises(MisuseError, match="size"):
        desk.do(TaskDone(1, (bytes(7), "sealed")))


@pytest.mark.parametrize("made", [None, bytes(4), [bytes(4), "sealed"], (bytes(4),), (1, 2, 3)])
def test_an_encryption_returns_a_pair(made: object) -> None:
    """Payload and what opens the answer, and nothing else."""
    desk = OwnerDesk().open()
    desk.do(LinearWanted(1, 0, 1, (1,)))
    with pytest.raises(MisuseError, match="payload, sealed"):
        desk.do(TaskDone(1, made))


@pytest.mark.parametrize("peers", [(), ("w1", "w1")])
def test_workers_are_named_once_each(peers: tuple[str, ...]) -> None:
    """An owner without workers, or with one twice, is a mistake found at once."""
    with pytest.raises(MisuseError):
        Owner(SESSION, CATALOGUE, peers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"attempts_max": 0},
        {"refusals_max": 0},
        {"hello_timeout_s": 0.0},
        {"retry_s": 0.0},
        {"revive_s": -1.0},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    """A window of nothing would let every call wait for ever, with no timer running."""
    with pytest.raises(ValueError, match=r"at least 1|positive"):
        OwnerConfig(**wrong)  # type: ignore[arg-type]
