"""The owner's machine when a worker's answer is wrong: the worker is retired, the call lives on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.events import (
    Abort,
    AnswerRejected,
    CancelTimer,
    CloseWanted,
    Decrypt,
    Deliver,
    Effect,
    FailCall,
    LinearWanted,
    MultiplyCiphertext,
    Retired,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
)
from protocol.messages import (
    Frame,
    Multiply,
    Product,
    Reason,
    decode,
)
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from tests.protocol.toys import (
    SESSION,
    OwnerDesk,
    all_of,
    clear,
    compute,
    encrypt,
    is_dropped,
    multiply,
    one,
    requests,
)

TWO = ("w1", "w2")
FOUR = ("w1", "w2", "w3", "w4")


def test_a_worker_whose_answer_is_wrong_is_retired_and_its_call_goes_on() -> None:
    """The same bytes to the next worker, whose answer opens with the same secrets."""
    desk = OwnerDesk(TWO).open()
    sent = one(desk.ask(), Send)
    sealed = encrypt((7,), serial=1)[1]
    desk.product()
    effects = desk.do(AnswerRejected(1, "layer.up: not the product"))
    assert effects[0] == Retired("w1", "layer.up: not the product")
    assert one(effects, Send) == Send("w2", sent.frame)
    assert one(effects, SetTimer).timer == "call:1"
    assert desk.owner.state("w1") is State.RETIRED
    assert one(desk.product(peer="w2"), RunTask).work == Decrypt(0, 1, sealed, bytes(8))
    assert desk.do(TaskDone(1, "value")) == [Deliver(1, "value")]


def test_a_retired_worker_is_never_asked_again() -> None:
    """Not for calls in flight, waiting or new; not after silence, loss or a Welcome of its own."""
    desk = OwnerDesk(TWO, OwnerConfig(window=2)).open()
    for call in (1, 2, 3, 4, 5):
        desk.ask(call)
    effects = desk.reject(1)
    # Of its two calls one was found out, the other in flight; call 2 and 4 fill w2's window.
    assert requests(effects) == []
    assert CancelTimer("call:3") in effects
    assert desk.lose("w1") == []
    assert is_dropped(desk.welcome("w1"))
    assert is_dropped(desk.product(3))
    effects = desk.product(2, peer="w2") + desk.product(4, peer="w2") + desk.ask(6)
    assert requests(effects) == [("w2", 1), ("w2", 3)]


def test_a_liars_other_answer_is_still_checked_and_counts() -> None:
    """It was on its way to decryption when the lie was found; the worker is retired once."""
    desk = OwnerDesk(TWO).open()
    for call in (1, 2, 3, 4, 5):
        desk.ask(call)
    for call in (1, 3, 5):
        desk.product(call)
    assert all_of(desk.do(AnswerRejected(1, "a lie")), Retired)
    assert desk.do(TaskDone(3, "value")) == [Deliver(3, "value")]
    effects = desk.do(AnswerRejected(5, "another lie"))
    assert requests(effects) == [("w2", 5)]
    assert not all_of(effects, Retired)


@pytest.mark.parametrize("meanwhile", [State.GREETING, State.LOST, State.REVIVING])
def test_a_lie_found_late_retires_the_worker_whatever_its_state(meanwhile: State) -> None:
    """It may have forgotten or fallen silent since; no timer of it is left."""
    desk = OwnerDesk(TWO, OwnerConfig(window=2)).open()
    for call in (1, 2, 3):
        desk.ask(call)
    desk.product(1)
    if meanwhile is State.GREETING:
        desk.refuse(Reason.NO_SESSION, 3)
    else:
        desk.lose()
    if meanwhile is State.REVIVING:
        desk.fire("session:w1")
    assert desk.owner.state("w1") is meanwhile
    effects = desk.do(AnswerRejected(1, "a lie"))
    assert desk.owner.state("w1") is State.RETIRED
    assert CancelTimer("session:w1") in effects


def test_the_last_honest_worker_gone_the_abort_names_the_liars() -> None:
    """Each with what was found; the rejected call fails with the others."""
    desk = OwnerDesk(TWO).open()
    desk.ask()
    desk.reject(1)
    effects = desk.reject(1, peer="w2")
    reason = one(effects, Abort).reason
    assert "w1 lied" in reason
    assert "w2 lied" in reason
    assert all_of(effects, FailCall) == [FailCall(1, reason)]


def test_a_worker_retired_in_an_earlier_session_is_never_spoken_to() -> None:
    """No Hello, no request, whatever it sends; the others serve; a stranger's name is no matter."""
    desk = OwnerDesk(TWO, retired={"w1": "lied before", "w9": "another run's"})
    assert desk.owner.state("w1") is State.RETIRED
    assert {send.peer for send in all_of(desk.do(Start()), Send)} == {"w2"}
    assert is_dropped(desk.welcome("w1"))
    desk.welcome("w2")
    assert requests([*desk.ask(1), *desk.ask(2)]) == [("w2", 1), ("w2", 2)]
    assert desk.lose("w1") == []
    assert not [e for e in desk.do(CloseWanted()) if isinstance(e, Send) and e.peer == "w1"]


