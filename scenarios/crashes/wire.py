"""What passed over the line in plain text: who asked what, and whether a secret served twice.

A parser of its own for the frames that docs/protocol.md describes. Of every request it keeps the
session, the number, the SHA-256 of its bytes, and a few numbers of the ciphertext.

What can be seen of secrets from outside. A ciphertext is B = A*s + e + m, rounded, with a public
matrix A that is the same for all. With a fresh secret s, B is as good as uniform. Of two
ciphertexts under one s, the difference is that of messages and errors alone, and both are small
beside p: all their coefficients are close together mod p, which of two fresh ones never happens.
So every two requests are compared, by fingerprints of their high digits, whatever their sessions
and matrices. The same bytes under two names are the same secret, too.

What cannot be seen: errors or check rows that repeat, a generator whose keys differ and are still
known to somebody, secrets that stay in memory, secrets of blocks after the first 256 tokens of a
request, and whatever passes inside TLS.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_PREFACE = struct.Struct("<4sBBH16s")
_HEADER = struct.Struct("<4sBBH16sI")
_REQUEST = struct.Struct("<QII")
_OWNER_WRITES = 0
_MULTIPLY = 3
_LIMBS = 3  # p = 2^24
_TOKENS_SEEN, _COLUMNS_SEEN, _GROUP = 2, 24, 4
_CLOSE = 1 << 16
"""Of 2^24: messages of the campaign's model differ by a tenth of that."""


@dataclass
class Life:
    """What one life of the owner put on the line: its sessions, and its distinct requests."""

    sessions: set[bytes] = field(default_factory=set)
    requests: set[tuple[bytes, int]] = field(default_factory=set)


class Wire:
    """Reads plain text on its way from owners to workers; safe to call from several threads."""

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self.reused: list[str] = []
        """What was seen of secrets that serve twice, one line each."""
        self.unreadable: list[str] = []
        self.seen = 0
        self._lock = threading.Lock()
        self._life_of: dict[bytes, int] = {}
        self._bytes_of: dict[tuple[bytes, int], bytes] = {}
        self._first_with: dict[bytes, tuple[bytes, int]] = {}
        self._samples: dict[tuple[bytes, int], NDArray[np.int64]] = {}
        self._prints: dict[tuple[int, int, bytes], list[tuple[bytes, int]]] = {}

    def new_life(self) -> Life:
        """The owner is started; what comes from now on is of this life."""
        with self._lock:
            self.lives.append(Life())
            return self.lives[-1]

    def reader(self) -> Callable[[bytes], None]:
        """What reads one connection from its first byte."""
        return _Stream(self._frame, self._broken).take

    def _broken(self, why: str) -> None:
        with self._lock:
            self.unreadable.append(why)

    def _frame(self, kind: int, session: bytes, body: bytes) -> None:
        with self._lock:
            self._whose(session)
            if kind == _MULTIPLY:
                number, matrix, tokens = _REQUEST.unpack_from(body)
                self._request((session, number), matrix, tokens, body[_REQUEST.size :])

    def _whose(self, session: bytes) -> None:
        life = len(self.lives) - 1
        if self._life_of.setdefault(session, life) != life:
            self._life_of[session] = life
            self.reused.append(f"life {life + 1} has the session of an earlier one")
        self.lives[life].sessions.add(session)

    def _request(self, name: tuple[bytes, int], matrix: int, tokens: int, payload: bytes) -> None:
        self.seen += 1
        self.lives[-1].requests.add(name)
        digest = hashlib.sha256(struct.pack("<II", matrix, tokens) + payload).digest()
        before = self._bytes_of.setdefault(name, digest)
        if before != digest:
            self.reused.append(f"request {name[1]} was sent twice with different bytes")
            return
        first = self._first_with.setdefault(digest, name)
        if first != name:
            self.reused.append(f"requests {first[1]} and {name[1]} are the same ciphertext")
        elif name not in self._samples:
            self._compare(name, _sample(payload, tokens))

    def _compare(self, name: tuple[bytes, int], sample: NDArray[np.int64]) -> None:
        close: set[tuple[bytes, int]] = set()
        for t, row in enumerate(sample):
            high = (row >> 16).astype(np.uint8)
            for start in range(0, len(row) - _GROUP + 1, _GROUP):
                key = (t, start, high[start : start + _GROUP].tobytes())
                alike = self._prints.setdefault(key, [])
                close |= {other for other in alike if _near(self._samples[other], sample)}
                alike.append(name)
        self._samples[name] = sample
        if close:
            other = min(close)
            self.reused.append(f"requests {other[1]} and {name[1]} share a secret")


def _sample(payload: bytes, tokens: int) -> NDArray[np.int64]:
    """int64[t, k] in 0 .. 2^24: the first tokens' first numbers of int8[3, T, K] digit planes."""
    planes = np.frombuffer(payload, np.int8).reshape(_LIMBS, tokens, -1)
    part = planes[:, :_TOKENS_SEEN, :_COLUMNS_SEEN].astype(np.int64)
    value: NDArray[np.int64] = part[0] + (part[1] << 8) + (part[2] << 16)
    return np.mod(value, 1 << 24)


def _near(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    """Whether two samples are closer than two of fresh secrets ever are."""
    rows, columns = (min(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    apart = (a[:rows, :columns] - b[:rows, :columns]) % (1 << 24)
    small = np.minimum(apart, (1 << 24) - apart) < _CLOSE
    return bool(small.mean() > 0.5)


class _Stream:
    """One connection's bytes as frames. Only those on which the owner writes have any."""

    def __init__(
        self, on_frame: Callable[[int, bytes, bytes], None], on_broken: Callable[[str], None]
    ) -> None:
        self._on_frame, self._on_broken = on_frame, on_broken
        self._left = bytearray()
        self._begun = False
        self._frames = True

    def take(self, data: bytes) -> None:
        """More bytes, in order."""
        if not self._frames:
            return
        self._left += data
        if not self._begun and len(self._left) >= _PREFACE.size:
            magic, _, direction, _, _ = _PREFACE.unpack_from(self._left)
            del self._left[: _PREFACE.size]
            self._begun, self._frames = True, direction == _OWNER_WRITES
            if magic != b"PLNK":
                self._stop("a connection begins with something else than a preface")
        while self._begun and self._frames and len(self._left) >= _HEADER.size:
            magic, version, kind, _, session, size = _HEADER.unpack_from(self._left)
            if (magic, version) != (b"PFTL", 2):
                self._stop("a frame begins with something else than a header")
                return
            if len(self._left) < _HEADER.size + size:
                return
            body = bytes(self._left[_HEADER.size : _HEADER.size + size])
            del self._left[: _HEADER.size + size]
            self._on_frame(kind, session, body)

    def _stop(self, why: str) -> None:
        self._frames = False
        self._on_broken(why)
