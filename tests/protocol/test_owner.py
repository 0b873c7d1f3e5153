"""The owner's machine, rule by rule; the test plays the driver and the workers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol.errors import MisuseError
from protocol.events import (
    Abort,
    CancelTimer,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Dropped,
    Effect,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    PeerLost,
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
    Hello,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
)
from protocol.owner import Owner, OwnerConfig
from protocol.owner_tables import CallState, State
from tests.protocol.toys import (
    CATALOGUE,
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
)

TWO = ("w1", "w2")


def requests(effects: list[Effect]) -> list[tuple[str, int]]:
    """(worker, call) of every request sent, in order."""
    found = []
    for send in all_of(effects, Send):
        message = decode(send.frame)
        if isinstance(message, Multiply):
            found.append((send.peer, message.request))
    return found


# --- sessions ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        (Reason.OTHER_MODEL, "--weights"),
        (Reason.OTHER_PARAMETERS, "--preset"),
        (Reason.BUSY, "too many owners"),
    ],
)
def test_a_refused_session_aborts_with_a_helpful_text(reason: Reason, hint: str) -> None:
    """The text names the worker, what is wrong and what to check."""
    desk = OwnerDesk()
    desk.do(Start())
    effects = desk.hear(Refuse(SESSION, 0, reason))
    assert "'w1'" in one(effects, Abort).reason
    assert hint in one(effects, Abort).reason
    assert CancelTimer("session:w1") in effects


def test_one_refusing_worker_of_two_aborts_nothing() -> None:
    """The other worker serves the calls."""
    desk = OwnerDesk(TWO)
    desk.do(Start())
    assert not all_of(desk.hear(Refuse(SESSION, 0, Reason.OTHER_MODEL)), Abort)
    desk.welcome("w2")
    assert requests(desk.ask()) == [("w2", 1)]


def test_a_silent_worker_is_greeted_a_bounded_number_of_times() -> None:
    """The same Hello, each time with more patience, then an Abort that says no answer came."""
    config = OwnerConfig(hello_timeout_s=1.0, timeout_s_max=3.0, attempts_max=4)
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


def test_a_forgotten_session_is_opened_again() -> None:
    """Every call in flight waits for the new Welcome and then goes out with the same bytes."""
    desk = OwnerDesk().open()
    before = [one(desk.ask(call), Send).frame for call in (1, 2)]
    effects = desk.hear(Refuse(SESSION, 2, Reason.NO_SESSION))
    assert decode(one(effects, Send).frame) == HELLO
    assert {c.timer for c in all_of(effects, CancelTimer)} == {"call:1", "call:2"}
    assert all_of(desk.hear(Refuse(SESSION, 1, Reason.NO_SESSION)), Dropped)
    assert [send.frame for send in all_of(desk.welcome(), Send)] == before


# --- calls ------------------------------------------------------------------------------------


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
    config = OwnerConfig(request_timeout_s=1.0, timeout_s_max=5.0, attempts_max=5)
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


def test_a_lost_workers_calls_go_to_another_with_the_same_bytes() -> None:
    """Attempts used up on one worker: it is lost, and the next one gets a full set of attempts."""
    desk = OwnerDesk(TWO, OwnerConfig(attempts_max=2)).open()
    first = one(desk.ask(1), Send)
    desk.do(TimerFired("call:1"))
    effects = desk.do(TimerFired("call:1"))
    assert desk.owner.state("w1") is State.LOST
    assert one(effects, Send) == Send("w2", first.frame)
    assert one(effects, SetTimer).delay_s == OwnerConfig().request_timeout_s
    assert not all_of(effects, Abort)


@pytest.mark.parametrize("how", ["silence", "connection"])
def test_losing_the_last_worker_aborts(how: str) -> None:
    """Every call fails with the Abort's text, and so do later ones."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=1)).open()
    desk.ask(1)
    desk.do(LinearWanted(2, 0, 1, (1,)))
    effects = desk.do(TimerFired("call:1") if how == "silence" else PeerLost("w1"))
    reason = one(effects, Abort).reason
    assert ("no answer" if how == "silence" else "connection lost") in reason
    assert all_of(effects, FailCall) == [FailCall(1, reason), FailCall(2, reason)]
    assert CancelTimer("call:1") in effects
    assert desk.do(LinearWanted(3, 0, 1, (1,))) == [FailCall(3, reason)]
    assert desk.do(TaskDone(2, encrypt((1,), serial=2))) == []


def test_duplicate_and_late_answers_are_dropped() -> None:
    """The first acceptable answer counts, before and after it is delivered."""
    desk = OwnerDesk().open()
    desk.ask()
    desk.product()
    assert is_dropped(desk.product())
    desk.do(TaskDone(1, "value"))
    assert is_dropped(desk.product())


def test_an_answer_of_a_worker_that_was_given_up_is_dropped() -> None:
    """The call now belongs to another worker, whose answer counts."""
    desk = OwnerDesk(TWO).open()
    desk.ask()
    assert requests(desk.do(PeerLost("w1"))) == [("w2", 1)]
    assert is_dropped(desk.product(peer="w1"))
    assert all_of(desk.product(peer="w2"), RunTask)


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


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.FAILED])
def test_a_passing_refusal_is_retried_when_the_timer_fires(reason: Reason) -> None:
    """Nothing at once, so a busy worker is not flooded; then the same bytes."""
    desk = OwnerDesk().open()
    frame = one(desk.ask(), Send).frame
    assert desk.hear(Refuse(SESSION, 1, reason)) == []
    assert one(desk.do(TimerFired("call:1")), Send).frame == frame


