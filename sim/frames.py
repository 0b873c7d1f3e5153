"""What the simulator reads of a frame without decoding it: which call it is about.

A simulated run looks at each frame several times, so it looks at fixed places. What is where is
taken from the frames that `protocol.messages` makes.
"""

from __future__ import annotations

import struct

from protocol.messages import HEADER_BYTES, SESSION_BYTES, Multiply, Product, encode

_KIND_AT = 5
_CALL = struct.Struct("<Q")
_NOBODY = bytes(SESSION_BYTES)
_HEADS = (encode(Multiply(_NOBODY, 1, 0, 1, b"")), encode(Product(_NOBODY, 1, b"")))
_PAYLOAD_AT = {head[_KIND_AT]: len(head) for head in _HEADS if isinstance(head, bytes)}


def payload_at(frame: bytes) -> int | None:
    """Where the ciphertext of a request or an answer begins; None for other frames."""
    return _PAYLOAD_AT.get(frame[_KIND_AT])


def call_of(frame: bytes) -> int:
    """The call that a request or an answer is about; 0 for other frames."""
    if frame[_KIND_AT] not in _PAYLOAD_AT:
        return 0
    return int(_CALL.unpack_from(frame, HEADER_BYTES)[0])
