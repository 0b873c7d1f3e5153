"""The owner's machine: it turns a lane's linear into one encrypted request and its answer.

Rules
  * A call's frame is made once and never changes; every sending of it is the same bytes.
  * An answer counts only under this owner's session id, for a call in flight, from the worker it
    was sent to last, with exactly the bytes the catalogue says.
  * Every wait has a timer; every timer is cancelled or answered; attempts are bounded.
  * Malformed or misplaced frames are dropped and counted; they change no state.
  * Every sealed handle opens the answer that is delivered, or is discarded, once, and never while
    a task works with it.

The theory, and every transition: owner_tables.py.
In sync with: worker.py (the other side), messages.py, docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from protocol.catalogue import Catalogue
from protocol.errors import MisuseError, ProtocolError
from protocol.events import (
    Abort,
    AnswerRejected,
    CancelTimer,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Discard,
    Disconnected,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    PeerLost,
    Retired,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.fleet import Fleet
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
)
from protocol.owner_memory import REFUSAL_TEXT, Call, OwnerConfig, Peer
from protocol.owner_tables import CALLS, FRAMES, SESSIONS, CallInput, CallState, Input, State
from protocol.placement import Placement

_RETRIED = frozenset({Reason.BUSY, Reason.FAILED})
_OVER = frozenset({State.CLOSED, State.LOST, State.RETIRED})
# A worker nobody has heard of since it was lost is no reason to wait: two of them, greeted in turn,
# would keep each other's calls waiting for ever.
_NO_HELP = _OVER | {State.REVIVING}


class Owner:
    """`handle(event, now) -> effects`. Holds no key: secrets stay in the driver's sealed handles.

    session     16 bytes from the OS's CSPRNG, new at every start of the process
    peers       names of the workers, in order of preference
    placement   which worker may hold which matrix; every worker holds all without one
    retired     workers that an earlier session found lying, and what was found: never used
    """

    def __init__(
        self,
        session: bytes,
        catalogue: Catalogue,
        peers: Sequence[str],
        config: OwnerConfig | None = None,
        placement: Placement | None = None,
        retired: Mapping[str, str] | None = None,
    ) -> None:
        if not peers or len(set(peers)) != len(peers):
            raise MisuseError("name at least one worker, each once")
        self._session = session
        self._catalogue = catalogue
        self._config = config or OwnerConfig()
        self._placement = placement or Placement.everywhere(peers, len(catalogue.matrices))
        self._placement.check(peers, len(catalogue.matrices))
        self._peers = {name: Peer(name) for name in peers}
        for name, found in (retired or {}).items():
            if name in self._peers:
                self._peers[name] = Peer(name, State.RETIRED, why_lost=found)
        self._calls: dict[int, Call] = {}
        self._left: dict[int, Call] = {}  # failed, and a task still works with their secrets
        self._fleet = Fleet(self._peers, self._calls, self._placement, self._config)
        self._last_call = 0
        self._now = 0.0
        self._aborted = ""
        self._closing = False
        self._closed = False
        self._actions: dict[str, Callable[..., list[Effect]]] = {
            "greet": self._greet,
            "ready": self._ready,
            "accept": self._accept,
            "refused": self._refused,
            "lose": self._lose,
            "retire": self._retire,
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
        self._now = max(self._now, now)  # a clock that was put back tells nothing
        effects = self._react(event)
        ended = all(p.state in _OVER for p in self._peers.values())
        if self._closing and ended and not self._closed:
            self._closed = True
            effects = [*effects, Closed()]
        return effects

    def _react(self, event: Event) -> list[Effect]:
        match event:
            case Start():
                greetings = [self._step(peer, Input.START) for peer in self._peers.values()]
                return [effect for effects in greetings for effect in effects] + self._go_on()
            case FrameArrived(name, frame):
                try:
                    return self._on_message(self._peer(name), decode(frame))
                except ProtocolError as error:
                    return [Dropped(name, str(error))]
            case Disconnected(name):
                return self._on_disconnected(self._peer(name))
            case PeerLost(name, reason):
                peer = self._peer(name)
                if peer.state is not State.RETIRED:
                    peer.why_lost = reason
                return self._step(peer, Input.LOST)
            case TimerFired(timer):
                return self._on_timer(timer)
            case TaskDone(task, result):
                return self._on_task(task, result)
            case TaskFailed(task, reason):
                return self._on_task_failed(task, reason)
            case AnswerRejected(task, reason):
                return self._on_rejected(task, reason)
            case LinearWanted():
                return self._on_linear(event)
            case CloseWanted():
                return self._on_close()

    # --- events ---------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: Message) -> list[Effect]:
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
                return self._step(peer, self._forgotten(peer, message), message)
            case Refuse(request=0):
                return self._step(peer, Input.REFUSED_SESSION, message)
            case Refuse():
                return self._step(peer, Input.REFUSED_CALL, message)
            case Farewell():
                return self._step(peer, Input.FAREWELL, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for an owner")

    def _forgotten(self, peer: Peer, refuse: Refuse) -> Input:
        """A late refusal must not end a session that was opened since."""
        if peer.state is not State.READY:
            return Input.FORGOTTEN
        if self._in_flight(peer, refuse.request) is None:
            return Input.REFUSED_CALL
        used_up = peer.forgot >= self._config.attempts_max
        return Input.EXHAUSTED if used_up else Input.FORGOTTEN

    def _on_disconnected(self, peer: Peer) -> list[Effect]:
        if self._aborted:
            return []
        if peer.state is not State.READY:
            return self._step(peer, Input.DISCONNECTED)
        peer.dropped += 1
        used_up = peer.dropped > self._config.attempts_max
        return self._step(peer, Input.EXHAUSTED if used_up else Input.DISCONNECTED)

    def _on_timer(self, timer: str) -> list[Effect]:
        kind, _, name = timer.partition(":")
        if kind == "session":
            peer = self._peer(name)
            counted = {
                State.GREETING: self._config.greetings_max,
                State.CLOSING: self._config.attempts_max,
            }
            used_up = peer.state in counted and peer.attempts >= counted[peer.state]
            return self._step(peer, Input.EXHAUSTED if used_up else Input.TIMEOUT)
        call = self._calls.get(int(name)) if kind == "call" else None
        if call is None or call.state is not CallState.IN_FLIGHT:
            raise MisuseError(f"timer {timer!r} is not set")
        return self._send_again(call)

    def _send_again(self, call: Call) -> list[Effect]:
        """A wait is over: the same bytes to another worker that holds the matrix, or once more."""
        config, peer, attempts = self._config, self._peers[call.peer], call.attempts
        another = self._fleet.choose(call, self._fleet.loads(), {peer.name})
        if not attempts and another is not None:
            # It was a wait after refusals, and no silence; who refused last is asked last.
            return self._pass_on(call, another)
        if another is None and attempts < config.attempts_max:
            self._move(call, CallInput.TIMEOUT)
            return self._transmit(call)
        call.silences += 1
        peer.silences += 1
        effects: list[Effect] = []
        if call.silences >= config.refusals_max:
            # Workers that greet but never answer would else be asked in turn for ever.
            layer = self._catalogue.matrices[call.matrix].name
            reason = f"no worker answered {layer}, tried {call.silences} times"
            effects = [*self._fail(call, reason), *self._pump()]
        elif another is not None:
            effects = self._pass_on(call, another)
        if max(attempts, peer.silences) >= config.attempts_max:
            effects += self._step(peer, Input.EXHAUSTED)
        return effects

    def _pass_on(self, call: Call, another: str) -> list[Effect]:
        """A call of one worker to another; the first is asked less from then on."""
        self._peers[call.peer].hesitated()
        self._move(call, CallInput.ORPHANED)
        return self._dispatch(call, another)

    def _on_linear(self, wanted: LinearWanted) -> list[Effect]:
        if wanted.call <= self._last_call:
            raise MisuseError(f"call {wanted.call} does not follow call {self._last_call}")
        if not 0 <= wanted.matrix < len(self._catalogue.matrices):
            raise MisuseError(f"the catalogue has no matrix {wanted.matrix}")
        self._last_call = wanted.call
        if self._aborted or self._closing:
            return [FailCall(wanted.call, self._aborted or "the session is closing")]
        most = self._catalogue.tokens_max(wanted.matrix)
        if wanted.tokens > most:
            return [FailCall(wanted.call, _too_many(wanted.tokens, "a frame", most))]
        size = self._catalogue.both_bytes(wanted.matrix, wanted.tokens)
        self._calls[wanted.call] = Call(wanted.call, wanted.matrix, wanted.tokens, size)
        return [RunTask(wanted.call, Encrypt(wanted.matrix, wanted.tokens, wanted.x))]

    def _on_task(self, task: int, result: object) -> list[Effect]:
        call = self._calls.get(task)
        if call is None:
            # The call failed while its task was running; the result has nowhere to go.
            return self._discard(self._left.pop(task, None), result)
        if call.state is CallState.ENCRYPTING:
            payload, call.sealed = _encrypted(result)
            if len(payload) != self._catalogue.up_bytes(call.matrix, call.tokens):
                raise MisuseError("the ciphertext's size does not match the catalogue")
            call.frame = encode(Multiply(self._session, call.id, call.matrix, call.tokens, payload))
            self._move(call, CallInput.ENCRYPTED)
            return self._pump()
        self._move(call, CallInput.DECRYPTED)
        del self._calls[call.id]
        return [Deliver(call.id, result), *self._pump()]

    def _on_task_failed(self, task: int, reason: str) -> list[Effect]:
        call = self._calls.get(task)
        if call is None:
            return self._discard(self._left.pop(task, None))
        failed = self._fail(call, reason)
        return [*failed, *self._discard(self._left.pop(task, None)), *self._pump()]

    def _on_rejected(self, task: int, reason: str) -> list[Effect]:
        call = self._calls.get(task)
        if call is None:
            return self._discard(self._left.pop(task, None))
        # Back in the queue first: retiring the worker sends what waits to the others.
        self._move(call, CallInput.REJECTED)
        peer = self._peers[call.peer]
        peer.why_lost = reason
        return [*self._step(peer, Input.WRONG_ANSWER), *self._pump()]

    def _on_close(self) -> list[Effect]:
        if self._closing:
            return []
        self._closing = True
        effects: list[Effect] = []
        for call in list(self._calls.values()):
            effects += self._fail(call, "the session is closing")
        for peer in self._peers.values():
            peer.attempts = 0
            effects += self._step(peer, Input.CLOSE)
        return effects

    # --- steps ----------------------------------------------------------------------------

    def _peer(self, name: str) -> Peer:
        try:
            return self._peers[name]
        except KeyError:
            raise MisuseError(f"no worker is called {name!r}") from None

    def _step(self, peer: Peer, kind: Input, message: Message | None = None) -> list[Effect]:
        try:
            following, action = SESSIONS[peer.state, kind]
        except KeyError:
            text = f"{kind.value} while {peer.state.value}"
            if kind not in FRAMES:
                raise MisuseError(text) from None
            raise ProtocolError(text) from None
        peer.state = following
        return self._actions[action](peer, kind, message)

    def _move(self, call: Call, kind: CallInput) -> None:
        try:
            call.state = CALLS[call.state, kind]
        except KeyError:
            raise MisuseError(f"call {call.id}: {kind.value} while {call.state.value}") from None

    def _in_flight(self, peer: Peer, request: int) -> Call | None:
        """The call a frame of `peer` speaks of, if it waits for exactly that."""
        call = self._calls.get(request)
        if call is None or call.state is not CallState.IN_FLIGHT or call.peer != peer.name:
            return None
        return call

    def _pump(self) -> list[Effect]:
        """Send what waits, oldest first, to workers with room."""
        effects: list[Effect] = []
        waiting = [call for call in self._calls.values() if call.state is CallState.WAITING]
        loads = self._fleet.loads() if waiting else {}
        for call in waiting:
            holders = self._placement.holders(call.matrix, loads)
            most = max((self._peers[name].max_tokens for name in holders), default=call.tokens)
            if most < call.tokens and not self._fleet.coming(call.matrix):
                effects += self._fail(call, _too_many(call.tokens, "the worker", most))
                continue
            chosen = self._fleet.choose(call, loads)
            if chosen is not None:
                loads[chosen] = loads[chosen].more(call)
                effects += self._dispatch(call, chosen)
        return effects

    def _dispatch(self, call: Call, peer: str) -> list[Effect]:
        call.peer, call.attempts, call.sent_s = peer, 0, self._now
        self._move(call, CallInput.SENT)
        return self._transmit(call)

    def _transmit(self, call: Call) -> list[Effect]:
        call.attempts += 1
        return [
            Send(call.peer, call.frame),
            SetTimer(f"call:{call.id}", self._fleet.patience(call)),
        ]

    def _fail(self, call: Call, reason: str) -> list[Effect]:
        timer: list[Effect] = []
        if call.state is CallState.IN_FLIGHT:
            timer = [CancelTimer(f"call:{call.id}")]
        working = call.state in (CallState.ENCRYPTING, CallState.DECRYPTING)
        self._move(call, CallInput.FAILED)
        del self._calls[call.id]
        if working:
            self._left[call.id] = call
        return [*timer, FailCall(call.id, reason), *([] if working else self._discard(call))]

    def _discard(self, call: Call | None, encrypted: object = None) -> list[Effect]:
        """Give up the secrets of a call that has failed, and whose tasks have ended.

        encrypted  what an encryption returned that ended after its call
        """
        if call is None:
            return []
        if not call.frame and encrypted is not None:
            _, call.sealed = _encrypted(encrypted)
        return [] if call.sealed is None else [Discard(call.id, call.sealed)]

    # --- actions --------------------------------------------------------------------------

    def _ignore(self, peer: Peer, _: Input, message: Message | None) -> list[Effect]:
        return [] if message is None else [Dropped(peer.name, "late or duplicate")]

    def _greet(self, peer: Peer, kind: Input, _: Message | None) -> list[Effect]:
        if kind is not Input.TIMEOUT or peer.state is State.REVIVING:
            peer.attempts = 0
        if kind is Input.FORGOTTEN:
            peer.forgot += 1
        hello = Hello(
            self._session, self._catalogue.parameters_digest, self._catalogue.model_digest
        )
        orphaned = self._orphan(peer)
        others = self._pump() if orphaned else []
        return [*orphaned, *self._send_session(peer, hello), *others]

    def _send_session(self, peer: Peer, message: Hello | Bye) -> list[Effect]:
        peer.attempts += 1
        delay_s = self._config.doubled(self._config.hello_timeout_s, peer.attempts)
        return [Send(peer.name, encode(message)), SetTimer(f"session:{peer.name}", delay_s)]

    def _ready(self, peer: Peer, _: Input, welcome: Welcome) -> list[Effect]:
        peer.attempts = 0
        peer.max_tokens = welcome.max_tokens
        peer.why_lost = ""
        return [CancelTimer(f"session:{peer.name}"), *self._pump()]

    def _accept(self, peer: Peer, _: Input, product: Product) -> list[Effect]:
        call = self._in_flight(peer, product.request)
        if call is None:
            return [Dropped(peer.name, "answer to no call in flight")]
        if len(product.payload) != self._catalogue.down_bytes(call.matrix, call.tokens):
            raise ProtocolError("an answer of the wrong size")
        self._move(call, CallInput.ANSWERED)
        peer.answered(call.sent_s, self._now, call.size)
        work = Decrypt(call.matrix, call.tokens, call.sealed, product.payload, peer.name)
        return [CancelTimer(f"call:{call.id}"), RunTask(call.id, work), *self._pump()]

    def _refused(self, peer: Peer, _: Input, refuse: Refuse) -> list[Effect]:
        call = self._in_flight(peer, refuse.request)
        if call is None:
            return [Dropped(peer.name, "refusal of no call in flight")]
        if refuse.after_ms and peer.heard_s > call.refused_s:
            # Its quota is used by other calls of this owner: it serves, and this one's turn comes.
            call.refusals = 0
        call.refusals += 1
        call.refused_s = self._now
        call.refused_by.add(peer.name)
        if refuse.reason in _RETRIED and call.refusals < self._config.refusals_max:
            return self._retry(call, refuse.after_ms / 1e3)
        name = self._catalogue.matrices[call.matrix].name
        text = f"refused {name}: {REFUSAL_TEXT[refuse.reason]}"
        if call.refusals >= self._config.refusals_max:
            failed = self._fail(call, f"worker {peer.name!r} {text}, tried {call.refusals} times")
            return [*failed, *self._pump()]
        # It agreed to the catalogue, and said itself how many tokens it takes: the fault is its.
        peer.why_lost = f"it {text}"
        return self._step(peer, Input.CONTRADICTED)

    def _retry(self, call: Call, after_s: float) -> list[Effect]:
        """Another worker at once, or the same one a little later. Either way it is alive.

        after_s  what it says that it is worth waiting, at least; not believed beyond reason
        """
        chosen = self._fleet.choose(call, self._fleet.loads(), call.refused_by)
        timer = f"call:{call.id}"
        # Each other worker is tried once without delay; after that everybody is given time.
        if chosen is not None:
            return [CancelTimer(timer), *self._pass_on(call, chosen), *self._pump()]
        call.attempts = 0
        waits = 1 + call.refusals - len(call.refused_by)
        delay_s = self._config.doubled(self._config.retry_s, waits)
        return [SetTimer(timer, max(delay_s, min(after_s, self._config.timeout_s_max)))]

    def _orphan(self, peer: Peer) -> list[Effect]:
        effects: list[Effect] = []
        for call in self._calls.values():
            if call.state is CallState.IN_FLIGHT and call.peer == peer.name:
                self._move(call, CallInput.ORPHANED)
                effects.append(CancelTimer(f"call:{call.id}"))
        return effects

    def _lose(self, peer: Peer, kind: Input, message: Message | None) -> list[Effect]:
        if isinstance(message, Refuse):
            peer.why_lost = REFUSAL_TEXT[message.reason]
        elif kind is Input.EXHAUSTED or kind is Input.TIMEOUT:
            peer.why_lost = "no answer"
        peer.losses += 1
        again = SetTimer(f"session:{peer.name}", self._config.revived_s(peer.losses))
        return self._without(peer, again)

    def _retire(self, peer: Peer, *_: object) -> list[Effect]:
        told = Retired(peer.name, peer.why_lost)
        return [told, *self._without(peer, CancelTimer(f"session:{peer.name}"))]

    def _without(self, peer: Peer, timer: Effect) -> list[Effect]:
        """Go on without a worker."""
        if self._aborted:
            return [CancelTimer(f"session:{peer.name}")]
        return [timer, *self._orphan(peer), *self._go_on()]

    def _go_on(self) -> list[Effect]:
        """With the workers that are left, or give up when a matrix has none to hold it."""
        if self._aborted:
            return []
        left = [p.name for p in self._peers.values() if p.state not in _NO_HELP]
        if self._placement.covered(left):
            return self._pump()
        self._aborted = "no worker left: " + "; ".join(
            f"{p.name!r}: {p.why_lost}" for p in self._peers.values() if p.why_lost
        )
        effects: list[Effect] = []
        for call in list(self._calls.values()):
            effects += self._fail(call, self._aborted)
        effects += [CancelTimer(f"session:{name}") for name in self._peers]
        return [*effects, Abort(self._aborted)]

    def _bye(self, peer: Peer, kind: Input, _: Message | None) -> list[Effect]:
        return self._send_session(peer, Bye(self._session))


def _encrypted(result: object) -> tuple[Payload, object]:
    """(payload, sealed) of an encryption task. Raises MisuseError."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise MisuseError("an encryption task returns (payload, sealed)")
    return result


def _too_many(tokens: int, who: str, most: int) -> str:
    return (
        f"{tokens} tokens in one micro-batch; {who} takes at most {most}: use smaller micro-batches"
    )