@pytest.mark.parametrize(
    "reason", [Reason.UNKNOWN_MATRIX, Reason.WRONG_SIZE, Reason.TOO_MANY_TOKENS]
)
def test_a_final_refusal_fails_its_call_only(reason: Reason) -> None:
    """The text names worker and layer; the freed place in the window is used at once."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.ask(2)
    effects = desk.hear(Refuse(SESSION, 1, reason))
    assert "'w1' refused layer.up" in one(effects, FailCall).reason
    assert CancelTimer("call:1") in effects
    assert requests(effects) == [("w1", 2)]


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
    desk.do(TaskDone(2, encrypt((2,), serial=2)))
    desk.product(2)
    assert desk.do(TaskFailed(2, "failed check")) == [FailCall(2, "failed check")]
    assert requests(desk.do(TaskDone(3, encrypt((3,), serial=3)))) == [("w1", 3)]


def test_a_failed_decryption_frees_its_place_in_the_window() -> None:
    """The next call does not wait for a place that nobody holds."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.ask(2)
    effects = desk.product(1) + desk.do(TaskFailed(1, "failed check"))
    assert requests(effects) == [("w1", 2)]


# --- closing ----------------------------------------------------------------------------------


def _closing(desk: OwnerDesk) -> None:
    desk.open().do(CloseWanted())


def _lost(desk: OwnerDesk) -> None:
    desk.open().do(PeerLost("w1"))


@pytest.mark.parametrize(
    ("reach", "state"),
    [
        (lambda desk: None, State.NEW),
        (lambda desk: desk.do(Start()), State.GREETING),
        (lambda desk: desk.open(), State.READY),
        (_closing, State.CLOSING),
        (_lost, State.LOST),
    ],
    ids=lambda value: value.name if isinstance(value, State) else "",
)
@pytest.mark.parametrize(
    "end",
    [Farewell(SESSION), PeerLost("w1"), TimerFired("session:w1")],
    ids=["farewell", "lost", "silence"],
)
def test_closing_ends_in_exactly_one_closed(
    reach: Callable[[OwnerDesk], object], state: State, end: Event | Farewell
) -> None:
    """From every state, however the worker takes it, and however often it is asked for."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=2))
    reach(desk)
    assert desk.owner.state("w1") is state
    effects = desk.do(CloseWanted()) + desk.do(CloseWanted())
    for _ in range(2):
        if desk.owner.state("w1") is State.CLOSING:
            effects += desk.hear(end) if isinstance(end, Farewell) else desk.do(end)
    effects += desk.hear(Farewell(SESSION)) + desk.do(PeerLost("w1")) + desk.do(CloseWanted())
    assert len(all_of(effects, Closed)) == 1
    assert not all_of(effects, Abort)


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
    assert desk.do(TaskDone(1, "value")) == desk.do(TaskFailed(4, "late")) == []
    assert one(desk.do(LinearWanted(5, 0, 1, (1,))), FailCall).call == 5


# --- mistakes of the driver -------------------------------------------------------------------


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


@pytest.mark.parametrize("peers", [(), ("w1", "w1")])
def test_workers_are_named_once_each(peers: tuple[str, ...]) -> None:
    """An owner without workers, or with one twice, is a mistake found at once."""
    with pytest.raises(MisuseError):
        Owner(SESSION, CATALOGUE, peers)


# --- known faults: each turns into a plain test when it is mended ---------------------------------


def test_a_worker_that_always_forgets_is_given_up() -> None:
    """Welcome, forget, welcome, forget ... uses up attempts like any other failure."""
    desk = OwnerDesk().open()
    desk.ask()
    for _ in range(100):
        if all_of(desk.hear(Refuse(SESSION, 1, Reason.NO_SESSION)), Abort):
            break
        desk.welcome()
    assert desk.owner.state("w1") is State.LOST


def test_a_worker_lost_before_the_start_does_not_stop_the_others() -> None:
    """A transport may fail before the driver starts the machine."""
    desk = OwnerDesk(TWO)
    desk.do(PeerLost("w2"))
    assert decode(one(desk.do(Start()), Send).frame) == Hello(SESSION, PARAMETERS, MODEL)


def test_a_large_call_goes_to_the_worker_that_takes_it() -> None:
    """A worker with a small limit does not fail a call that another one would serve."""
    desk = OwnerDesk(TWO)
    desk.do(Start())
    desk.welcome("w1", max_tokens=1)
    desk.welcome("w2", max_tokens=2)
    assert requests(desk.ask(1, x=(1, 2))) == [("w2", 1)]


def test_an_answer_frees_its_place_in_the_window() -> None:
    """The next request leaves while the answer is being decrypted, not after."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    desk.ask(1)
    desk.ask(2)
    assert requests(desk.product(1)) == [("w1", 2)]


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"attempts_max": 0}, {"hello_timeout_s": 0.0}], ids=str
)
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    """A window of nothing would let every call wait for ever, with no timer running."""
    with pytest.raises(ValueError, match=r"window|attempts|timeout"):
        OwnerConfig(**wrong)  # type: ignore[arg-type]
