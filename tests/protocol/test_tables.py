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
    AnswerRejected,
    CancelTimer,
    CloseWanted,
    Effect,
    PeerLost,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
    TaskFailed,
)
from protocol.messages import Bye, Farewell, Hello, Reason
from protocol.owner_memory import Call, OwnerConfig
from protocol.owner_tables import CALLS, FRAMES, SESSIONS, CallInput, CallState, Input, State
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
    owner_in,
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
    """A closed session and a call that is done go nowhere; all else has a way out."""
    ends = {state for state in State if not exits(state, edges_of(SESSIONS))}
    assert ends == {State.CLOSED}
    assert {action for (state, _), (_, action) in SESSIONS.items() if state in ends} == {"ignore"}
    assert not [pair for pair in CALLS if pair[0] is CallState.DONE]
    assert all(exits(state, CALLS) for state in set(CallState) - {CallState.DONE})
    assert all(exits(state, edges_of(TRANSITIONS)) for state in WorkerState)


def test_every_open_session_can_be_lost_or_closed() -> None:
    """Whatever the state, the driver may report a loss, and a first wish to close is taken."""
    closes = {state for state in State if (state, Input.CLOSE) in SESSIONS}
    assert closes == set(State) - {State.CLOSING, State.CLOSED}
    assert all((state, Input.LOST) in SESSIONS for state in State)


def test_a_retired_worker_can_only_be_closed() -> None:
    """No input of any kind makes it serve again."""
    assert exits(State.RETIRED, edges_of(SESSIONS)) == {State.CLOSED}
    actions = {action for (state, _), (_, action) in SESSIONS.items() if state is State.RETIRED}
    assert actions == {"ignore", "closed"}


def test_every_frame_has_a_row_once_a_worker_was_greeted() -> None:
    """But a Farewell before any Bye: that, and any frame before the Hello, breaks the rules."""
    missing = set(product(State, FRAMES)) - set(SESSIONS)
    said_too_early = {(State.NEW, kind) for kind in FRAMES}
    unasked = {(state, Input.FAREWELL) for state in (State.GREETING, State.READY, State.REVIVING)}
    assert missing == said_too_early | unasked


def test_a_wrong_answer_can_be_found_while_calls_live() -> None:
    """In every state between the first Welcome and the close, which fails all calls."""
    found = {state for state in State if (state, Input.WRONG_ANSWER) in SESSIONS}
    assert found == set(State) - {State.NEW, State.CLOSING, State.CLOSED}


def test_every_call_that_has_not_ended_can_fail() -> None:
    """An abort or a close ends a call in any state."""
    for state in set(CallState) - {CallState.DONE}:
        assert CALLS[state, CallInput.FAILED] is CallState.DONE


# --- the owner's machine follows its tables ---------------------------------------------------


def exhaust(desk: OwnerDesk) -> list[Effect]:
    """The last timer there is: of a call when the session is ready, of the session otherwise."""
    if desk.owner.state("w1") is State.READY:
        desk.ask()
        return desk.fire("call:1")
    return desk.fire("session:w1")


def forgotten(desk: OwnerDesk) -> list[Effect]:
    """The worker forgot; when the session is ready, that counts for a call in flight."""
    if desk.owner.state("w1") is State.READY:
        desk.ask()
    return desk.refuse(Reason.NO_SESSION)


def contradicted(desk: OwnerDesk) -> list[Effect]:
    """The worker refuses what it agreed to."""
    desk.ask()
    return desk.refuse(Reason.WRONG_SIZE)


OWNER_EVENTS: dict[Input, Callable[[OwnerDesk], list[Effect]]] = {
    Input.START: lambda desk: desk.do(Start()),
    Input.WELCOME: lambda desk: desk.welcome(),
    Input.PRODUCT: lambda desk: desk.product(),
    Input.REFUSED_CALL: lambda desk: desk.refuse(Reason.WRONG_SIZE),
    Input.CONTRADICTED: contradicted,
    Input.DISCONNECTED: lambda desk: desk.disconnect(),
    Input.REFUSED_SESSION: lambda desk: desk.refuse(Reason.OTHER_MODEL, 0),
    Input.FORGOTTEN: forgotten,
    Input.FAREWELL: lambda desk: desk.hear(Farewell(SESSION)),
    Input.WRONG_ANSWER: lambda desk: desk.do(AnswerRejected(1, "a lie")),
    Input.TIMEOUT: lambda desk: desk.fire("session:w1"),
    Input.EXHAUSTED: exhaust,
    Input.LOST: lambda desk: desk.lose(),
    Input.CLOSE: lambda desk: desk.do(CloseWanted()),
}


