"""Hostile frames for the decoder and both machines, in this process, with a good peer beside them.

The cipher here is a hash: a worker's product is the hash of the request's bytes, so a right answer
is known and everything else is wrong.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.fuzz.inputs import Frames, stream
from benchmarks.fuzz.verdict import Verdict, memory_bytes
from protocol.admission import Quota
from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import ProtocolError
from protocol.events import (
    Abort,
    AnswerRejected,
    CancelTimer,
    CloseWanted,
    Decrypt,
    Deliver,
    Disconnected,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
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
    HEADER_BYTES,
    Hello,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    announced_bytes,
    decode,
    encode,
)
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.worker import Worker, WorkerConfig

CATALOGUE = Catalogue(
    b"m" * 32, b"p" * 32,
    (MatrixShape("a", 1, 2, 4, 8), MatrixShape("b", 2, 1, 6, 4), MatrixShape("c", 1, 1, 1, 1)),
)  # fmt: skip
GOOD, OTHER = b"session-of-good!", b"another-session!"
SLOW_S = 5.0
"""One event may take a machine so long on a loaded machine; more is a hang."""
GROWTH_BYTES = 64 << 20
"""This process may grow by so much over all inputs: machines are replaced, nothing is kept."""
_LIFE = 1500
"""Inputs that a worker's machine sees before the next one takes its place."""
_OWNER_LIFE = 300
"""The same for an owner's: its hostile workers are soon retired."""
_LIMITS = WorkerConfig(max_tokens=64, quota=Quota(requests=2), max_peers=6)
_HOSTILE_PEERS = 7


def product_of(work: MultiplyCiphertext) -> bytes:
    """The right answer to a request."""
    return _expand(bytes(work.payload), CATALOGUE.down_bytes(work.matrix, work.tokens))


def _raw(message: Message) -> bytes:
    frame = encode(message)
    assert isinstance(frame, bytes)
    return frame


def _expand(data: bytes, size: int) -> bytes:
    return hashlib.shake_128(data).digest(size)


@contextmanager
def watched(verdict: Verdict, what: str) -> Iterator[None]:
    """What raises is a crash, what takes too long is a hang."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        verdict.crash(f"{what}: {type(error).__name__}: {error}"[:300])
    if time.perf_counter() - start > SLOW_S:
        verdict.hang(f"{what} took {time.perf_counter() - start:.1f} s")


# --- the decoder ------------------------------------------------------------------------------


def throw_at_decoder(
    seed: int, count: int, verdict: Verdict, decoder: Callable[[bytes], object] = decode
) -> None:
    """Frames for the decoder: a message that encodes to the same bytes, or a ProtocolError."""
    frames = Frames(stream(seed, "decoder"), CATALOGUE, (GOOD, OTHER, bytes(16)))
    for _ in range(count):
        kind, frame = frames.draw()
        verdict.inputs[f"decoder: {kind}"] += 1
        with watched(verdict, f"decoder, {kind} {frame[:48].hex()}"):
            _decode(frame, decoder, verdict)


def _decode(frame: bytes, decoder: Callable[[bytes], object], verdict: Verdict) -> None:
    try:
        if len(frame) >= HEADER_BYTES:
            announced_bytes(frame[:HEADER_BYTES])
        message = decoder(frame)
    except ProtocolError:
        return
    again = encode(message)  # type: ignore[arg-type]
    if isinstance(message, Refuse):  # is read whatever its version says
        again = again[:4] + frame[4:5] + again[5:]
    if again != frame:
        verdict.crash(f"the decoder took {frame[:64].hex()}, which no encoder makes")


# --- the worker's machine ---------------------------------------------------------------------


class WorkerStage:
    """A worker's machine, a good peer, and peers that throw frames at it."""

    def __init__(self, rng: random.Random, verdict: Verdict) -> None:
        self._rng, self._verdict = rng, verdict
        self.worker = Worker(CATALOGUE, _LIMITS)
        self._running: dict[int, MultiplyCiphertext] = {}
        self._whose: dict[int, str] = {}
        self._request = 0
        self.handle(FrameArrived("good", encode(Hello(GOOD, b"p" * 32, b"m" * 32))))

    def handle(self, event: Event) -> list[Effect]:
        """One event; what it asks for may concern its peer only."""
        effects = self.worker.handle(event, 0.0)
        for effect in effects:
            match effect:
                case RunTask(task, MultiplyCiphertext() as work):
                    assert isinstance(event, FrameArrived)
                    self._running[task], self._whose[task] = work, event.peer
                    self._count(event.peer)
                case Send(peer, _) | Dropped(peer, _):
                    if isinstance(event, FrameArrived) and peer != event.peer:
                        self._verdict.crash(f"a frame of {event.peer} reached {peer}")
                case _:
                    self._verdict.crash(f"a worker asked for {type(effect).__name__}")
        return effects

    def _count(self, peer: str) -> None:
        count = sum(self._whose[task] == peer for task in self._running)
        if count > _LIMITS.quota.requests:
            self._verdict.memory(f"{count} products of {peer} in work")

    def plausible(self) -> tuple[str, str, bytes]:
        """(peer, kind, frame) that lets a hostile peer go on: all of it is right."""
        rng = self._rng
        peer = f"bad{rng.randrange(_HOSTILE_PEERS)}"
        if rng.random() < 0.2:
            return peer, "right Hello", _raw(Hello(OTHER, b"p" * 32, b"m" * 32))
        matrix, tokens = rng.randrange(3), rng.randint(1, 4)
        payload = rng.randbytes(CATALOGUE.up_bytes(matrix, tokens))
        request = Multiply(OTHER, rng.randrange(20), matrix, tokens, payload)
        return peer, "right Multiply", _raw(request)

    def throw(self, kind: str, frame: bytes, peer: str = "") -> None:
        """One hostile frame, and now and then something else that happens."""
        peer = peer or f"bad{self._rng.randrange(_HOSTILE_PEERS)}"
        with watched(self._verdict, f"worker, {kind} {frame[:48].hex()}"):
            self.handle(FrameArrived(peer, frame))
            chance = self._rng.random()
            if chance > 0.99:
                self.handle(PeerLost(peer))
            if chance < 0.02 and self._running:
                self._end(self._rng.choice(list(self._running)))

    def _end(self, task: int) -> list[Effect]:
        work = self._running.pop(task)
        if self._rng.random() < 0.1:
            return self.handle(TaskFailed(task, "drawn"))
        return self.handle(TaskDone(task, product_of(work)))

    def ask(self) -> None:
        """The good peer asks, and must get its product."""
        self._request += 1
        payload = self._rng.randbytes(8)
        frame = encode(Multiply(GOOD, self._request, 0, 2, payload))
        with watched(self._verdict, "worker, a good request"):
            before = set(self._running)
            self.handle(FrameArrived("good", frame))
            effects: list[Effect] = []
            for task in set(self._running) - before:
                right = product_of(self._running.pop(task))
                effects = self.handle(TaskDone(task, right))
                expected = encode(Product(GOOD, self._request, right))
                if effects == [Send("good", expected)]:
                    return
            self._verdict.hang(f"a good request led to {effects}")


