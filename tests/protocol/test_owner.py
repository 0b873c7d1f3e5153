"""The owner's machine, rule by rule; the test plays the driver and the workers."""

from __future__ import annotations

from math import inf

import pytest

from protocol.events import (
    Abort,
    CancelTimer,
    Decrypt,
    Deliver,
    Discard,
    Dropped,
    FailCall,
    FrameArrived,
    LinearWanted,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import (
    Bye,
    Farewell,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
)
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState, State
from tests.protocol.toys import (
    HELLO,
    MODEL,
    OTHER_SESSION,
    PARAMETERS,
    SESSION,
    STRANGE,
    OwnerDesk,
    all_of,
    encrypt,
    is_dropped,
    one,
    requests,
)

TWO = ("w1", "w2")


# --- sessions -----------------------------------------------------------------------------------


def test_start_greets_every_worker() -> None:
    """Each worker gets a Hello that pins session, model and parameters, and each wait a timer."""
    effects = OwnerDesk(TWO).do(Start())
    assert [(s.peer, decode(s.frame)) for s in all_of(effects, Send)] == [
        ("w1", HELLO),
        ("w2", HELLO),
    ]
    assert [t.timer for t in all_of(effects, SetTimer)] == ["session:w1", "session:w2"]


def test_a_welcome_makes_a_worker_ready() -> None:
    """The greeting's timer is cancelled; a second Welcome changes nothing."""
    desk = OwnerDesk()
    desk.do(Start())
    assert desk.welcome() == [CancelTimer("session:w1")]
    assert desk.owner.state("w1") is State.READY
    assert all_of(desk.welcome(), Dropped)


@pytest.mark.parametrize("digests", [(STRANGE, MODEL), (PARAMETERS, STRANGE)])
def test_a_welcome_to_something_else_is_dropped(digests: tuple[bytes, bytes]) -> None:
    """A worker cannot talk the owner into another model or parameter set."""
    desk = OwnerDesk()
    desk.do(Start())
    assert one(desk.hear(Welcome(SESSION, *digests, 64)), Dropped)
    assert desk.owner.state("w1") is State.GREETING


def test_a_silent_worker_is_greeted_a_bounded_number_of_times() -> None:
    """The same Hello, each time with more patience, then an Abort that says no answer came."""
    config = OwnerConfig(hello_timeout_s=1.0, timeout_s_max=3.0, greetings_max=4)
    desk = OwnerDesk(config=config)
    effects = desk.do(Start())
    frames: list[bytes] = []
    delays: list[float] = []
    while (sends := all_of(effects, Send)) and len(frames) < 9:
        frames.append(sends[0].frame)
        delays.append(one(effects, SetTimer).delay_s)
        effects = desk.do(TimerFired("session:w1"))
    assert frames == [encode(HELLO)] * 4
    assert delays == [1.0, 2.0, 3.0, 3.0]
    assert "no answer" in one(effects, Abort).reason


# --- calls --------------------------------------------------------------------------------------


def test_request_and_answer() -> None:
    """Encrypt, send, decrypt, deliver; the sealed handle comes back with the answer."""
    desk = OwnerDesk().open()
    x = (7, 9)
    payload, sealed = encrypt(x, serial=1)
    effects = desk.ask(1, 0, x)
    assert decode(one(effects, Send).frame) == Multiply(SESSION, 1, 0, 2, payload)
    assert one(effects, SetTimer).timer == "call:1"
    effects = desk.product(1, tokens=2)
    assert effects == [CancelTimer("call:1"), RunTask(1, Decrypt(0, 2, sealed, bytes(16)))]
    assert desk.do(TaskDone(1, "value")) == [Deliver(1, "value")]
    assert desk.owner.call_state(1) is CallState.DONE


def test_calls_made_before_a_worker_is_ready_wait() -> None:
    """Encryption does not wait for the greeting; sending does."""
    desk = OwnerDesk()
    desk.do(Start())
    assert desk.ask(1) == []
    assert requests(desk.welcome()) == [("w1", 1)]


def test_a_retry_sends_the_same_bytes_with_growing_patience() -> None:
    """Time-outs double up to timeout_s_max, and the frame never changes."""
    config = OwnerConfig(
        request_timeout_s=1.0, timeout_s_max=5.0, attempts_max=5, slow_bytes_per_s=inf
    )
    desk = OwnerDesk(config=config).open()
    effects = desk.ask()
    frames: list[bytes] = []
    delays: list[float] = []
    while (sends := all_of(effects, Send)) and len(frames) < 9:
        frames.append(sends[0].frame)
        delays.append(one(effects, SetTimer).delay_s)
        effects = desk.do(TimerFired("call:1"))
    assert len(set(frames)) == 1
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_duplicate_and_late_answers_are_dropped() -> None:
    """The first acceptable answer counts, before and after it is delivered."""
    desk = OwnerDesk().open()
    desk.ask()
    desk.product()
    assert is_dropped(desk.product())
    desk.do(TaskDone(1, "value"))
    assert is_dropped(desk.product())


def test_an_answer_from_a_worker_that_was_not_asked_is_dropped() -> None:
    """One worker cannot answer for another."""
    desk = OwnerDesk(TWO).open()
    assert requests(desk.ask()) == [("w1", 1)]
    assert is_dropped(desk.product(peer="w2"))
    assert is_dropped(desk.hear(Refuse(SESSION, 1, Reason.WRONG_SIZE), "w2"))
    assert desk.owner.call_state(1) is CallState.IN_FLIGHT


@pytest.mark.parametrize(
    "frame",
    [
        encode(Product(SESSION, 1, bytes(7))),
        encode(Product(SESSION, 1, bytes(9))),
        encode(Product(SESSION, 1, b"")),
        encode(Product(OTHER_SESSION, 1, bytes(8))),
        encode(Product(SESSION, 2, bytes(8))),
        encode(Product(SESSION, 0, bytes(8))),
        encode(Product(SESSION, 1, bytes(8)))[:-1],
        encode(Refuse(OTHER_SESSION, 1, Reason.NO_SESSION)),
        encode(Refuse(SESSION, 2, Reason.WRONG_SIZE)),
        encode(HELLO),
        encode(Multiply(SESSION, 1, 0, 1, bytes(4))),
        encode(Bye(SESSION)),
        encode(Farewell(SESSION)),
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 3,
    ],
    ids=lambda frame: f"{len(frame)} bytes",
)
def test_misplaced_frames_change_nothing(frame: bytes) -> None:
    """Wrong size, session, call, kind or shape: dropped, and the right answer still counts."""
    desk = OwnerDesk().open()
    desk.ask()
    assert is_dropped(desk.do(FrameArrived("w1", frame)))
    assert desk.owner.state("w1") is State.READY
    assert all_of(desk.product(), RunTask)


def test_too_many_tokens_fail_the_call_before_it_is_sent() -> None:
    """The text gives both numbers and says what to do; the next call goes out."""
    desk = OwnerDesk()
    desk.do(Start())
    desk.ask(1, x=(1, 2, 3))
    desk.ask(2, x=(1, 2))
    effects = desk.welcome(max_tokens=2)
    reason = one(effects, FailCall).reason
    assert "3 tokens" in reason
    assert "at most 2" in reason
    assert "smaller micro-batches" in reason
    assert requests(effects) == [("w1", 2)]


def test_the_window_bounds_requests_in_flight_first_come_first_sent() -> None:
    """Two at a time, oldest first, a new one for each that ends."""
    desk = OwnerDesk(config=OwnerConfig(window=2)).open()
    assert [requests(desk.ask(call)) for call in (1, 2, 3, 4)] == [
        [("w1", 1)],
        [("w1", 2)],
        [],
        [],
    ]
    for answered, following in ((2, 3), (1, 4)):
        effects = desk.product(answered) + desk.do(TaskDone(answered, "value"))
        assert requests(effects) == [("w1", following)]


def test_calls_spread_over_the_least_loaded_workers() -> None:
    """The first of equals, then the other."""
    desk = OwnerDesk(TWO, OwnerConfig(window=2)).open()
    sent = [peer for call in range(1, 6) for peer, _ in requests(desk.ask(call))]
    assert sent == ["w1", "w2", "w1", "w2"]


def test_a_failed_task_fails_only_its_call() -> None:
    """Whether encryption or decryption failed; the reason reaches the lane, not the wire."""
    desk = OwnerDesk().open()
    for call in (1, 2, 3):
        desk.do(LinearWanted(call, 0, 1, (call,)))
    assert desk.do(TaskFailed(1, "non-finite input")) == [FailCall(1, "non-finite input")]
    made = encrypt((2,), serial=2)
    desk.do(TaskDone(2, made))
    desk.product(2)
    effects = desk.do(TaskFailed(2, "failed check"))
    assert effects == [FailCall(2, "failed check"), Discard(2, made[1])]
    assert requests(desk.do(TaskDone(3, encrypt((3,), serial=3)))) == [("w1", 3)]


def test_a_failed_decryption_frees_its_place_in_the_window() -> None:
    """The next call does not wait for a place that nobody holds."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.ask(2)
    effects = desk.product(1) + desk.do(TaskFailed(1, "failed check"))
    assert requests(effects) == [("w1", 2)]


def test_a_large_call_goes_to_the_worker_that_takes_it() -> None:
    """A worker with a small limit does not fail a call that another one would serve."""
    desk = OwnerDesk(TWO)
    desk.do(Start())
    desk.welcome("w1", max_tokens=1)
    desk.welcome("w2", max_tokens=2)
    assert requests(desk.ask(1, x=(1, 2))) == [("w2", 1)]


def test_a_large_call_waits_for_a_worker_that_is_still_greeted() -> None:
    """It fails only when nobody is left to come who could take it."""
    for welcomed in (True, False):
        desk = OwnerDesk(TWO)
        desk.do(Start())
        desk.welcome("w1", max_tokens=1)
        assert desk.ask(1, x=(1, 2)) == []
        if welcomed:
            assert requests(desk.welcome("w2", max_tokens=2)) == [("w2", 1)]
        else:
            assert "at most 1" in one(desk.lose("w2"), FailCall).reason


def test_an_answer_frees_its_place_in_the_window() -> None:
    """The next request leaves while the answer is being decrypted, not after."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.ask(2)
    assert requests(desk.product(1)) == [("w1", 2)]
