"""The owner's machine when workers refuse: a forgotten session, a session, or a call."""

from __future__ import annotations

from math import inf

import pytest

from protocol.events import (
    Abort,
    CancelTimer,
    Dropped,
    FailCall,
    FrameArrived,
    RunTask,
    Send,
    SetTimer,
    Start,
)
from protocol.messages import VERSION, Reason, Refuse, Welcome, decode, encode
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState, State
from tests.protocol.toys import (
    HELLO,
    MODEL,
    PARAMETERS,
    SESSION,
    OwnerDesk,
    all_of,
    is_dropped,
    one,
    requests,
)

OTHER = Refuse(SESSION, 0, Reason.OTHER_VERSION)
TWO = ("w1", "w2")
FOUR = ("w1", "w2", "w3", "w4")


# --- a worker that forgot -----------------------------------------------------------------------


def test_a_forgotten_session_is_opened_again() -> None:
    """Every call in flight waits for the new Welcome and then goes out with the same bytes."""
    desk = OwnerDesk().open()
    before = [one(desk.ask(call), Send).frame for call in (1, 2)]
    effects = desk.refuse(Reason.NO_SESSION, 2)
    assert decode(one(effects, Send).frame) == HELLO
    assert {c.timer for c in all_of(effects, CancelTimer)} == {"call:1", "call:2"}
    assert all_of(desk.refuse(Reason.NO_SESSION, 1), Dropped)
    assert [send.frame for send in all_of(desk.welcome(), Send)] == before


