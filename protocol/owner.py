"""The owner's machine: it turns a lane's linear into one encrypted request and its answer.

Theory. A call is encrypted once, with secrets used for nothing else, into one frame. From then
on the frame never changes: a retry after a time-out, a lost worker or a forgotten session sends
the same bytes, so a worker can learn nothing from a retry and may answer it twice without harm.
The first acceptable answer is decrypted and delivered; later ones are dropped.

Rules
  * An answer counts only under this owner's session id, for a call in flight, with exactly the
    bytes the catalogue says.
  * Every wait has a timer; every timer is cancelled or answered; attempts are bounded.
  * Malformed or misplaced frames are dropped and counted; they change no state.

Two tables: SESSIONS, one row per (state of a worker's session, input), and CALLS, one row per
(state of a call, input). What is absent is an error: a ProtocolError when a peer caused it, a
MisuseError when the driver did.

In sync with: worker.py (the other side), messages.py, docs/protocol.md (drawn from the tables).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from protocol.catalogue import Catalogue
from protocol.errors import MisuseError, ProtocolError
from protocol.events import (
    Abort,
    CancelTimer,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Dropped,
    Effect,
    Encrypt,
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
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
)
from protocol.placement import least_loaded


class State(Enum):
    """Of the session with one worker."""

    NEW = "new"
    GREETING = "greeting"
    READY = "ready"
    CLOSING = "closing"
    CLOSED = "closed"
    LOST = "lost"


class Input(Enum):
    """What can happen to a session."""

    START = "start"
    WELCOME = "Welcome"
    PRODUCT = "Product"
    REFUSED_CALL = "Refuse of a call"
    REFUSED_SESSION = "Refuse of the session"
    FORGOTTEN = "Refuse: no such session"
    FAREWELL = "Farewell"
    TIMEOUT = "time-out"
    EXHAUSTED = "attempts used up"
    LOST = "peer lost"
    CLOSE = "close wanted"


def _late(state: State) -> dict[tuple[State, Input], tuple[State, str]]:
    """Frames that may still arrive after the end, and change nothing."""
    inputs = (
        Input.WELCOME, Input.PRODUCT, Input.REFUSED_CALL, Input.REFUSED_SESSION,
        Input.FORGOTTEN, Input.FAREWELL, Input.LOST, Input.CLOSE,
    )  # fmt: skip
    return {(state, kind): (state, "ignore") for kind in inputs}


# (state, input) -> (next state, action).
SESSIONS: dict[tuple[State, Input], tuple[State, str]] = {
    (State.NEW, Input.START): (State.GREETING, "greet"),
    (State.NEW, Input.LOST): (State.LOST, "give_up"),
    (State.NEW, Input.CLOSE): (State.CLOSED, "closed"),
    (State.GREETING, Input.WELCOME): (State.READY, "ready"),
    (State.GREETING, Input.REFUSED_SESSION): (State.LOST, "give_up"),
    (State.GREETING, Input.TIMEOUT): (State.GREETING, "greet"),
    (State.GREETING, Input.EXHAUSTED): (State.LOST, "give_up"),
    (State.GREETING, Input.LOST): (State.LOST, "give_up"),
    (State.GREETING, Input.CLOSE): (State.CLOSING, "bye"),
    # Answers to requests sent before the worker forgot us, and repeats of its forgetting.
    (State.GREETING, Input.PRODUCT): (State.GREETING, "accept"),
    (State.GREETING, Input.REFUSED_CALL): (State.GREETING, "ignore"),
    (State.GREETING, Input.FORGOTTEN): (State.GREETING, "ignore"),
    (State.READY, Input.WELCOME): (State.READY, "ignore"),
    (State.READY, Input.PRODUCT): (State.READY, "accept"),
    (State.READY, Input.REFUSED_CALL): (State.READY, "refused"),
    (State.READY, Input.REFUSED_SESSION): (State.READY, "ignore"),
    (State.READY, Input.FORGOTTEN): (State.GREETING, "greet"),
    (State.READY, Input.EXHAUSTED): (State.LOST, "give_up"),
    (State.READY, Input.LOST): (State.LOST, "give_up"),
    (State.READY, Input.CLOSE): (State.CLOSING, "bye"),
    (State.CLOSING, Input.WELCOME): (State.CLOSING, "ignore"),
    (State.CLOSING, Input.PRODUCT): (State.CLOSING, "ignore"),
    (State.CLOSING, Input.REFUSED_CALL): (State.CLOSING, "ignore"),
    (State.CLOSING, Input.REFUSED_SESSION): (State.CLOSING, "ignore"),
    (State.CLOSING, Input.FORGOTTEN): (State.CLOSING, "ignore"),
    (State.CLOSING, Input.FAREWELL): (State.CLOSED, "closed"),
    (State.CLOSING, Input.TIMEOUT): (State.CLOSING, "bye"),
    (State.CLOSING, Input.EXHAUSTED): (State.CLOSED, "closed"),
    (State.CLOSING, Input.LOST): (State.CLOSED, "closed"),
    (State.CLOSING, Input.CLOSE): (State.CLOSING, "ignore"),
    **_late(State.CLOSED),
    **_late(State.LOST),
    # A transport may fail before the driver starts the machine.
    (State.LOST, Input.START): (State.LOST, "ignore"),
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
    (CallState.DECRYPTING, CallInput.FAILED): CallState.DONE,
}

_REFUSAL_TEXT = {
    Reason.OTHER_PARAMETERS: "it was prepared with other cipher parameters (check --preset)",
    Reason.OTHER_MODEL: "it holds another model (check --weights on both sides)",
    Reason.OTHER_VERSION: "it speaks another protocol version",
    Reason.BUSY: "it serves too many owners already",
    Reason.UNKNOWN_MATRIX: "it does not know this layer",
    Reason.WRONG_SIZE: "it expected another number of bytes",
    Reason.TOO_MANY_TOKENS: "the micro-batch has more tokens than it takes at once",
    Reason.FAILED: "its computation failed",
    Reason.NO_SESSION: "it knows no such session",
}
_RETRIED = frozenset({Reason.BUSY, Reason.FAILED})


@dataclass(frozen=True)
class OwnerConfig:
    """Patience and width. Time-outs double with each attempt, up to `timeout_s_max`."""

    hello_timeout_s: float = 5.0
    request_timeout_s: float = 60.0
    timeout_s_max: float = 240.0
    attempts_max: int = 5
    window: int = 8

    def __post_init__(self) -> None:
        if self.window < 1 or self.attempts_max < 1:
            raise ValueError("window and attempts_max are at least 1")
        if min(self.hello_timeout_s, self.request_timeout_s, self.timeout_s_max) <= 0:
            raise ValueError("timeouts are positive")


@dataclass
class _Peer:
    name: str
    state: State = State.NEW
    attempts: int = 0
    max_tokens: int = 0
    why_lost: str = ""
    forgot: int = 0


@dataclass
class _Call:
    id: int
    matrix: int
    tokens: int
    state: CallState = CallState.ENCRYPTING
    frame: bytes = field(default=b"", repr=False)
    sealed: object = field(default=None, repr=False)
    peer: str = ""
    attempts: int = 0


class Owner:
    """`handle(event, now) -> effects`. Holds no key: secrets stay in the driver's sealed handles.

    session     16 bytes from the OS's CSPRNG, new at every start of the process
    peers       names of the workers, in order of preference
    """

    def __init__(
        self,
        session: bytes,
        catalogue: Catalogue,
        peers: Sequence[str],
        config: OwnerConfig | None = None,
    ) -> None:
        if not peers or len(set(peers)) != len(peers):
            raise MisuseError("name at least one worker, each once")
        self._session = session
        self._catalogue = catalogue
        self._config = config or OwnerConfig()
        self._peers = {name: _Peer(name) for name in peers}
        self._calls: dict[int, _Call] = {}
        self._last_call = 0
        self._aborted = ""
        self._closing = False
        self._closed = False
        self._actions: dict[str, Callable[..., list[Effect]]] = {
            "greet": self._greet,
            "ready": self._ready,
            "accept": self._accept,
            "refused": self._refused,
            "give_up": self._give_up,
            "bye": self._bye,
            "closed": lambda peer, *_: [CancelTimer(f"session:{peer.name}")],
            "ignore": self._ignore,
        }

    def state(self, peer: str) -> State:
        """State of the session with a worker."""
        return self._peers[peer].state

    def call_state(self, call: int) -> CallState:
        """State of a call; DONE once it was delivered or failed."""
        return self._calls[call].state if call in self._calls else CallState.DONE

    def handle(self, event: Event, now: float) -> list[Effect]:
        """React to one event. Raises MisuseError for what only a wrong driver could do."""
        effects = self._react(event)
        ended = all(p.state in (State.CLOSED, State.LOST) for p in self._peers.values())
        if self._closing and ended and not self._closed:
            self._closed = True
            effects = [*effects, Closed()]
        return effects

    def _react(self, event: Event) -> list[Effect]:
        match event:
            case Start():
                return [e for peer in self._peers.values() for e in self._step(peer, Input.START)]
            case FrameArrived(name, frame):
                try:
                    return self._on_message(self._peer(name), decode(frame))
                except ProtocolError as error:
                    return [Dropped(name, str(error))]
            case PeerLost(name):
                return self._step(self._peer(name), Input.LOST)
            case TimerFired(timer):
                return self._on_timer(timer)
            case TaskDone(task, result):
                return self._on_task(task, result)
            case TaskFailed(task, reason):
                call = self._calls.get(task)
                return [] if call is None else [*self._fail(call, reason), *self._pump()]
            case LinearWanted():
                return self._on_linear(event)
            case CloseWanted():
                return self._on_close()

    # --- events ---------------------------------------------------------------------------

    def _on_message(self, peer: _Peer, message: Message) -> list[Effect]:
        if message.session != self._session:
            raise ProtocolError("a frame of another session")
        match message:
            case Welcome():
                if (message.parameters_digest, message.model_digest) != (
                    self._catalogue.parameters_digest,
                    self._catalogue.model_digest,
                ):
                    raise ProtocolError("welcomed to another model or parameter set")
                return self._step(peer, Input.WELCOME, message)
            case Product():
                return self._step(peer, Input.PRODUCT, message)
            case Refuse(reason=Reason.NO_SESSION):
                if peer.state is State.READY and peer.forgot >= self._config.attempts_max:
                    return self._step(peer, Input.EXHAUSTED, message)
                return self._step(peer, Input.FORGOTTEN, message)
            case Refuse(request=0):
                return self._step(peer, Input.REFUSED_SESSION, message)
            case Refuse():
                return self._step(peer, Input.REFUSED_CALL, message)
            case Farewell():
                return self._step(peer, Input.FAREWELL, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for an owner")

    def _on_timer(self, timer: str) -> list[Effect]:
        kind, _, name = timer.partition(":")
        if kind == "session":
            peer = self._peer(name)
            used_up = peer.attempts >= self._config.attempts_max
            return self._step(peer, Input.EXHAUSTED if used_up else Input.TIMEOUT)
        call = self._calls.get(int(name)) if kind == "call" else None
        if call is None or call.state is not CallState.IN_FLIGHT:
            raise MisuseError(f"timer {timer!r} is not set")
        if call.attempts >= self._config.attempts_max:
            return self._step(self._peers[call.peer], Input.EXHAUSTED)
        self._move(call, CallInput.TIMEOUT)
        return self._transmit(call)

    def _on_linear(self, wanted: LinearWanted) -> list[Effect]:
        if wanted.call <= self._last_call:
            raise MisuseError(f"call {wanted.call} does not follow call {self._last_call}")
        if not 0 <= wanted.matrix < len(self._catalogue.matrices):
            raise MisuseError(f"the catalogue has no matrix {wanted.matrix}")
        self._last_call = wanted.call
        if self._aborted or self._closing:
            return [FailCall(wanted.call, self._aborted or "the session is closing")]
        self._calls[wanted.call] = _Call(wanted.call, wanted.matrix, wanted.tokens)
        return [RunTask(wanted.call, Encrypt(wanted.matrix, wanted.tokens, wanted.x))]

    def _on_task(self, task: int, result: object) -> list[Effect]:
        call = self._calls.get(task)
        if call is None:
            # The call failed while its task was running; the result has nowhere to go.
            return []
        if call.state is CallState.ENCRYPTING:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise MisuseError("an encryption task returns (payload, sealed)")
            payload, call.sealed = result
            if len(payload) != self._catalogue.up_bytes(call.matrix, call.tokens):
                raise MisuseError("the ciphertext's size does not match the catalogue")
            call.frame = encode(Multiply(self._session, call.id, call.matrix, call.tokens, payload))
            self._move(call, CallInput.ENCRYPTED)
            return self._pump()
        self._move(call, CallInput.DECRYPTED)
        del self._calls[call.id]
        return [Deliver(call.id, result), *self._pump()]

    def _on_close(self) -> list[Effect]:
        self._closing = True
        effects: list[Effect] = []
        for call in list(self._calls.values()):
            effects += self._fail(call, "the session is closing")
        for peer in self._peers.values():
            peer.attempts = 0
            effects += self._step(peer, Input.CLOSE)
        return effects

    # --- steps ----------------------------------------------------------------------------

    def _peer(self, name: str) -> _Peer:
        try:
            return self._peers[name]
        except KeyError:
            raise MisuseError(f"no worker is called {name!r}") from None

    def _step(self, peer: _Peer, kind: Input, message: Message | None = None) -> list[Effect]:
        try:
            following, action = SESSIONS[peer.state, kind]
        except KeyError:
            text = f"{kind.value} while {peer.state.value}"
            if kind in (Input.START, Input.TIMEOUT, Input.EXHAUSTED):
                raise MisuseError(text) from None
            raise ProtocolError(text) from None
        peer.state = following
        return self._actions[action](peer, kind, message)

    def _move(self, call: _Call, kind: CallInput) -> None:
        try:
            call.state = CALLS[call.state, kind]
        except KeyError:
            raise MisuseError(f"call {call.id}: {kind.value} while {call.state.value}") from None

    def _patience(self, base_s: float, attempts: int) -> float:
        return min(base_s * 2.0 ** (attempts - 1), self._config.timeout_s_max)

    def _pump(self) -> list[Effect]:
        """Send what waits, oldest first, to workers with room."""
        effects: list[Effect] = []
        ready = [peer.name for peer in self._peers.values() if peer.state is State.READY]
        load = dict.fromkeys(ready, 0)
        for call in self._calls.values():
            if call.state is CallState.IN_FLIGHT and call.peer in load:
                load[call.peer] += 1
        for call in list(self._calls.values()):
            if call.state is not CallState.WAITING:
                continue
            able = [name for name in ready if self._peers[name].max_tokens >= call.tokens]
            if ready and not able:
                effects += self._fail(
                    call,
                    f"{call.tokens} tokens in one micro-batch; the worker takes at most "
                    f"{max(self._peers[name].max_tokens for name in ready)}: "
                    "use smaller micro-batches",
                )
                continue
            chosen = least_loaded(able, load, self._config.window)
            if chosen is None:
                continue
            load[chosen] += 1
            call.peer, call.attempts = chosen, 0
            self._move(call, CallInput.SENT)
            effects += self._transmit(call)
        return effects

    def _transmit(self, call: _Call) -> list[Effect]:
        call.attempts += 1
        delay_s = self._patience(self._config.request_timeout_s, call.attempts)
        return [Send(call.peer, call.frame), SetTimer(f"call:{call.id}", delay_s)]

    def _fail(self, call: _Call, reason: str) -> list[Effect]:
        timer: list[Effect] = []
        if call.state is CallState.IN_FLIGHT:
            timer = [CancelTimer(f"call:{call.id}")]
        self._move(call, CallInput.FAILED)
        del self._calls[call.id]
        return [*timer, FailCall(call.id, reason)]

    # --- actions --------------------------------------------------------------------------

    def _ignore(self, peer: _Peer, _: Input, message: Message | None) -> list[Effect]:
        return [] if message is None else [Dropped(peer.name, "late or duplicate")]

    def _greet(self, peer: _Peer, kind: Input, _: Message | None) -> list[Effect]:
        if kind is not Input.TIMEOUT:
            peer.attempts = 0
        if kind is Input.FORGOTTEN:
            peer.forgot += 1
        hello = Hello(
            self._session, self._catalogue.parameters_digest, self._catalogue.model_digest
        )
        return [*self._orphan(peer), *self._send_session(peer, hello)]

    def _send_session(self, peer: _Peer, message: Hello | Bye) -> list[Effect]:
        peer.attempts += 1
        delay_s = self._patience(self._config.hello_timeout_s, peer.attempts)
        return [Send(peer.name, encode(message)), SetTimer(f"session:{peer.name}", delay_s)]

    def _ready(self, peer: _Peer, _: Input, welcome: Welcome) -> list[Effect]:
        peer.attempts = 0
        peer.max_tokens = welcome.max_tokens
        return [CancelTimer(f"session:{peer.name}"), *self._pump()]

    def _accept(self, peer: _Peer, _: Input, product: Product) -> list[Effect]:
        call = self._calls.get(product.request)
        if call is None or call.state is not CallState.IN_FLIGHT or call.peer != peer.name:
            return [Dropped(peer.name, "answer to no call in flight")]
        if len(product.payload) != self._catalogue.down_bytes(call.matrix, call.tokens):
            raise ProtocolError("an answer of the wrong size")
        self._move(call, CallInput.ANSWERED)
        peer.forgot = 0
        call.frame = b""
        work = Decrypt(call.matrix, call.tokens, call.sealed, product.payload)
        call.sealed = None
        return [CancelTimer(f"call:{call.id}"), RunTask(call.id, work), *self._pump()]

    def _refused(self, peer: _Peer, _: Input, refuse: Refuse) -> list[Effect]:
        call = self._calls.get(refuse.request)
        if call is None or call.state is not CallState.IN_FLIGHT or call.peer != peer.name:
            return [Dropped(peer.name, "refusal of no call in flight")]
        if refuse.reason in _RETRIED:
            # The call's timer is running; the same bytes go out again when it fires.
            return []
        name = self._catalogue.matrices[call.matrix].name
        text = _REFUSAL_TEXT[refuse.reason]
        return [*self._fail(call, f"worker {peer.name!r} refused {name}: {text}"), *self._pump()]

    def _orphan(self, peer: _Peer) -> list[Effect]:
        effects: list[Effect] = []
        for call in self._calls.values():
            if call.state is CallState.IN_FLIGHT and call.peer == peer.name:
                self._move(call, CallInput.ORPHANED)
                effects.append(CancelTimer(f"call:{call.id}"))
        return effects

    def _give_up(self, peer: _Peer, kind: Input, message: Message | None) -> list[Effect]:
        if isinstance(message, Refuse):
            peer.why_lost = _REFUSAL_TEXT[message.reason]
        else:
            peer.why_lost = "no answer" if kind is Input.EXHAUSTED else "connection lost"
        effects = [CancelTimer(f"session:{peer.name}"), *self._orphan(peer)]
        if any(p.state not in (State.LOST, State.CLOSED) for p in self._peers.values()):
            return [*effects, *self._pump()]
        self._aborted = "no worker left: " + "; ".join(
            f"{p.name!r}: {p.why_lost}" for p in self._peers.values() if p.why_lost
        )
        for call in list(self._calls.values()):
            effects += self._fail(call, self._aborted)
        return [*effects, Abort(self._aborted)]

    def _bye(self, peer: _Peer, kind: Input, _: Message | None) -> list[Effect]:
        return self._send_session(peer, Bye(self._session))