def test_with_none_but_retired_workers_the_session_ends_at_once() -> None:
    """The reason names what each was found to have done; calls fail with it."""
    desk = OwnerDesk(TWO, retired={"w1": "lied on Monday", "w2": "lied on Tuesday"})
    reason = one(desk.do(Start()), Abort).reason
    assert "lied on Monday" in reason
    assert "lied on Tuesday" in reason
    assert one(desk.do(LinearWanted(1, 0, 1, (7,))), FailCall).reason == reason


def test_a_loss_of_the_last_worker_not_retired_before_ends_the_session() -> None:
    """One that an earlier session retired is nobody to wait for."""
    desk = OwnerDesk(TWO, retired={"w1": "lied before"}).open()
    desk.ask()
    assert "lied before" in one(desk.lose("w2"), Abort).reason


Mishap = Callable[[OwnerDesk, str], list[Effect]]
MISHAPS: dict[str, Mishap] = {
    "loss": lambda desk, peer: desk.lose(peer),
    "silence": lambda desk, peer: desk.fire("call:1"),
    "busy": lambda desk, peer: desk.refuse(Reason.BUSY, 1, peer),
    "failure": lambda desk, peer: desk.refuse(Reason.FAILED, 1, peer),
    "disconnection": lambda desk, peer: desk.disconnect(peer),
    "contradiction": lambda desk, peer: desk.refuse(Reason.WRONG_SIZE, 1, peer),
    "forgetting": lambda desk, peer: desk.refuse(Reason.NO_SESSION, 1, peer),
}


def asked_of(effects: list[Effect]) -> set[Frame]:
    """The frames of requests among what is sent."""
    frames = {send.frame for send in all_of(effects, Send)}
    return {frame for frame in frames if isinstance(decode(frame), Multiply)}


@settings(deadline=None)
@given(st.lists(st.sampled_from([*MISHAPS, "lie"]), max_size=14))
def test_whatever_happens_to_a_call_its_bytes_never_change(mishaps: list[str]) -> None:
    """One frame, to whichever worker and however often; at last the right value, or an Abort."""
    desk = OwnerDesk(FOUR, OwnerConfig(attempts_max=3, refusals_max=100)).open()
    x = (7, 11)
    effects = desk.ask(1, 0, x)
    frames = asked_of(effects)
    holder, liars = "w1", set()
    for mishap in mishaps:
        if mishap == "lie":
            liars.add(holder)
            desk.product(1, tokens=2, peer=holder)
            effects = desk.do(AnswerRejected(1, "a lie"))
        else:
            effects = MISHAPS[mishap](desk, holder)
        while not requests(effects):
            if all_of(effects, Abort):
                assert all_of(effects, FailCall)
                return
            greeted = [name for name in FOUR if desk.owner.state(name) is State.GREETING]
            effects = desk.welcome(greeted[0]) if greeted else desk.fire("call:1")
        frames |= asked_of(effects)
        ((holder, _),) = requests(effects)
        assert holder not in liars
    (frame,) = frames
    asked = decode(frame)
    assert isinstance(asked, Multiply)
    answer = multiply(MultiplyCiphertext(0, 2, asked.payload))
    run = one(desk.hear(Product(SESSION, 1, answer), holder), RunTask)
    assert desk.do(compute(1, run.work)) == [Deliver(1, clear(0, x))]
