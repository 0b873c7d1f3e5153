"""The owner's machine: no sealed handle is forgotten, and none is wiped under a task's hands."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from protocol.events import (
    AnswerRejected,
    CloseWanted,
    Deliver,
    Discard,
    Effect,
    FailCall,
    LinearWanted,
    PeerLost,
    TaskDone,
    TaskFailed,
)
from protocol.messages import Reason
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState
from tests.protocol.toys import OwnerDesk, Sealed, all_of, encrypt

MADE = encrypt((7,), serial=9)
LIVE = [state for state in CallState if state is not CallState.DONE]

# How a call can end early, whatever it is doing; and how a task of it ends afterwards.
ENDS: dict[str, Callable[[OwnerDesk], list[Effect]]] = {
    "close": lambda desk: desk.do(CloseWanted()),
    "no worker left": lambda desk: desk.do(PeerLost("w1")),
    "refused": lambda desk: desk.refuse(Reason.WRONG_SIZE, 2),
    "task failed": lambda desk: desk.do(TaskFailed(2, "toy")),
}
TASK_ENDS = {
    "done": TaskDone(2, MADE),
    "failed": TaskFailed(2, "toy"),
    "found wrong": AnswerRejected(2, "toy"),
}
WORKING = (CallState.ENCRYPTING, CallState.DECRYPTING)


def desk_with(state: CallState) -> OwnerDesk:
    """An owner whose call 2 is in a state, under the secrets of MADE unless it is encrypting."""
    desk = OwnerDesk(config=OwnerConfig(window=1)).open()
    if state is CallState.WAITING:
        desk.ask(1)
    desk.do(LinearWanted(2, 0, 1, (7,)))
    if state is not CallState.ENCRYPTING:
        desk.do(TaskDone(2, MADE))
    if state is CallState.DECRYPTING:
        desk.product(2)
    assert desk.owner.call_state(2) is state
    return desk


def possible(state: CallState, end: str) -> bool:
    """Whether a call in a state can end so: a refusal needs a request, a task its work."""
    if end == "refused":
        return state is CallState.IN_FLIGHT
    return end != "task failed" or state in WORKING


def of_call_2(effects: list[Effect]) -> list[object]:
    return [gone.sealed for gone in all_of(effects, Discard) if gone.call == 2]


@pytest.mark.parametrize(
    ("state", "end", "task_end"),
    [c for c in product(LIVE, ENDS, TASK_ENDS) if possible(c[0], c[1])],
)
def test_a_call_that_fails_gives_up_its_secrets_once(
    state: CallState, end: str, task_end: str
) -> None:
    """At once, or when the task ends that has them; an encryption may still bring them."""
    desk = desk_with(state)
    effects = ENDS[end](desk)
    assert 2 in [failed.call for failed in all_of(effects, FailCall)]
    gone = of_call_2(effects)
    late = state in WORKING and end != "task failed"
    if late:
        assert not gone
        gone = of_call_2(desk.do(TASK_ENDS[task_end]))
    drawn = state is not CallState.ENCRYPTING or (late and task_end == "done")
    assert gone == ([MADE[1]] if drawn else [])
    # Nothing more comes of it, however often the driver speaks of it.
    assert not of_call_2([e for event in TASK_ENDS.values() for e in desk.do(event)])


def test_a_delivered_call_is_not_given_up() -> None:
    """Its secrets were wiped when they opened the answer; a lie leaves them in force."""
    desk = OwnerDesk(("w1", "w2")).open()
    desk.do(LinearWanted(1, 0, 1, (7,)))
    desk.do(TaskDone(1, MADE))
    effects = desk.reject(1)
    desk.product(1, peer="w2")
    effects += desk.do(TaskDone(1, "value"))
    assert all_of(effects, Deliver) == [Deliver(1, "value")]
    assert not all_of(effects, Discard)
    assert not all_of(desk.do(CloseWanted()), Discard)
    assert isinstance(MADE[1], Sealed)
