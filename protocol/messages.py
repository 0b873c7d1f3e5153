"""The seven messages, and their one binary encoding.

Rules
  * A frame is self-contained: header, then a body of the length the header states, no more.
  * Everything is bounded before it is read; an unknown version, kind or reason is an error.
  * A frame holds public facts and ciphertext only. There is no field for free text, so
    nothing private can slip into one.
  * A payload on a GPU may stay there for a receiver in the same process: a `LocalFrame` is a
    frame in two pieces. No transport carries one, and nothing else makes one.

The header, and the body of Refuse up to its reason, keep their layout in every version: so two
sides can tell each other that they speak different ones.

Header, 28 bytes, little endian: magic "PFTL", version u8, kind u8, zero u16, session 16 bytes
(the owner's incarnation, fresh random bytes at every start), body length u32.

In sync with: docs/protocol.md (the table of bodies), the machines in owner.py and worker.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

from protocol.errors import ProtocolError, VersionError

VERSION = 2
MAGIC = b"PFTL"
SESSION_BYTES = 16
DIGEST_BYTES = 32
MAX_BODY_BYTES = 1 << 30
_HEADER = struct.Struct("<4sBBH16sI")
HEADER_BYTES = _HEADER.size
_MULTIPLY = struct.Struct("<QII")
_PRODUCT = struct.Struct("<Q")
_REFUSE = struct.Struct("<QH")
_BUSY = struct.Struct("<QHI")
_DIGESTS = struct.Struct("<32s32s")
_WELCOME = struct.Struct("<32s32sI")

OVERHEAD_BYTES = HEADER_BYTES + max(s.size for s in (_MULTIPLY, _PRODUCT, _WELCOME, _DIGESTS))
"""Bytes that no frame exceeds by more than its payload."""

Bytes: TypeAlias = bytes | bytearray | memoryview
Payload: TypeAlias = Any
"""Ciphertext: `Bytes`, or memory on a device, opaque but for len() and nbytes, which are equal."""


def _on_host(payload: object) -> bool:
    return isinstance(payload, bytes | bytearray | memoryview)


def is_payload(thing: object) -> bool:
    """Whether this can be a payload."""
    return _on_host(thing) or hasattr(thing, "nbytes")


@dataclass(frozen=True)
class LocalFrame:
    """A frame whose payload stays on the device it was computed on."""

    head: bytes
    payload: Payload = field(repr=False)

    def __len__(self) -> int:
        return len(self.head) + len(self.payload)


Frame: TypeAlias = bytes | LocalFrame


class Reason(IntEnum):
    """Why a worker refuses. The only thing a refusal says."""

    OTHER_VERSION = 1
    OTHER_PARAMETERS = 2
    OTHER_MODEL = 3
    NO_SESSION = 4
    UNKNOWN_MATRIX = 5
    WRONG_SIZE = 6
    TOO_MANY_TOKENS = 7
    BUSY = 8
    FAILED = 9


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_session(session: bytes) -> None:
    _require(len(session) == SESSION_BYTES, f"a session id has {SESSION_BYTES} bytes")


def _check_unsigned(value: int, bits: int, what: str) -> None:
    _require(0 <= value < 1 << bits, f"{what} must fit {bits} unsigned bits, got {value}")


@dataclass(frozen=True)
class Hello:
    """Owner opens a session and pins what both sides must agree on."""

    session: bytes
    parameters_digest: bytes
    model_digest: bytes

    def __post_init__(self) -> None:
        _check_session(self.session)
        for digest in (self.parameters_digest, self.model_digest):
            _require(len(digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes")


@dataclass(frozen=True)
class Welcome:
    """Worker agrees. `max_tokens` bounds the tokens of one request."""

    session: bytes
    parameters_digest: bytes
    model_digest: bytes
    max_tokens: int

    def __post_init__(self) -> None:
        _check_session(self.session)
        _check_unsigned(self.max_tokens, 32, "max_tokens")
        _require(self.max_tokens >= 1, "a worker takes at least one token")
        for digest in (self.parameters_digest, self.model_digest):
            _require(len(digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes")


@dataclass(frozen=True)
class Multiply:
    """Owner asks for ciphertext x matrix. `request` is unique within the session."""

    session: bytes
    request: int
    matrix: int
    tokens: int
    payload: Payload = field(repr=False)

    def __post_init__(self) -> None:
        _check_session(self.session)
        _check_unsigned(self.request, 64, "request")
        _check_unsigned(self.matrix, 32, "matrix")
        _check_unsigned(self.tokens, 32, "tokens")


@dataclass(frozen=True)
class Product:
    """Worker's answer to the request of the same number."""

    session: bytes
    request: int
    payload: Payload = field(repr=False)

    def __post_init__(self) -> None:
        _check_session(self.session)
        _check_unsigned(self.request, 64, "request")


@dataclass(frozen=True)
class Refuse:
    """Worker will not answer a request (or, with request 0, will not open the session).

    after_ms  of BUSY: milliseconds until it is worth asking again; 0 where nobody knows
    """

    session: bytes
    request: int
    reason: Reason
    after_ms: int = 0

    def __post_init__(self) -> None:
        _check_session(self.session)
        _check_unsigned(self.request, 64, "request")
        _check_unsigned(self.after_ms, 32, "after_ms")
        _require(self.reason is Reason.BUSY or not self.after_ms, "only BUSY says when")


