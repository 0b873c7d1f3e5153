"""The transition tables are complete, reachable and what the machines do and the page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from itertools import product
from typing import Any, TypeAlias

import pytest

from docs import generate_protocol
from protocol.errors import MisuseError
from protocol.events import (
    CloseWanted,
    Effect,
    PeerLost,
    RunTask,
    Send,
    Start,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import Bye, Farewell, Hello, Product, Reason, Refuse
from protocol.owner import OwnerConfig, _Call
from protocol.owner_tables import CALLS, SESSIONS, CallInput, CallState, Input, State
from protocol.worker import TRANSITIONS
from protocol.worker import Input as WorkerInput
from protocol.worker import State as WorkerState
from tests.protocol.toys import (
    HELLO,
    MODEL,
    OTHER_SESSION,
    SESSION,
    STRANGE,
    OwnerDesk,
    WorkerDesk,
    all_of,
    is_dropped,
    one,
)

# Keys of a mapping are invariant, so a table of one machine's enums is not one of Enum's.
Edges: TypeAlias = Mapping[Any, Enum]
Rows: TypeAlias = Mapping[Any, tuple[Enum, str]]


def reachable(start: Enum, edges: Edges) -> set[Enum]:
    """States that some row leads to, from the first one on."""
    found, fresh = {start}, {start}
    while fresh:
        fresh = {following for (state, _), following in edges.items() if state in fresh} - found
        found |= fresh
    return found


def exits(state: Enum, edges: Edges) -> set[Enum]:
    """Other states that a state's rows lead to."""
    return {after for (before, _), after in edges.items() if before is state} - {state}


def edges_of(rows: Rows) -> Edges:
    """The rows without their actions."""
    return {pair: following for pair, (following, _) in rows.items()}


def actions_of(rows: Rows) -> set[str]:
    """The actions the rows name."""
    return {action for _, action in rows.values()}


# --- the tables in themselves -----------------------------------------------------------------


def test_every_state_is_reachable() -> None:
    """No row is about a state that cannot be."""
    assert reachable(State.NEW, edges_of(SESSIONS)) == set(State)
    assert reachable(CallState.ENCRYPTING, CALLS) == set(CallState)
    assert reachable(WorkerState.ABSENT, edges_of(TRANSITIONS)) == set(WorkerState)


def test_every_input_is_used() -> None:
    """No input exists that every state forbids."""
    assert {kind for _, kind in SESSIONS} == set(Input)
    assert {kind for _, kind in CALLS} == set(CallInput)
    assert {kind for _, kind in TRANSITIONS} == set(WorkerInput)


def test_every_action_is_known_and_used() -> None:
    """A row names a method, and no method waits for a row."""
    assert actions_of(SESSIONS) == set(OwnerDesk().owner._actions)
    assert actions_of(TRANSITIONS) == set(WorkerDesk().worker._actions)


def test_the_end_is_the_end() -> None:
    """A closed or lost session and a call that is done go nowhere; all else has a way out."""
    ends = {state for state in State if not exits(state, edges_of(SESSIONS))}
    assert ends == {State.CLOSED, State.LOST}
    assert {action for (state, _), (_, action) in SESSIONS.items() if state in ends} == {"ignore"}
    assert not [pair for pair in CALLS if pair[0] is CallState.DONE]
    assert all(exits(state, CALLS) for state in set(CallState) - {CallState.DONE})
    assert all(exits(state, edges_of(TRANSITIONS)) for state in WorkerState)


def test_every_open_session_can_be_lost_or_closed() -> None:
    """Whatever the state, these two inputs of the driver are taken."""
    for state in State:
        assert {(state, Input.LOST), (state, Input.CLOSE)} <= set(SESSIONS)


def test_every_call_that_has_not_ended_can_fail() -> None:
    """An abort or a close ends a call in any state."""
    for state in set(CallState) - {CallState.DONE}:
        assert CALLS[state, CallInput.FAILED] is CallState.DONE


# --- the owner's machine follows its tables ---------------------------------------------------


def owner_in(state: State, attempts_max: int) -> OwnerDesk:
    """An owner whose only session is in a state, reached by events alone."""
    desk = OwnerDesk(config=OwnerConfig(attempts_max=attempts_max))
    if state is not State.NEW:
        desk.do(Start())
    if state in (State.READY, State.CLOSING, State.CLOSED):
        desk.welcome()
    if state in (State.CLOSING, State.CLOSED):
        desk.do(CloseWanted())
    if state is State.CLOSED:
        desk.hear(Farewell(SESSION))
    if state is State.LOST:
        desk.do(PeerLost("w1"))
    assert desk.owner.state("w1") is state
    return desk


def exhaust(desk: OwnerDesk) -> list[Effect]:
    """The last timer there is: of a call when the session is ready, of the session otherwise."""
    if desk.owner.state("w1") is State.READY:
        desk.ask()
        return desk.do(TimerFired("call:1"))
    return desk.do(TimerFired("session:w1"))


