"""What must never happen in a chaos run, watched from outside the machines.

Shares no code with `protocol/owner.py`, `worker.py` or `messages.py`: frames are read here with
this file's own idea of their layout, so that a mistake over there is not repeated over here.
Every check raises `Violation` at the moment the rule is broken.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import MatrixShape
from protocol.events import (
    Abort,
    AnswerRejected,
    Decrypt,
    Deliver,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    Retired,
    RunTask,
    Send,
    SetTimer,
    TaskDone,
    TaskFailed,
)

_HEADER = struct.Struct("<4sBBH16sI")
HELLO, WELCOME, MULTIPLY, PRODUCT, REFUSE, BYE, FAREWELL = range(1, 8)
_FIXED = {HELLO: 64, WELCOME: 68, REFUSE: 10, BYE: 0, FAREWELL: 0}
_TIMED_REFUSAL = 14
"""Bytes of a refusal that says when to come back."""
_CHI_SQUARE_MOST = 700.0
"""For 255 degrees of freedom: honest bytes exceed this with probability below 1e-40."""
_UNIFORM_BYTES = 5
"""The lowest of a number of 8 bytes below a prime of 53 bits or more."""
_WORD = 4
_OTHER_VERSION = (1).to_bytes(2, "little")


class Violation(Exception):
    """A promise was broken; the text says which."""


def require(condition: bool, what: str) -> None:
    """Raise Violation unless the condition holds."""
    if not condition:
        raise Violation(what)


@dataclass(frozen=True)
class Seen:
    """A frame as an observer reads it; `body` is what follows the numbers of its kind."""

    kind: int
    session: bytes
    request: int = 0
    matrix: int = 0
    tokens: int = 0
    body: bytes = field(default=b"", repr=False)


def read(frame: Any) -> Seen | None:
    """The frame, or None when it is not one of the seven messages, whole and exact."""
    data = bytes(frame)
    if len(data) < _HEADER.size:
        return None
    magic, version, kind, zero, session, size = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if (magic, version, zero, size) != (b"PFTL", 2, 0, len(body)):
        return None
    if kind == MULTIPLY and size >= 16:
        request, matrix, tokens = struct.unpack_from("<QII", body)
        return Seen(kind, session, request, matrix, tokens, body[16:])
    if kind == PRODUCT and size >= 8:
        return Seen(kind, session, struct.unpack_from("<Q", body)[0], body=body[8:])
    timed = kind == REFUSE and size == _TIMED_REFUSAL
    if _FIXED.get(kind) != size and not timed:
        return None
    request = struct.unpack_from("<Q", body)[0] if kind == REFUSE else 0
    return Seen(kind, session, request, body=body)


def _in_this_version(frame: Any) -> bytes:
    """A refusal of any version as one of this; other frames as they are."""
    data = bytes(frame)
    return data[:4] + b"\x02" + data[5:] if data[5:6] == bytes([REFUSE]) else data


def digest(data: Any) -> str:
    """A short name for some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def _windows(data: bytes, telling: bool = False) -> list[int]:
    """Every 8 bytes that start at a multiple of 4; with `telling`, without mere constants."""
    words = np.frombuffer(data, "<u4", len(data) // _WORD)
    pairs = words[:-1].astype(np.uint64) << np.uint64(32) | words[1:]
    if telling:
        # Zeros, and runs of one byte, are everywhere.
        varied = (words << np.uint32(8) | words >> np.uint32(24)) != words
        pairs = pairs[varied[:-1] & varied[1:] & (words[:-1] != words[1:])]
    windows: list[int] = pairs.tolist()
    return windows


class Wire:
    """Every frame a machine hands to the network, in either direction.

    words  ciphertexts are numbers of 8 bytes, else digit planes
    """

    def __init__(
        self, shapes: Sequence[MatrixShape], tokens: int, encrypted: bool, words: bool = False
    ) -> None:
        self._shapes = shapes
        self._words = words
        self._tokens = tokens
        self._encrypted = encrypted
        self.session = b""
        self.retired: set[str] = set()
        self._payloads: dict[tuple[bytes, int], tuple[str, int]] = {}
        self._senders: dict[str, tuple[bytes, int]] = {}
        self.last_target: dict[tuple[bytes, int], str] = {}
        self._plain: set[int] = set()
        self._counts: dict[tuple[int, int], NDArray[np.int64]] = {}

    def owner_starts(self, session: bytes) -> None:
        """A new incarnation of the owner."""
        require(session != self.session, "an owner's incarnation took the session id of another")
        self.session = session

    def from_owner(self, worker: str, frame: bytes) -> Seen:
        """A frame to a worker."""
        seen = read(frame)
        require(seen is not None, "the owner sent a malformed frame")
        assert seen is not None
        require(seen.session == self.session, "the owner sent a frame of another session")
        require(
            seen.kind in (HELLO, MULTIPLY, BYE), f"the owner sent a message of kind {seen.kind}"
        )
        require(worker not in self.retired, f"{worker} was retired and is used again")
        if self._encrypted:
            self._is_not_plain(frame)
        if seen.kind == MULTIPLY:
            require(seen.matrix < len(self._shapes), "a request for no matrix of the catalogue")
            require(seen.tokens == self._tokens, "a request with another number of tokens")
            up = self._shapes[seen.matrix].up_bytes(seen.tokens)
            require(len(seen.body) == up, "a request larger or smaller than its catalogue entry")
            key, name = (seen.session, seen.request), digest(seen.body)
            first = self._payloads.setdefault(key, (name, seen.matrix))
            require(first == (name, seen.matrix), "a retry did not send the same bytes")
            if self._encrypted:
                sender = self._senders.setdefault(name, key)
                require(sender == key, "two requests sent the same ciphertext")
                if key not in self.last_target:
                    self._count(seen)
            self.last_target[key] = worker
        return seen

    def from_worker(self, frame: bytes) -> Seen:
        """A frame to the owner."""
        seen = read(frame)
        require(seen is not None, "a worker sent a malformed frame")
        assert seen is not None
        require(
            seen.kind in (WELCOME, PRODUCT, REFUSE, FAREWELL),
            f"a worker sent a message of kind {seen.kind}",
        )
        if self._encrypted:
            self._is_not_plain(frame)
        if seen.kind == PRODUCT:
            asked = self._payloads.get((seen.session, seen.request))
            require(asked is not None, "a worker answered what was never asked")
            assert asked is not None
            down = self._shapes[asked[1]].down_bytes(self._tokens)
            require(len(seen.body) == down, "an answer larger or smaller than its catalogue entry")
        return seen

    def asked(self, session: bytes, request: int) -> int | None:
        """The matrix a request was for."""
        found = self._payloads.get((session, request))
        return None if found is None else found[1]

    def private(self, values: NDArray[np.float32]) -> None:
        """From now on, none of these values' bytes may be seen, as they are or quantised."""
        top = np.abs(values).max(axis=1, keepdims=True)
        coarse = np.round(values / np.where(top == 0, 1, top) * 127).astype(np.int8)
        for data in (values.tobytes(), coarse.tobytes()):
            self._plain.update(_windows(data, telling=True))

    def bytes_are_uniform(self) -> None:
        """Requests' payload bytes, pooled per matrix and digit plane, look like random bytes."""
        for (matrix, plane), counts in self._counts.items():
            expected = counts.sum() / 256
            if expected < 5:
                continue
            chi_square = float(((counts - expected) ** 2).sum() / expected)
            require(
                chi_square < _CHI_SQUARE_MOST,
                f"payload bytes of matrix {matrix}, digit {plane}, are not uniform",
            )

    def _is_not_plain(self, frame: bytes) -> None:
        for offset in range(_WORD):
            clean = self._plain.isdisjoint(_windows(frame[offset:]))
            require(clean, "private values were seen on the wire")

    def _count(self, seen: Seen) -> None:
        size = self._tokens * self._shapes[seen.matrix].in_features
        body = np.frombuffer(seen.body, np.uint8)
        if self._words:
            planes = list(body.reshape(-1, 8).T[:_UNIFORM_BYTES])
        else:  # the digits of the lowest plane may be packed, several to a byte
            planes = [body[start : start + size] for start in range(0, len(body), size)]
        for plane, values in enumerate(planes):
            counts = np.bincount(values, minlength=256)
            key = (seen.matrix, plane)
            self._counts[key] = self._counts.get(key, np.zeros(256, np.int64)) + counts


LieKey: TypeAlias = tuple[bytes, int, str]
"""(session, request, digest of the wrong product)."""


class OwnerWatch:
    """What the owner's machine does with each event, in one incarnation.

    lies        who told which lie
    states      the state of the session with each worker, by name, as the machine tells it
    timer_most  no timer may be longer (seconds)
    """

    def __init__(
        self,
        wire: Wire,
        lies: dict[LieKey, str],
        states: Callable[[], tuple[str, ...]],
        timer_most_s: float,
    ) -> None:
        self._wire = wire
        self._session = wire.session
        self._lies = lies
        self._states = states
        self._before: tuple[str, ...] = states()
        self._timer_most_s = timer_most_s
        self._encryptions: Counter[int] = Counter()
        self._ended: Counter[int] = Counter()
        self.rejected = 0
        self.aborted = False
        self.answer_of: dict[int, tuple[str, bytes]] = {}

    def saw(self, event: Event, effects: Sequence[Effect]) -> None:
        """One event, and all that the machine asked for in return."""
        before, self._before = self._before, self._states()
        if isinstance(event, FrameArrived):
            self._frame(event, effects, before)
        for effect in effects:
            self._effect(event, effect)
        if isinstance(event, AnswerRejected):
            self.rejected += 1
            peer = self.answer_of[event.task][0]
            require(peer in self._wire.retired, f"{peer} gave a wrong answer and was not retired")

    def _frame(
        self, event: FrameArrived, effects: Sequence[Effect], before: tuple[str, ...]
    ) -> None:
        seen = read(event.frame)
        if seen is None or seen.session != self._session:
            kind = "malformed frame" if seen is None else "frame of a stale session"
            # A refusal may say that its sender speaks another version: it is readable in any.
            if read(_in_this_version(event.frame)) is None or kind != "malformed frame":
                harmless = all(isinstance(effect, Dropped) for effect in effects)
                require(harmless and self._before == before, f"the owner reacted to a {kind}")
            return
        for effect in effects:
            if isinstance(effect, RunTask) and isinstance(effect.work, Decrypt):
                work = effect.work
                require(seen.kind == PRODUCT, "a decryption of what is no product")
                require(effect.task == seen.request, "an answer was matched to another request")
                require(bytes(work.payload) == seen.body, "a decryption of other bytes")
                key = (seen.session, seen.request)
                require(
                    self._wire.asked(*key) == work.matrix, "an answer was matched to another matrix"
                )
                require(
                    self._wire.last_target.get(key) == event.peer,
                    "an answer was taken from a worker that was not asked last",
                )
                self.answer_of[effect.task] = (event.peer, seen.body)

    def _effect(self, event: Event, effect: Effect) -> None:
        match effect:
            case RunTask(task, Encrypt()):
                self._encryptions[task] += 1
                require(self._encryptions[task] == 1, "a call was encrypted twice")
            case RunTask(task, Decrypt()):
                require(isinstance(event, FrameArrived), "a decryption without an answer")
            case Retired(peer):
                require(isinstance(event, AnswerRejected), f"{peer} retired without a wrong answer")
                liar, body = self.answer_of[event.task]  # type: ignore[union-attr]
                require(liar == peer, f"{peer} was retired for the answer of {liar}")
                lied = self._lies.get((self._session, event.task, digest(body))) == peer  # type: ignore[union-attr]
                require(lied, f"{peer} is honest and was retired")
                self._wire.retired.add(peer)
            case SetTimer(timer, delay_s):
                require(delay_s <= self._timer_most_s, f"timer {timer} waits {delay_s:.3g} s")
            case Deliver(call):
                self._ended[call] += 1
                require(self._ended[call] == 1, "a call was delivered twice")
                _, body = self.answer_of[call]
                key = (self._session, call, digest(body))
                require(key not in self._lies, "a lie was accepted")
            case Abort():
                require(not self.aborted, "the owner aborted twice")
                self.aborted = True


class WorkerWatch:
    """What one worker's machine does with each event, until it loses its memory."""

    def __init__(self, name: str, wire: Wire) -> None:
        self._name = name
        self._wire = wire
        self.session = b""
        self._in_work: dict[int, tuple[bytes, int]] = {}

    def saw(self, event: Event, effects: Sequence[Effect]) -> None:
        """One event, and all that the machine asked for in return."""
        if isinstance(event, TaskDone | TaskFailed):
            self._in_work.pop(event.task, None)
        if isinstance(event, FrameArrived) and read(event.frame) is None:
            self._malformed(effects)
        for effect in effects:
            if not (isinstance(effect, RunTask) and isinstance(effect.work, MultiplyCiphertext)):
                continue
            require(isinstance(event, FrameArrived), f"{self._name} computes without a request")
            assert isinstance(event, FrameArrived)
            seen = read(event.frame)
            require(
                seen is not None and seen.kind == MULTIPLY,
                f"{self._name} computes what is no request",
            )
            assert seen is not None
            key = (seen.session, seen.request)
            require(
                seen.session == self.session, f"{self._name} computes for a session it is not in"
            )
            require(
                bytes(effect.work.payload) == seen.body
                and self._wire.asked(*key) == effect.work.matrix,
                f"{self._name} computes something else than was asked",
            )
            require(key not in self._in_work.values(), f"{self._name} computes a request twice")
            self._in_work[effect.task] = key

    def _malformed(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            # It may say that it speaks another version; that needs no more than a header.
            answer = read(effect.frame) if isinstance(effect, Send) else None
            refuses = answer is not None and answer.body[8:] == _OTHER_VERSION
            require(
                isinstance(effect, Dropped) or refuses, f"{self._name} reacted to a malformed frame"
            )

    def job(self, task: int) -> tuple[bytes, int]:
        """(session, request) of a task in work."""
        return self._in_work[task]

    def sends(self, seen: Seen) -> None:
        """A frame it hands to the network."""
        if seen.kind == WELCOME:
            self.session = seen.session
        if seen.kind == PRODUCT:
            require(seen.session == self.session, f"{self._name} answers under another session")