def throw_at_worker(seed: int, count: int, verdict: Verdict) -> None:
    """Frames for the worker's machine; the good peer asks every few of them."""
    rng = stream(seed, "worker")
    frames = Frames(rng, CATALOGUE, (*(OTHER,) * 6, GOOD, bytes(16)))
    stage = WorkerStage(rng, verdict)
    for index in range(count):
        if index % _LIFE == 0:
            stage = WorkerStage(rng, verdict)
        peer, (kind, frame) = "", frames.draw()
        if rng.random() < 0.2:
            peer, kind, frame = stage.plausible()
        verdict.inputs[f"worker's machine: {kind}"] += 1
        stage.throw(kind, frame, peer)
        if index % 25 == 24:
            stage.ask()


# --- the owner's machine ----------------------------------------------------------------------


class OwnerStage:
    """An owner's machine with an honest worker and two hostile ones."""

    HOSTILE = ("bad1", "bad2")

    def __init__(self, rng: random.Random, frames: Frames, verdict: Verdict) -> None:
        self._rng, self._frames, self._verdict = rng, frames, verdict
        self.now, self.call = 0.0, 0
        self.timers: dict[str, float] = {}
        self.wanted: dict[int, bytes] = {}
        frames.requests = [0, 1, 2, 3]
        self._asked: dict[str, Multiply] = {}
        self._worker = Worker(CATALOGUE)
        # The honest worker comes last: what can go to a hostile one first, does.
        config = OwnerConfig(window=2, attempts_max=2, greetings_max=2, refusals_max=6)
        self._owner = Owner(GOOD, CATALOGUE, (*self.HOSTILE, "honest"), config)
        self.handle(Start())

    def handle(self, event: Event) -> None:
        """One event, and all that follows from it on this side and at the honest worker."""
        waiting = [event]
        while waiting:
            for effect in self._owner.handle(waiting.pop(0), self.now):
                waiting += self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> list[Event]:
        match effect:
            case Send("honest", frame):
                return self._honest(FrameArrived("owner", frame))
            case Send(peer, frame):
                message = decode(frame)
                if isinstance(message, Multiply):
                    self._asked[peer] = message
                    self._frames.requests = [0, message.request, message.request + 1]
            case SetTimer(timer, delay_s):
                self.timers[timer] = self.now + delay_s
            case CancelTimer(timer):
                self.timers.pop(timer, None)
            case RunTask(task, work):
                return [self._compute(task, work)]
            case Deliver(call, result):
                if result != self.wanted.pop(call):
                    self._verdict.hang(f"call {call} was given a wrong answer")
            case FailCall(call, reason):
                self.wanted.pop(call, None)
                self._verdict.hang(f"call {call} failed beside an honest worker: {reason}")
            case Abort(reason):
                self._verdict.hang(f"the owner gave up beside an honest worker: {reason}")
            case _:
                pass
        return []

    def _honest(self, event: Event) -> list[Event]:
        told: list[Event] = []
        for effect in self._worker.handle(event, self.now):
            if isinstance(effect, Send):
                told.append(FrameArrived("honest", effect.frame))
            elif isinstance(effect, RunTask) and isinstance(effect.work, MultiplyCiphertext):
                told += self._honest(TaskDone(effect.task, product_of(effect.work)))
        return told

    def _compute(self, task: int, work: object) -> Event:
        if isinstance(work, Encrypt):
            payload = _expand(
                task.to_bytes(8, "little"), CATALOGUE.up_bytes(work.matrix, work.tokens)
            )
            return TaskDone(task, (payload, payload))
        assert isinstance(work, Decrypt)
        request = MultiplyCiphertext(work.matrix, work.tokens, work.sealed)
        right = product_of(request)
        if bytes(work.payload) != right:
            return AnswerRejected(task, "not the product")
        return TaskDone(task, right)

    def throw(self, kind: str, frame: bytes, peer: str = "") -> None:
        """One hostile frame, and now and then something else that happens."""
        rng = self._rng
        peer = peer or rng.choice(self.HOSTILE)
        with watched(self._verdict, f"owner, {kind} {frame[:48].hex()}"):
            self.handle(FrameArrived(peer, frame))
            chance = rng.random()
            if chance < 0.02:
                self.handle(Disconnected(peer))
            elif chance < 0.03:
                self.handle(PeerLost(peer))
            elif chance < 0.1:
                self.fire()

    def plausible(self) -> tuple[str, str, bytes]:
        """(worker, kind, frame) that lets a hostile worker go on: right, or nearly."""
        rng = self._rng
        peer = rng.choice(self.HOSTILE)
        asked = self._asked.get(peer)
        if asked is None or rng.random() < 0.4:
            most = rng.choice((1, 2, 64))
            return peer, "right Welcome", _raw(Welcome(GOOD, b"p" * 32, b"m" * 32, most))
        if rng.random() < 0.4:
            reason = rng.choice((Reason.BUSY, Reason.FAILED, Reason.NO_SESSION))
            return peer, "refusal of what was asked", _raw(Refuse(GOOD, asked.request, reason))
        work = MultiplyCiphertext(asked.matrix, asked.tokens, asked.payload)
        product = bytearray(product_of(work))
        if rng.random() < 0.3:
            product[rng.randrange(len(product))] ^= 1 << rng.randrange(8)
        return peer, "product, nearly right", _raw(Product(GOOD, asked.request, bytes(product)))

    def fire(self) -> None:
        """The next timer runs out."""
        if self.timers:
            timer = min(self.timers, key=lambda name: (self.timers[name], name))
            self.now = max(self.now, self.timers.pop(timer))
            self.handle(TimerFired(timer))

    def ask(self) -> None:
        """A lane asks; whatever the hostile workers say meanwhile, it gets the right answer."""
        rng = self._rng
        self.call += 1
        matrix, tokens = rng.randrange(3), rng.randint(1, 4)
        sealed = _expand(self.call.to_bytes(8, "little"), CATALOGUE.up_bytes(matrix, tokens))
        self.wanted[self.call] = product_of(MultiplyCiphertext(matrix, tokens, sealed))
        with watched(self._verdict, "owner, a call"):
            self.handle(LinearWanted(self.call, matrix, tokens, ()))

    def finish(self) -> None:
        """All that was asked for is delivered, when time passes; and the sessions close."""
        with watched(self._verdict, "owner, the rest"):
            for _ in range(400):
                if not self.wanted:
                    break
                self.fire()
            if self.wanted:
                self._verdict.hang(f"calls {sorted(self.wanted)} were never answered")
                self.wanted.clear()
            self.handle(CloseWanted())