OWNER_EVENTS: dict[Input, Callable[[OwnerDesk], list[Effect]]] = {
    Input.START: lambda desk: desk.do(Start()),
    Input.WELCOME: lambda desk: desk.welcome(),
    Input.PRODUCT: lambda desk: desk.hear(Product(SESSION, 1, bytes(8))),
    Input.REFUSED_CALL: lambda desk: desk.hear(Refuse(SESSION, 1, Reason.WRONG_SIZE)),
    Input.REFUSED_SESSION: lambda desk: desk.hear(Refuse(SESSION, 0, Reason.OTHER_MODEL)),
    Input.FORGOTTEN: lambda desk: desk.hear(Refuse(SESSION, 1, Reason.NO_SESSION)),
    Input.FAREWELL: lambda desk: desk.hear(Farewell(SESSION)),
    Input.TIMEOUT: lambda desk: desk.do(TimerFired("session:w1")),
    Input.EXHAUSTED: exhaust,
    Input.LOST: lambda desk: desk.do(PeerLost("w1")),
    Input.CLOSE: lambda desk: desk.do(CloseWanted()),
}
LOCAL = {Input.START, Input.TIMEOUT, Input.EXHAUSTED}


@pytest.mark.parametrize(("state", "kind"), product(State, Input))
def test_the_owner_follows_its_table(state: State, kind: Input) -> None:
    """Every pair: the row's next state; or, without a row, an error that changes nothing."""
    desk = owner_in(state, attempts_max=1 if kind is Input.EXHAUSTED else 3)
    if (state, kind) in SESSIONS:
        OWNER_EVENTS[kind](desk)
        assert desk.owner.state("w1") is SESSIONS[state, kind][0]
        return
    if kind in LOCAL:
        with pytest.raises(MisuseError):
            OWNER_EVENTS[kind](desk)
    else:
        assert is_dropped(OWNER_EVENTS[kind](desk))
    assert desk.owner.state("w1") is state


@pytest.mark.parametrize(("state", "kind"), product(CallState, CallInput))
def test_a_call_follows_its_table(state: CallState, kind: CallInput) -> None:
    """Every pair: the row's next state, or MisuseError and no change."""
    call = _Call(1, 0, 1, state)
    owner = OwnerDesk().owner
    if (state, kind) in CALLS:
        owner._move(call, kind)
        assert call.state is CALLS[state, kind]
    else:
        with pytest.raises(MisuseError):
            owner._move(call, kind)
        assert call.state is state


# --- the worker's machine follows its table -----------------------------------------------------


def worker_in(state: WorkerState) -> tuple[WorkerDesk, int]:
    """A worker whose session is in a state, and a task of that session still running."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    if state is WorkerState.ENDED:
        desk.hear(Bye(SESSION))
    if state is WorkerState.ABSENT:
        desk.do(PeerLost("o1"))
    assert desk.worker.state("o1") is state
    return desk, task


WORKER_EVENTS: dict[WorkerInput, Callable[[WorkerDesk, int], list[Effect]]] = {
    WorkerInput.HELLO: lambda desk, _: desk.hear(HELLO),
    WorkerInput.STRANGE_HELLO: lambda desk, _: desk.hear(Hello(SESSION, STRANGE, MODEL)),
    WorkerInput.MULTIPLY: lambda desk, _: desk.ask(2),
    WorkerInput.STALE: lambda desk, _: desk.ask(2, OTHER_SESSION),
    WorkerInput.BYE: lambda desk, _: desk.hear(Bye(SESSION)),
    WorkerInput.DONE: lambda desk, task: desk.do(TaskDone(task, bytes(8))),
    WorkerInput.FAILED: lambda desk, task: desk.do(TaskFailed(task, "toy")),
    WorkerInput.LOST: lambda desk, _: desk.do(PeerLost("o1")),
}
SAID = {"welcome", "refuse_session", "refuse_stale", "refuse_failed", "farewell", "answer"}


@pytest.mark.parametrize(("state", "kind"), product(WorkerState, WorkerInput))
def test_the_worker_follows_its_table(state: WorkerState, kind: WorkerInput) -> None:
    """Every pair: next state and kind of effect of the row; without one, nothing at all."""
    desk, task = worker_in(state)
    effects = WORKER_EVENTS[kind](desk, task)
    following, action = TRANSITIONS.get((state, kind), (state, "ignore"))
    assert desk.worker.state("o1") is following
    assert bool(all_of(effects, Send)) == (action in SAID)
    assert bool(all_of(effects, RunTask)) == (action == "compute")


def test_only_late_tasks_have_no_row() -> None:
    """A worker whose peer is gone lets its running tasks end unheard; all else has a row."""
    missing = set(product(WorkerState, WorkerInput)) - set(TRANSITIONS)
    assert missing == {
        (WorkerState.ABSENT, WorkerInput.DONE),
        (WorkerState.ABSENT, WorkerInput.FAILED),
    }


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_these_tables() -> None:
    """Stale? Run `python -m docs.generate_protocol`."""
    assert generate_protocol.main(["--check"]) == 0


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a row more in a table, and the page no longer agrees."""
    monkeypatch.setitem(SESSIONS, (State.NEW, Input.WELCOME), (State.READY, "ready"))
    assert generate_protocol.main(["--check"]) == 1


def labels(lines: Iterable[str]) -> list[str]:
    """What stands on the arrows of a diagram."""
    return [line.split(" : ", 1)[1] for line in lines if " : " in line]


def test_diagrams_are_safe_for_mermaid() -> None:
    """A colon or semicolon in a label would end it early."""
    machines: list[tuple[Rows, type[Enum]]] = [(SESSIONS, State), (TRANSITIONS, WorkerState)]
    for rows, states in machines:
        found = labels(generate_protocol.diagram(rows, states))
        assert found
        assert not [label for label in found if set(label) & set(":;")]
