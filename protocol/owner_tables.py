"""The owner's two tables: every state, every input, every transition.

Theory. A call is encrypted once, with secrets used for nothing else, into one frame. From then
on the frame never changes: a retry after a time-out, a lost worker, a forgotten session or a
wrong answer sends the same bytes, so a worker can learn nothing from a retry and may answer it
twice without harm. Frame and secrets are kept until an answer has been checked and decrypted.

SESSIONS has one row per (state of a worker's session, input), CALLS one per (state of a call,
input). What is absent is an error: a ProtocolError when a peer caused it, a MisuseError when the
driver did.

A connection that ends is not a worker that is gone: it is greeted again over the next one, and what
was on its way goes out once more, the same bytes; too often in a row without an answer, it counts
as silence. A worker that falls silent, or refuses what it agreed to, is LOST; now and then one
Hello more finds out whether it is back (REVIVING), as long as another one can serve. A worker whose
answer was wrong is RETIRED for good; the driver keeps that, and names it to the machine of every
later session.

In sync with: owner.py (the actions), worker.py (the other side), docs/protocol.md (drawn from
these tables).
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Of the session with one worker."""

    NEW = "new"
    GREETING = "greeting"
    READY = "ready"
    CLOSING = "closing"
    CLOSED = "closed"
    LOST = "lost"
    REVIVING = "reviving"
    RETIRED = "retired"


class Input(Enum):
    """What can happen to a session."""

    START = "start"
    WELCOME = "Welcome"
    PRODUCT = "Product"
    REFUSED_CALL = "Refuse of a call"
    REFUSED_SESSION = "Refuse of the session"
    FORGOTTEN = "Refuse: no such session"
    FAREWELL = "Farewell"
    WRONG_ANSWER = "answer found wrong"
    TIMEOUT = "time-out"
    EXHAUSTED = "attempts used up"
    CONTRADICTED = "Refuse of what was agreed"
    DISCONNECTED = "connection lost"
    LOST = "peer lost"
    CLOSE = "close wanted"


FRAMES = (
    Input.WELCOME, Input.PRODUCT, Input.REFUSED_CALL, Input.REFUSED_SESSION, Input.FORGOTTEN,
    Input.FAREWELL,
)  # fmt: skip
"""Inputs that are frames of the peer; the others come from this side."""


def _ignored(state: State, *inputs: Input) -> dict[tuple[State, Input], tuple[State, str]]:
    """What may still arrive, and changes nothing."""
    return {(state, kind): (state, "ignore") for kind in inputs}