def with_an_answer(state: State) -> OwnerDesk:
    """An owner in a state, that is still decrypting what w1 said in answer to call 1."""
    desk = OwnerDesk(("w1", "w2")).open()
    for call in (1, 2, 3):
        desk.ask(call)
    desk.product(1)
    if state is State.GREETING:
        desk.refuse(Reason.NO_SESSION, 3)
    if state in (State.LOST, State.REVIVING):
        desk.lose()
    if state is State.REVIVING:
        desk.fire("session:w1")
    if state is State.RETIRED:
        desk.reject(3)
    assert desk.owner.state("w1") is state
    return desk


@pytest.mark.parametrize(("state", "kind"), SESSIONS)
def test_the_owner_follows_its_table(state: State, kind: Input) -> None:
    """Every row: its next state; and when it ignores, nothing but a dropped frame."""
    if kind is Input.WRONG_ANSWER:
        desk = with_an_answer(state)
    elif (state, kind) == (State.RETIRED, Input.START):
        desk = OwnerDesk(("w1", "w2"), retired={"w1": "lied in an earlier session"})
    else:
        desk = owner_in(state, attempts_max=1 if kind is Input.EXHAUSTED else 3)
    effects = OWNER_EVENTS[kind](desk)
    following, action = SESSIONS[state, kind]
    assert desk.owner.state("w1") is following
    if action == "ignore" and kind in FRAMES:
        assert is_dropped(effects)
    elif action == "ignore":
        # The start is for the other worker too; a lie found twice sends its call elsewhere.
        assert not [effect for effect in effects if getattr(effect, "peer", "") == "w1"]
        assert "session:w1" not in [getattr(effect, "timer", "") for effect in effects]
    else:
        assert effects


@pytest.mark.parametrize(
    ("state", "kind"), [pair for pair in product(State, Input) if pair not in SESSIONS]
)
def test_what_has_no_row_changes_nothing(state: State, kind: Input) -> None:
    """A frame is dropped; what only a wrong driver could do raises MisuseError."""
    desk = owner_in(state)
    if kind in FRAMES:
        assert is_dropped(OWNER_EVENTS[kind](desk))
    else:
        with pytest.raises(MisuseError, match=kind.value):
            desk.owner._step(desk.owner._peers["w1"], kind)
    assert desk.owner.state("w1") is state


@pytest.mark.parametrize("state", State)
def test_a_lost_session_is_revived_as_long_as_another_serves(state: State) -> None:
    """Exactly the rows that lose set the timer; exactly those that end a wait cancel it."""
    for (before, kind), (_, action) in SESSIONS.items():
        if before is not state or action not in ("lose", "retire", "closed", "ready"):
            continue
        if kind is Input.WRONG_ANSWER:
            desk = with_an_answer(state)
        else:
            desk = owner_in(state, attempts_max=1 if kind is Input.EXHAUSTED else 3)
        effects = OWNER_EVENTS[kind](desk)
        set_again = [t for t in all_of(effects, SetTimer) if t.timer == "session:w1"]
        assert [t.delay_s >= OwnerConfig().revive_s for t in set_again] == [True] * (
            action == "lose"
        )
        assert (CancelTimer("session:w1") in effects) == (action != "lose")


@pytest.mark.parametrize(("state", "kind"), product(CallState, CallInput))
def test_a_call_follows_its_table(state: CallState, kind: CallInput) -> None:
    """Every pair: the row's next state, or MisuseError and no change."""
    call = Call(1, 0, 1, 12, state)
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
# Answered before the table is asked: an absent session has no id that they could name.
WITHOUT_ROW = {
    WorkerInput.MULTIPLY: (WorkerState.ABSENT, "refuse_stale"),
    WorkerInput.BYE: (WorkerState.ABSENT, "farewell"),
}
SAID = {"welcome", "refuse_session", "refuse_stale", "refuse_failed", "farewell", "answer"}


@pytest.mark.parametrize(("state", "kind"), product(WorkerState, WorkerInput))
def test_the_worker_follows_its_table(state: WorkerState, kind: WorkerInput) -> None:
    """Every pair: next state and kind of effect of the row; without one, nothing changes."""
    desk, task = worker_in(state)
    effects = WORKER_EVENTS[kind](desk, task)
    following, action = TRANSITIONS.get((state, kind), WITHOUT_ROW.get(kind, (state, "ignore")))
    assert desk.worker.state("o1") is following
    assert bool(all_of(effects, Send)) == (action in SAID)
    assert bool(all_of(effects, RunTask)) == (action == "compute")


def test_only_an_absent_session_has_gaps() -> None:
    """It has no id for a request or a Bye to name, nothing to lose, and its tasks end unheard."""
    missing = set(product(WorkerState, WorkerInput)) - set(TRANSITIONS)
    assert {state for state, _ in missing} == {WorkerState.ABSENT}
    assert {kind for _, kind in missing} == {
        WorkerInput.MULTIPLY,
        WorkerInput.BYE,
        WorkerInput.DONE,
        WorkerInput.FAILED,
        WorkerInput.LOST,
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