def test_a_worker_that_always_forgets_is_given_up() -> None:
    """Welcome, forget, welcome, forget ... uses up attempts like any other failure."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=7)).open()
    desk.ask()
    for _ in range(7):
        assert not all_of(desk.refuse(Reason.NO_SESSION), Abort)
        desk.welcome()
    assert all_of(desk.refuse(Reason.NO_SESSION), Abort)
    assert desk.owner.state("w1") is State.LOST


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_forgetting_counts_only_for_a_call_in_flight_at_that_worker(call: int) -> None:
    """A late or misplaced refusal must not end a session that was opened since."""
    desk = OwnerDesk(TWO).open()
    desk.ask(1)
    desk.product(1)
    desk.ask(2)
    desk.ask(3)
    # Call 1 is being decrypted, 2 is in flight at w1, 3 at w2; 0 stands for the session.
    effects = desk.refuse(Reason.NO_SESSION, call, "w1")
    assert is_dropped(effects) == (call != 2)
    assert desk.owner.state("w1") is (State.GREETING if call == 2 else State.READY)
    assert desk.owner.state("w2") is State.READY
    assert desk.owner.call_state(3) is CallState.IN_FLIGHT


# --- refusals of a session ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        (Reason.OTHER_MODEL, "--weights"),
        (Reason.OTHER_PARAMETERS, "--preset"),
        (Reason.OTHER_VERSION, "another protocol version"),
        (Reason.BUSY, "busy with other requests or owners"),
    ],
)
def test_a_refused_session_aborts_with_a_helpful_text(reason: Reason, hint: str) -> None:
    """The text names the worker, what is wrong and what to check."""
    desk = OwnerDesk()
    desk.do(Start())
    effects = desk.refuse(reason, 0)
    assert "'w1'" in one(effects, Abort).reason
    assert hint in one(effects, Abort).reason
    assert CancelTimer("session:w1") in effects


def test_a_worker_that_refused_its_session_is_asked_again_later() -> None:
    """Lost, not retired: somebody may put its weights right. The other serves meanwhile."""
    desk = OwnerDesk(TWO, OwnerConfig(revive_s=60.0))
    desk.do(Start())
    for delay_s in (60.0, 120.0):
        assert desk.refuse(Reason.OTHER_MODEL, 0) == [SetTimer("session:w1", delay_s)]
        assert desk.owner.state("w1") is State.LOST
        assert decode(one(desk.fire("session:w1"), Send).frame) == HELLO
    desk.welcome("w2")
    assert requests(desk.ask(1)) == [("w2", 1)]
    desk.welcome("w1")
    assert requests(desk.ask(2)) == [("w1", 2)]


def test_a_late_refusal_of_the_session_leaves_an_open_one_alone() -> None:
    """The Welcome came first; a duplicate of an older greeting was refused."""
    desk = OwnerDesk().open()
    assert is_dropped(desk.refuse(Reason.BUSY, 0))
    assert requests(desk.ask()) == [("w1", 1)]


def test_a_worker_of_another_version_is_understood() -> None:
    """Its refusal is read under any version; anything else it says is dropped."""
    desk = OwnerDesk(TWO)
    desk.do(Start())
    for message, read in ((Welcome(SESSION, PARAMETERS, MODEL, 64), False), (OTHER, True)):
        frame = encode(message)
        effects = desk.do(FrameArrived("w1", frame[:4] + bytes([VERSION + 1]) + frame[5:]))
        assert is_dropped(effects) is not read
    assert desk.owner.state("w1") is State.LOST


# --- refusals of a call ---------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.FAILED])
def test_a_lone_worker_that_refuses_is_given_time(reason: Reason) -> None:
    """The same bytes after retry_s, which doubles, so a busy worker is not flooded."""
    config = OwnerConfig(retry_s=0.5, timeout_s_max=3.0, refusals_max=6, slow_bytes_per_s=inf)
    desk = OwnerDesk(config=config).open()
    frame = one(desk.ask(), Send).frame
    for delay_s in (0.5, 1.0, 2.0, 3.0, 3.0):
        assert desk.refuse(reason) == [SetTimer("call:1", delay_s)]
        effects = desk.fire("call:1")
        assert effects == [Send("w1", frame), SetTimer("call:1", 3.0)]
    effects = desk.refuse(reason)
    assert "'w1' refused layer.up" in one(effects, FailCall).reason
    assert CancelTimer("call:1") in effects
    assert desk.owner.state("w1") is State.READY


def test_a_busy_worker_is_asked_again_when_it_says() -> None:
    """Not before; no earlier than without a word, and not as late as a liar may like."""
    config = OwnerConfig(retry_s=0.5, timeout_s_max=30.0, slow_bytes_per_s=inf)
    desk = OwnerDesk(config=config).open()
    desk.ask()
    for after_ms, delay_s in ((7250, 7.25), (1, 1.0), ((1 << 32) - 1, 30.0)):
        told = desk.refuse(Reason.BUSY, after_ms=after_ms)
        assert told == [SetTimer("call:1", delay_s)]
        desk.fire("call:1")


def test_a_quota_fails_no_call_while_it_serves_others() -> None:
    """However often one is put off; one that serves nobody is believed `refusals_max` times."""
    desk = OwnerDesk(config=OwnerConfig(refusals_max=3)).open()
    desk.ask(call=1)
    for other in range(2, 12):
        desk.ask(call=other)
        desk.now += 1.0
        assert one(desk.refuse(Reason.BUSY, after_ms=100), SetTimer)
        desk.fire("call:1")
        desk.now += 1.0
        desk.product(other)
    for _ in range(2):
        assert not all_of(desk.refuse(Reason.BUSY, after_ms=100), FailCall)
        desk.fire("call:1")
    assert one(desk.refuse(Reason.BUSY, after_ms=100), FailCall).call == 1


def test_each_other_worker_is_tried_once_at_once_before_anyone_is_given_time() -> None:
    """All four; then, after retry_s, which doubles, one of those that did not refuse last."""
    desk = OwnerDesk(FOUR, OwnerConfig(retry_s=0.5, refusals_max=100)).open()
    frame = one(desk.ask(), Send).frame
    tried = ["w1"]
    while len(tried) < 4:
        effects = desk.refuse(Reason.BUSY, peer=tried[-1])
        assert [effect for effect in effects if not isinstance(effect, SetTimer)] == [
            CancelTimer("call:1"),
            Send(one(effects, Send).peer, frame),
        ]
        tried.append(one(effects, Send).peer)
    assert sorted(tried) == sorted(FOUR)
    for delay_s in (0.5, 1.0, 2.0):
        assert desk.refuse(Reason.BUSY, peer=tried[-1]) == [SetTimer("call:1", delay_s)]
        ((peer, _),) = requests(desk.fire("call:1"))
        assert peer != tried[-1]
        tried.append(peer)


def test_one_that_always_refuses_keeps_no_call_from_one_that_did_once() -> None:
    """Both refused; the honest one is asked again, and the call ends."""
    desk = OwnerDesk(TWO).open()
    desk.ask()
    assert requests(desk.refuse(Reason.BUSY)) == [("w2", 1)]
    desk.refuse(Reason.BUSY, peer="w2")
    assert requests(desk.fire("call:1")) == [("w1", 1)]
    assert all_of(desk.product(peer="w1"), RunTask)


def test_a_full_worker_is_not_tried_instead() -> None:
    """The window holds for a second choice too."""
    desk = OwnerDesk(TWO, OwnerConfig(window=1)).open()
    assert requests(desk.ask(1) + desk.ask(2)) == [("w1", 1), ("w2", 2)]
    assert one(desk.refuse(Reason.BUSY), SetTimer).timer == "call:1"


def test_a_late_answer_ends_the_wait_after_a_refusal() -> None:
    """BUSY may have been said to a duplicate of a request that was in work."""
    desk = OwnerDesk().open()
    desk.ask()
    desk.refuse(Reason.BUSY)
    effects = desk.product()
    assert CancelTimer("call:1") in effects
    assert all_of(effects, RunTask)


def test_refusals_are_no_silence() -> None:
    """A worker that refuses is alive: its attempts start anew."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=2)).open()
    desk.ask()
    for _ in range(4):
        desk.fire("call:1")
        desk.refuse(Reason.FAILED)
        assert desk.owner.state("w1") is State.READY
        desk.fire("call:1")


