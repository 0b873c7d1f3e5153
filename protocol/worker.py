"""The worker's machine: it multiplies ciphertexts by public matrices, and that is all.

Theory. A product is a pure function of the request's bytes, so the worker keeps no answers: a
repeated request is computed again, unless it is being computed right now. Losing a worker's
memory therefore loses nothing: the owner greets again and sends the same bytes.

Rules
  * One session per peer, the one of its latest Hello; anything under another id is refused.
  * A request is checked against the catalogue before a byte of it is used.
  * Requests, bytes in work and bytes over time are bounded, those of a client, however many peers
    it has, and of all; beyond that the answer is BUSY, with the time to come back in.

In sync with: owner.py (the other side), messages.py, docs/protocol.md (drawn from TRANSITIONS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from protocol.admission import Admission, Quota
from protocol.catalogue import Catalogue
from protocol.errors import MisuseError, ProtocolError, VersionError
from protocol.events import (
    Dropped,
    Effect,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Send,
    TaskDone,
    TaskFailed,
)
from protocol.messages import (
    Bye,
    Farewell,
    Hello,
    Message,
    Multiply,
    Payload,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
    is_payload,
)


class State(Enum):
    """Of the session with one peer."""

    ABSENT = "absent"
    SERVING = "serving"
    ENDED = "ended"


class Input(Enum):
    """What can happen to a session."""

    HELLO = "Hello"
    STRANGE_HELLO = "Hello of another model or parameter set"
    MULTIPLY = "Multiply"
    STALE = "Multiply of another session"
    BYE = "Bye"
    DONE = "product computed"
    FAILED = "computation failed"
    LOST = "peer lost"


# (state, input) -> (next state, action). What is not here is the peer's error.
TRANSITIONS: dict[tuple[State, Input], tuple[State, str]] = {
    (State.ABSENT, Input.HELLO): (State.SERVING, "welcome"),
    (State.ABSENT, Input.STRANGE_HELLO): (State.ABSENT, "refuse_session"),
    (State.ABSENT, Input.STALE): (State.ABSENT, "refuse_stale"),
    (State.SERVING, Input.HELLO): (State.SERVING, "welcome"),
    (State.SERVING, Input.STRANGE_HELLO): (State.SERVING, "refuse_session"),
    (State.SERVING, Input.MULTIPLY): (State.SERVING, "compute"),
    (State.SERVING, Input.STALE): (State.SERVING, "refuse_stale"),
    (State.SERVING, Input.BYE): (State.ENDED, "farewell"),
    (State.SERVING, Input.DONE): (State.SERVING, "answer"),
    (State.SERVING, Input.FAILED): (State.SERVING, "refuse_failed"),
    (State.SERVING, Input.LOST): (State.ABSENT, "forget"),
    (State.ENDED, Input.HELLO): (State.SERVING, "welcome"),
    (State.ENDED, Input.STRANGE_HELLO): (State.ENDED, "refuse_session"),
    (State.ENDED, Input.MULTIPLY): (State.ENDED, "refuse_stale"),
    (State.ENDED, Input.STALE): (State.ENDED, "refuse_stale"),
    (State.ENDED, Input.BYE): (State.ENDED, "farewell"),
    (State.ENDED, Input.DONE): (State.ENDED, "ignore"),
    (State.ENDED, Input.FAILED): (State.ENDED, "ignore"),
    (State.ENDED, Input.LOST): (State.ABSENT, "forget"),
}


@dataclass(frozen=True)
class WorkerConfig:
    """Limits a worker sets.

    max_tokens    of one request
    quota         of one client, and of all, see `Quota`
    shares        of clients, see `FairQueue`; kept by whoever queues the tasks
    max_sessions  of one client
    max_peers     sessions of all; a peer that is new takes the place of one that has ended, or
    idle_s        whose client has had nothing in work, and that has said nothing, for so long
    """

    max_tokens: int = 4096
    quota: Quota = field(default_factory=Quota)
    shares: Mapping[str, int] = field(default_factory=dict)
    max_sessions: int = 64
    max_peers: int = 1024
    idle_s: float = 3600.0


@dataclass
class _Session:
    id: bytes = b""
    state: State = State.ABSENT
    heard_s: float = 0.0


@dataclass(frozen=True)
class _Job:
    peer: str
    session: bytes
    request: int
    matrix: int
    tokens: int
    begun_s: float = field(compare=False)


class Worker:
    """`handle(event, now) -> effects`. Holds no secret and no weight: the driver multiplies.

    client_of  whose a peer is; each is its own without it
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: WorkerConfig | None = None,
        client_of: Callable[[str], str] = lambda peer: peer,
    ) -> None:
        self._catalogue, self._client_of = catalogue, client_of
        self._config = config or WorkerConfig()
        self._admission = Admission(self._config.quota)
        self._sessions: dict[str, _Session] = {}
        self._jobs: dict[int, _Job] = {}
        self._in_work: set[_Job] = set()
        self._next_task = 1
        self._now = 0.0
        count = range(len(catalogue.matrices))
        encodable = min((catalogue.tokens_max(m) for m in count), default=self._config.max_tokens)
        self._max_tokens = min(self._config.max_tokens, encodable)
        self._actions: dict[str, Callable[..., list[Effect]]] = {
            "welcome": self._welcome,
            "refuse_session": self._refuse_session,
            "refuse_stale": self._refuse_stale,
            "refuse_failed": self._refuse_failed,
            "farewell": self._farewell,
            "compute": self._compute,
            "answer": self._answer,
            "forget": self._forget,
            "ignore": lambda *_: [],
        }

    def state(self, peer: str) -> State:
        """State of the session with `peer`."""
        return self._sessions[peer].state if peer in self._sessions else State.ABSENT

    def handle(self, event: Event, now: float) -> list[Effect]:
        """React to one event. Raises MisuseError for an event that is not a worker's."""
        self._now = max(self._now, now)  # a clock that was put back tells nothing
        match event:
            case FrameArrived(peer, frame):
                try:
                    return self._on_message(peer, decode(frame))
                except VersionError as error:
                    return [Send(peer, encode(Refuse(error.session, 0, Reason.OTHER_VERSION)))]
                except ProtocolError as error:
                    return [Dropped(peer, str(error))]
            case TaskDone(task, result):
                job = self._take_job(task)
                if not is_payload(result):
                    raise MisuseError("a product task returns a payload")
                return self._on_task(job, Input.DONE, result)
            case TaskFailed(task, _):
                return self._on_task(self._take_job(task), Input.FAILED, None)
            case PeerLost(peer):
                session = self._sessions.get(peer)
                return [] if session is None else self._step(peer, session, Input.LOST)
            case _:
                raise MisuseError(f"a worker takes no {type(event).__name__}")

    # --- events ---------------------------------------------------------------------------

    def _on_message(self, peer: str, message: Message) -> list[Effect]:
        session = self._sessions.get(peer) or _Session()
        session.heard_s = self._now
        match message:
            case Hello():
                kind = Input.STRANGE_HELLO if self._objection(message) else Input.HELLO
            case Multiply():
                kind = Input.MULTIPLY if message.session == session.id else Input.STALE
            case Bye():
                kind = Input.BYE
                if message.session != session.id:
                    # The close of a session already replaced or forgotten: it has ended.
                    return self._farewell(peer, session, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a worker")
        return self._step(peer, session, kind, message)

    def _on_task(self, job: _Job, kind: Input, result: Payload | None) -> list[Effect]:
        session = self._sessions.get(job.peer)
        if session is None or session.id != job.session:
            return []
        return self._step(job.peer, session, kind, job, result)

    def _step(self, peer: str, session: _Session, kind: Input, *detail: object) -> list[Effect]:
        try:
            following, action = TRANSITIONS[session.state, kind]
        except KeyError:
            raise ProtocolError(f"{kind.value} while {session.state.value}") from None
        session.state = following
        return self._actions[action](peer, session, *detail)

    def _take_job(self, task: int) -> _Job:
        try:
            job = self._jobs.pop(task)
        except KeyError:
            raise MisuseError(f"no task {task} is running") from None
        self._in_work.remove(job)
        size = self._catalogue.both_bytes(job.matrix, job.tokens)
        self._admission.end(self._client_of(job.peer), size, job.begun_s, self._now)
        return job

    def _objection(self, hello: Hello) -> Reason | None:
        if hello.parameters_digest != self._catalogue.parameters_digest:
            return Reason.OTHER_PARAMETERS
        if hello.model_digest != self._catalogue.model_digest:
            return Reason.OTHER_MODEL
        return None

    # --- actions --------------------------------------------------------------------------

    def _welcome(self, peer: str, session: _Session, hello: Hello) -> list[Effect]:
        if peer not in self._sessions and not self._has_room(self._client_of(peer)):
            session.state = State.ABSENT
            return [Send(peer, encode(Refuse(hello.session, 0, Reason.BUSY)))]
        session.id = hello.session
        self._sessions[peer] = session
        welcome = Welcome(
            hello.session,
            self._catalogue.parameters_digest,
            self._catalogue.model_digest,
            self._max_tokens,
        )
        return [Send(peer, encode(welcome))]

    def _has_room(self, client: str) -> bool:
        """Whether a client may have one more session, maybe in place of one that is over."""
        theirs = [name for name in self._sessions if self._client_of(name) == client]
        if len(theirs) >= self._config.max_sessions:
            return self._sessions.pop(self._over(theirs) or "", None) is not None
        if len(self._sessions) >= self._config.max_peers:
            return self._sessions.pop(self._over(self._sessions) or "", None) is not None
        return True

    def _over(self, names: Iterable[str]) -> str | None:
        """A peer whose session has ended, or else the one silent longest, if long enough."""
        silent = None
        for name in names:
            session = self._sessions[name]
            if session.state is State.ENDED:
                return name
            works = self._admission.working(self._client_of(name))
            idle = not works and self._now - session.heard_s >= self._config.idle_s
            if idle and (silent is None or session.heard_s < self._sessions[silent].heard_s):
                silent = name
        return silent

    def _refuse_session(self, peer: str, session: _Session, hello: Hello) -> list[Effect]:
        reason = self._objection(hello)
        assert reason is not None
        return [Send(peer, encode(Refuse(hello.session, 0, reason)))]

    def _refuse_stale(self, peer: str, session: _Session, message: Multiply) -> list[Effect]:
        return [Send(peer, encode(Refuse(message.session, message.request, Reason.NO_SESSION)))]

    def _refuse_failed(self, peer: str, session: _Session, job: _Job, result: None) -> list[Effect]:
        return [Send(peer, encode(Refuse(job.session, job.request, Reason.FAILED)))]

    def _forget(self, peer: str, session: _Session) -> list[Effect]:
        del self._sessions[peer]
        return []

    def _farewell(self, peer: str, session: _Session, bye: Bye) -> list[Effect]:
        return [Send(peer, encode(Farewell(bye.session)))]

    def _compute(self, peer: str, session: _Session, message: Multiply) -> list[Effect]:
        job = _Job(peer, session.id, message.request, message.matrix, message.tokens, self._now)
        # Tasks outlive sessions: a peer that comes back under the same one finds its work going on.
        if job in self._in_work:
            return [Dropped(peer, "duplicate of a request in work")]
        reason = self._fault_of(message)
        if reason is not None:
            return [Send(peer, encode(Refuse(message.session, message.request, reason)))]
        # Of this client, under any session: a new Hello or connection does not stop old tasks.
        client = self._client_of(peer)
        size = self._catalogue.both_bytes(message.matrix, message.tokens)
        wait_s = self._admission.wait_s(client, size, self._now)
        if wait_s is not None:
            after_ms = math.ceil(1e3 * wait_s)
            busy = Refuse(message.session, message.request, Reason.BUSY, after_ms)
            return [Send(peer, encode(busy))]
        task, self._next_task = self._next_task, self._next_task + 1
        self._jobs[task] = job
        self._in_work.add(job)
        self._admission.begin(client, size, self._now)
        work = MultiplyCiphertext(message.matrix, message.tokens, message.payload)
        return [RunTask(task, work)]

    def _fault_of(self, message: Multiply) -> Reason | None:
        if message.matrix >= len(self._catalogue.matrices):
            return Reason.UNKNOWN_MATRIX
        if not 1 <= message.tokens <= self._max_tokens:
            return Reason.TOO_MANY_TOKENS
        if len(message.payload) != self._catalogue.up_bytes(message.matrix, message.tokens):
            return Reason.WRONG_SIZE
        return None

    def _answer(self, peer: str, session: _Session, job: _Job, result: Payload) -> list[Effect]:
        if len(result) != self._catalogue.down_bytes(job.matrix, job.tokens):
            raise MisuseError("the product's size does not match the catalogue")
        return [Send(peer, encode(Product(job.session, job.request, result)))]