def throw_at_owner(seed: int, count: int, verdict: Verdict) -> None:
    """Frames of hostile workers for the owner's machine, while its lanes go on asking."""
    rng = stream(seed, "owner")
    frames = Frames(rng, CATALOGUE, (GOOD, GOOD, GOOD, OTHER))
    stage = OwnerStage(rng, frames, verdict)
    for index in range(count):
        if index % _OWNER_LIFE == 0:
            stage.finish()
            stage = OwnerStage(rng, frames, verdict)
        if index % 20 == 0:
            stage.ask()
        peer, (kind, frame) = "", frames.draw()
        if rng.random() < 0.2:
            peer, kind, frame = stage.plausible()
        verdict.inputs[f"owner's machine: {kind}"] += 1
        stage.throw(kind, frame, peer)
    stage.finish()


def throw_at_machines(seed: int, count: int, verdict: Verdict) -> None:
    """Half of them for the decoder, a quarter for each machine."""
    parts = ((throw_at_decoder, count - 2 * (count // 4)), (throw_at_worker, count // 4),
             (throw_at_owner, count // 4))  # fmt: skip
    for throw, share in parts:
        throw(seed, min(share, 1000), Verdict())  # caches fill, and code is loaded
    before = memory_bytes()
    for throw, share in parts:
        throw(seed, share, verdict)
    grown = memory_bytes() - before
    verdict.figures["in_process_growth_bytes"] = grown
    if grown > GROWTH_BYTES:
        verdict.memory(f"this process grew by {grown} bytes over {count} inputs")