@dataclass(frozen=True)
class Bye:
    """Owner closes the session."""

    session: bytes

    def __post_init__(self) -> None:
        _check_session(self.session)


@dataclass(frozen=True)
class Farewell:
    """Worker confirms the close."""

    session: bytes

    def __post_init__(self) -> None:
        _check_session(self.session)


Message: TypeAlias = Hello | Welcome | Multiply | Product | Refuse | Bye | Farewell

_KIND: dict[type[Message], int] = {
    Hello: 1, Welcome: 2, Multiply: 3, Product: 4, Refuse: 5, Bye: 6, Farewell: 7,
}  # fmt: skip
_FIXED_BYTES = {_KIND[Multiply]: _MULTIPLY.size, _KIND[Product]: _PRODUCT.size}


def encode(message: Message) -> Frame:
    """The frame of a message. Raises ValueError when the body is over MAX_BODY_BYTES."""
    fixed = b""
    payload: Payload = b""
    match message:
        case Hello():
            fixed = _DIGESTS.pack(message.parameters_digest, message.model_digest)
        case Welcome():
            fixed = _WELCOME.pack(
                message.parameters_digest, message.model_digest, message.max_tokens
            )
        case Multiply():
            fixed = _MULTIPLY.pack(message.request, message.matrix, message.tokens)
            payload = message.payload
        case Product():
            fixed, payload = _PRODUCT.pack(message.request), message.payload
        case Refuse():
            fixed = _REFUSE.pack(message.request, message.reason)
            if message.after_ms:
                fixed = _BUSY.pack(message.request, message.reason, message.after_ms)
        case Bye() | Farewell():
            pass
    on_host = _on_host(payload)
    # In bytes: len() of a view counts its items, which may be wider.
    size = len(fixed) + (memoryview(payload).nbytes if on_host else payload.nbytes)
    _require(size <= MAX_BODY_BYTES, f"a body has at most {MAX_BODY_BYTES} bytes, got {size}")
    header = _HEADER.pack(MAGIC, VERSION, _KIND[type(message)], 0, message.session, size)
    if on_host:
        return b"".join((header, fixed, payload))
    return LocalFrame(header + fixed, payload)


def announced_bytes(header: Bytes) -> int:
    """Bytes of the body that a header of HEADER_BYTES announces; not yet believed in any way.

    Raises ProtocolError when it is no header of this protocol.
    """
    magic, _, _, _, _, size = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError("not a frame of this protocol")
    return int(size)


def decode(frame: Bytes | LocalFrame) -> Message:
    """The message of a frame; payloads are views into it, not copies.

    Raises ProtocolError for anything that `encode` could not have made.
    """
    detached = frame.payload if isinstance(frame, LocalFrame) else None
    view = memoryview(frame.head if isinstance(frame, LocalFrame) else frame)
    view = view.toreadonly().cast("B")
    length = len(view) if detached is None else len(view) + len(detached)
    if len(view) < HEADER_BYTES:
        raise ProtocolError(f"frame of {len(view)} bytes is shorter than a header")
    magic, version, kind, zero, session, size = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise ProtocolError("not a frame of this protocol")
    if version != VERSION and kind != _KIND[Refuse]:
        raise VersionError(session, version, VERSION)
    if zero != 0 or size > MAX_BODY_BYTES or size != length - HEADER_BYTES:
        raise ProtocolError("header and frame length disagree")
    body = view[HEADER_BYTES:]
    try:
        return _decode_body(kind, session, body, detached)
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"malformed body of kind {kind}") from error


def _decode_body(kind: int, session: bytes, body: memoryview, detached: Payload | None) -> Message:
    if kind in _FIXED_BYTES:
        rest = body[_FIXED_BYTES[kind] :]
        if detached is not None and len(rest):
            raise ProtocolError("a frame with two payloads")
        payload = rest if detached is None else detached
    elif detached is not None:
        raise ProtocolError(f"a message of kind {kind} has no payload")
    match kind:
        case 1:
            return Hello(session, *_DIGESTS.unpack(body))
        case 2:
            return Welcome(session, *_WELCOME.unpack(body))
        case 3:
            request, matrix, tokens = _MULTIPLY.unpack_from(body)
            return Multiply(session, request, matrix, tokens, payload)
        case 4:
            (request,) = _PRODUCT.unpack_from(body)
            return Product(session, request, payload)
        case 5:
            if len(body) != _BUSY.size:
                request, reason = _REFUSE.unpack(body)
                return Refuse(session, request, Reason(reason))
            request, reason, after_ms = _BUSY.unpack(body)
            _require(after_ms > 0, "a time to come back in is not 0")
            return Refuse(session, request, Reason(reason), after_ms)
        case 6 | 7:
            if len(body):
                raise ProtocolError("a closing message has no body")
            return Bye(session) if kind == 6 else Farewell(session)
        case _:
            raise ProtocolError(f"unknown message kind {kind}")