AGREED = [
    reason for reason in Reason if reason not in (Reason.BUSY, Reason.FAILED, Reason.NO_SESSION)
]


@pytest.mark.parametrize("reason", AGREED)
def test_a_worker_that_refuses_what_it_agreed_to_is_given_up_not_the_call(reason: Reason) -> None:
    """It has the catalogue of the handshake: whatever it says now, the next one gets the bytes."""
    desk = OwnerDesk(TWO, OwnerConfig(window=1)).open()
    sent = one(desk.ask(1), Send)
    effects = desk.refuse(reason)
    assert desk.owner.state("w1") is State.LOST
    assert CancelTimer("call:1") in effects
    assert one(effects, Send) == Send("w2", sent.frame)
    assert not all_of(effects, FailCall)


@pytest.mark.parametrize("reason", AGREED)
def test_the_last_worker_that_refuses_what_it_agreed_to_ends_the_session(reason: Reason) -> None:
    """The text names worker, layer and what it said."""
    desk = OwnerDesk().open()
    desk.ask(1)
    reason_told = one(desk.refuse(reason), Abort).reason
    assert "'w1': it refused layer.up: " in reason_told


def test_workers_that_contradict_themselves_in_turn_do_not_keep_a_call_for_ever() -> None:
    """Revived, agreeing and refusing again: after so many refusals the call fails."""
    desk = OwnerDesk(TWO, OwnerConfig(refusals_max=4)).open()
    desk.ask(1)
    holder, failed = "w1", []
    for _ in range(10):
        effects = desk.refuse(Reason.WRONG_SIZE, 1, holder)
        failed = all_of(effects, FailCall)
        if failed:
            break
        desk.fire(f"session:{holder}")
        desk.welcome(holder)
        holder = "w2" if holder == "w1" else "w1"
    assert "tried 4 times" in failed[0].reason
