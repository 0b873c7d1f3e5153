"""What docs/protocol.md promises, cell by cell: the machines are driven and nothing else is read.

The page has each next state and the name of each action; what an action says to the world is
written here. So a cell that changes in the code is found whatever else looks at its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from protocol.errors import MisuseError
from protocol.events import (
    CancelTimer,
    Decrypt,
    Dropped,
    Effect,
    Retired,
    RunTask,
    Send,
    SetTimer,
    TaskDone,
)
from protocol.messages import (
    Farewell,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
)
from protocol.owner_tables import FRAMES, Input, State
from protocol.worker import Input as WorkerInput
from protocol.worker import State as WorkerState
from tests.protocol.test_tables import (
    OWNER_EVENTS,
    WITHOUT_ROW,
    WORKER_EVENTS,
    with_an_answer,
    worker_in,
)
from tests.protocol.toys import OTHER_SESSION, SESSION, OwnerDesk, all_of, owner_in

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def grid(title: str) -> dict[tuple[str, str], str]:
    """(state, input) -> cell, of the table below a heading of the page."""
    section = PAGE.read_text().partition(f"### {title}\n")[2].partition("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    states = rows[0][1:]
    return {
        (state, row[0]): cell
        for row in rows[2:]
        for state, cell in zip(states, row[1:], strict=True)
    }


def read(cell: str, state: str) -> tuple[str, str]:
    """(action, next state) of a cell."""
    action, _, following = cell.partition("→ ")
    return action.strip(), following.strip("* ") or state


OWNER = grid("Owner: the session with one worker")
WORKER = grid("Worker: the session with one owner")
GREETED: dict[str, set[str]] = {
    "greet": {"Hello", "timer"},
    "ready": {"no timer"},
    "accept": {"decrypt"},
    "refused": {"elsewhere"},
    "lose": {"timer"},
    "retire": {"Retired", "no timer"},
    "bye": {"Bye", "timer"},
    "closed": {"no timer"},
}
"""What an action of the owner says to w1, or of it."""


def said_of_w1(effects: Sequence[Effect]) -> set[str]:
    """In the words of GREETED; and whether a request went to the other worker."""
    words = set()
    for effect in effects:
        match effect:
            case Send("w1", frame):
                words.add(type(decode(frame)).__name__)
            case Send("w2", frame) if isinstance(decode(frame), Multiply):
                words.add("elsewhere")
            case Retired("w1", _):
                words.add("Retired")
            case Dropped("w1", _):
                words.add("dropped")
            case SetTimer("session:w1", _):
                words.add("timer")
            case CancelTimer("session:w1"):
                words.add("no timer")
            case RunTask(_, Decrypt()):
                words.add("decrypt")
            case _:
                pass
    return words


def driven(state: State, kind: Input) -> tuple[OwnerDesk, list[Effect]]:
    """An owner in a state after an input, and what it said then."""
    if kind is Input.WRONG_ANSWER:
        desk = with_an_answer(state)
    elif (state, kind) == (State.RETIRED, Input.START):
        desk = OwnerDesk(("w1", "w2"), retired={"w1": "lied in an earlier session"})
    else:
        desk = owner_in(state, attempts_max=1 if kind is Input.EXHAUSTED else 3)
    if state is State.READY and kind in (Input.PRODUCT, Input.REFUSED_CALL):
        desk.ask()
    if state is State.READY and kind is Input.REFUSED_CALL:
        return desk, desk.refuse(Reason.BUSY)
    return desk, OWNER_EVENTS[kind](desk)


@pytest.mark.parametrize(("state", "kind"), [pair for pair in OWNER if OWNER[pair] != "–"])
def test_the_owner_does_what_the_page_says(state: str, kind: str) -> None:
    """Next state, and all that is said to that worker or of it."""
    action, following = read(OWNER[state, kind], state)
    event = Input(kind)
    desk, effects = driven(State(state), event)
    assert desk.owner.state("w1").value == following
    said = said_of_w1(effects)
    if action == "ignore":
        assert said - {"elsewhere"} == ({"dropped"} if event in FRAMES else set())
        assert not all_of(effects, RunTask)
        return
    # A worker that is gone leaves its calls to the other.
    others = {"elsewhere"} if action in ("greet", "lose", "retire") else set()
    assert said - others == GREETED[action] - others
    assert ("decrypt" in said) == (action == "accept")


@pytest.mark.parametrize(("state", "kind"), [pair for pair in OWNER if OWNER[pair] == "–"])
def test_the_owner_refuses_what_the_page_does_not_have(state: str, kind: str) -> None:
    """A frame is dropped; what the driver could get wrong raises; the rest cannot happen."""
    event = Input(kind)
    if event in FRAMES:
        desk, effects = driven(State(state), event)
        assert said_of_w1(effects) == {"dropped"}
        assert desk.owner.state("w1").value == state
    elif event in (Input.START, Input.TIMEOUT):
        desk = owner_in(State(state))
        with pytest.raises(MisuseError):
            OWNER_EVENTS[event](desk)


WORKER_SAYS: dict[str, Message | type[Message] | None] = {
    "welcome": Welcome,
    "refuse_session": Refuse(SESSION, 0, Reason.OTHER_PARAMETERS),
    "farewell": Farewell(SESSION),
    "answer": Product,
    "refuse_failed": Refuse(SESSION, 1, Reason.FAILED),
    "compute": None,
    "forget": None,
    "ignore": None,
}


@pytest.mark.parametrize(("state", "kind"), WORKER)
def test_the_worker_does_what_the_page_says(state: str, kind: str) -> None:
    """Next state, and exactly what is said to that owner; no row, nothing is said."""
    desk, task = worker_in(WorkerState(state))
    event = WorkerInput(kind)
    effects = WORKER_EVENTS[event](desk, task)
    cell = WORKER[state, kind]
    action, following = read(cell, state) if cell != "–" else ("ignore", state)
    if cell == "–" and event in WITHOUT_ROW:
        action = WITHOUT_ROW[event][1]
    assert desk.worker.state("o1").value == following
    sends = all_of(effects, Send)
    messages = [decode(send.frame) for send in sends]
    assert {send.peer for send in sends} <= {"o1"}
    assert bool(all_of(effects, RunTask)) == (action == "compute")
    if action == "refuse_stale":
        session = OTHER_SESSION if event is WorkerInput.STALE else SESSION
        assert messages == [Refuse(session, 2, Reason.NO_SESSION)]
        return
    expected = WORKER_SAYS[action]
    if isinstance(expected, type):
        assert [type(message) for message in messages] == [expected]
    else:
        assert messages == ([] if expected is None else [expected])


@pytest.mark.parametrize("end", ["delivered", "failed"])
def test_a_call_goes_the_way_of_the_page(end: str) -> None:
    """The states that a call passes, as seen from outside."""
    page = grid("Owner: one call")
    desk = OwnerDesk(("w1", "w2")).open()
    states = []

    def note() -> None:
        states.append(desk.owner.call_state(1).value)

    desk.ask()
    note()
    desk.fire("call:1")
    note()
    desk.reject(peer="w2")
    note()
    desk.lose("w1") if end == "failed" else desk.product(1, peer="w1")
    note()
    if end == "delivered":
        desk.do(TaskDone(1, "value"))
        note()
    flight = read(page["waiting for a worker", "sent"], "")[1]
    opening = read(page[flight, "answered"], "")[1]
    ways = [flight, flight, flight, *([opening] if end == "delivered" else []), "done"]
    assert states == ways
    assert page["in flight", "time-out"] == "stays"