# (state, input) -> (next state, action).
SESSIONS: dict[tuple[State, Input], tuple[State, str]] = {
    (State.NEW, Input.START): (State.GREETING, "greet"),
    **_ignored(State.NEW, Input.DISCONNECTED),
    (State.NEW, Input.LOST): (State.LOST, "lose"),
    (State.NEW, Input.CLOSE): (State.CLOSED, "closed"),
    (State.GREETING, Input.WELCOME): (State.READY, "ready"),
    (State.GREETING, Input.REFUSED_SESSION): (State.LOST, "lose"),
    (State.GREETING, Input.WRONG_ANSWER): (State.RETIRED, "retire"),
    (State.GREETING, Input.TIMEOUT): (State.GREETING, "greet"),
    (State.GREETING, Input.EXHAUSTED): (State.LOST, "lose"),
    (State.GREETING, Input.LOST): (State.LOST, "lose"),
    (State.GREETING, Input.CLOSE): (State.CLOSING, "bye"),
    # Answers to requests sent before the worker forgot us, and repeats of its forgetting.
    # A Hello that was lost with its connection is sent again by its timer.
    **_ignored(
        State.GREETING, Input.PRODUCT, Input.REFUSED_CALL, Input.FORGOTTEN, Input.DISCONNECTED
    ),
    (State.READY, Input.PRODUCT): (State.READY, "accept"),
    (State.READY, Input.REFUSED_CALL): (State.READY, "refused"),
    (State.READY, Input.FORGOTTEN): (State.GREETING, "greet"),
    (State.READY, Input.WRONG_ANSWER): (State.RETIRED, "retire"),
    (State.READY, Input.CONTRADICTED): (State.LOST, "lose"),
    (State.READY, Input.DISCONNECTED): (State.GREETING, "greet"),
    (State.READY, Input.EXHAUSTED): (State.LOST, "lose"),
    (State.READY, Input.LOST): (State.LOST, "lose"),
    (State.READY, Input.CLOSE): (State.CLOSING, "bye"),
    **_ignored(State.READY, Input.WELCOME, Input.REFUSED_SESSION),
    (State.CLOSING, Input.FAREWELL): (State.CLOSED, "closed"),
    (State.CLOSING, Input.TIMEOUT): (State.CLOSING, "bye"),
    (State.CLOSING, Input.EXHAUSTED): (State.CLOSED, "closed"),
    (State.CLOSING, Input.LOST): (State.CLOSED, "closed"),
    **_ignored(State.CLOSING, *(kind for kind in FRAMES if kind is not Input.FAREWELL)),
    **_ignored(State.CLOSING, Input.DISCONNECTED),
    **_ignored(State.CLOSED, *FRAMES, Input.LOST, Input.DISCONNECTED),
    (State.LOST, Input.TIMEOUT): (State.REVIVING, "greet"),
    (State.LOST, Input.WRONG_ANSWER): (State.RETIRED, "retire"),
    (State.LOST, Input.CLOSE): (State.CLOSED, "closed"),
    # A transport may fail before the driver starts the machine.
    **_ignored(State.LOST, *FRAMES, Input.LOST, Input.DISCONNECTED, Input.START),
    (State.REVIVING, Input.WELCOME): (State.READY, "ready"),
    (State.REVIVING, Input.REFUSED_SESSION): (State.LOST, "lose"),
    (State.REVIVING, Input.WRONG_ANSWER): (State.RETIRED, "retire"),
    (State.REVIVING, Input.TIMEOUT): (State.LOST, "lose"),
    (State.REVIVING, Input.LOST): (State.LOST, "lose"),
    (State.REVIVING, Input.CLOSE): (State.CLOSING, "bye"),
    **_ignored(
        State.REVIVING, Input.PRODUCT, Input.REFUSED_CALL, Input.FORGOTTEN, Input.DISCONNECTED
    ),
    (State.RETIRED, Input.CLOSE): (State.CLOSED, "closed"),
    # One that an earlier session retired is so from the start.
    **_ignored(State.RETIRED, *FRAMES, Input.LOST, Input.DISCONNECTED),
    **_ignored(State.RETIRED, Input.WRONG_ANSWER, Input.START),
}


class CallState(Enum):
    """Of one linear a lane waits for."""

    ENCRYPTING = "encrypting"
    WAITING = "waiting for a worker"
    IN_FLIGHT = "in flight"
    DECRYPTING = "decrypting"
    DONE = "done"


class CallInput(Enum):
    """What can happen to a call."""

    ENCRYPTED = "encrypted"
    SENT = "sent"
    ANSWERED = "answered"
    TIMEOUT = "time-out"
    ORPHANED = "its worker is gone"
    DECRYPTED = "decrypted"
    REJECTED = "answer found wrong"
    FAILED = "failed"


CALLS: dict[tuple[CallState, CallInput], CallState] = {
    (CallState.ENCRYPTING, CallInput.ENCRYPTED): CallState.WAITING,
    (CallState.ENCRYPTING, CallInput.FAILED): CallState.DONE,
    (CallState.WAITING, CallInput.SENT): CallState.IN_FLIGHT,
    (CallState.WAITING, CallInput.FAILED): CallState.DONE,
    (CallState.IN_FLIGHT, CallInput.ANSWERED): CallState.DECRYPTING,
    (CallState.IN_FLIGHT, CallInput.TIMEOUT): CallState.IN_FLIGHT,
    (CallState.IN_FLIGHT, CallInput.ORPHANED): CallState.WAITING,
    (CallState.IN_FLIGHT, CallInput.FAILED): CallState.DONE,
    (CallState.DECRYPTING, CallInput.DECRYPTED): CallState.DONE,
    (CallState.DECRYPTING, CallInput.REJECTED): CallState.WAITING,
    (CallState.DECRYPTING, CallInput.FAILED): CallState.DONE,
}
