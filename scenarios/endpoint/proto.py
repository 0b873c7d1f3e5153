"""The few binary messages of the client's package, in protocol buffers' wire format.

The format is a row of fields, each a number, a type and a value; that is all that is written here,
so that the endpoint needs neither a compiler of schemas nor another package. Field numbers are
those of `tinker_public.proto`, whose own code `tests/scenarios/test_endpoint_client.py` reads and
writes against this.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT32, INT64, INT32 = 1, 2, 3
"""Of the message's own enumeration of dtypes."""

_FIELDS_MAX = 100_000
_DTYPES: dict[int, np.dtype[Any]] = {
    FLOAT32: np.dtype("<f4"),
    INT64: np.dtype("<i8"),
    INT32: np.dtype("<i4"),
}


class ProtoError(ValueError):
    """Bytes that are no such message."""


@dataclass(frozen=True)
class TensorMessage:
    """A dense tensor of one dimension: float32[n] or int64[n]."""

    values: NDArray[Any]


@dataclass(frozen=True)
class DatumMessage:
    """tokens int32[n] of one sequence, and its loss's tensors by name."""

    tokens: NDArray[np.int32]
    inputs: dict[str, TensorMessage]


@dataclass(frozen=True)
class PassMessage:
    """A `ForwardBackwardRequest`."""

    model_id: str
    seq_id: int
    data: list[DatumMessage]
    loss_fn: str
    config: dict[str, float | str]
    forward_only: bool


def read_pass(body: bytes) -> PassMessage:
    """A `ForwardBackwardRequest` of untrusted bytes. Provenance of tokens is not looked at.

    Raises ProtoError for anything else, and for images, sound, sparse tensors and tensors of more
    than one dimension, which are not supported.
    """
    budget = [_FIELDS_MAX]
    model_id, seq_id, loss_fn, forward_only = "", 0, "", False
    data: list[DatumMessage] = []
    old: dict[str, float | str] = {}
    config: dict[str, float | str] = {}
    for number, value in _fields(body, budget):
        if number == 1:
            model_id = _text(value)
        elif number == 2:
            seq_id = _whole(value)
        elif number == 3:
            data.append(_datum(_bytes(value), budget))
        elif number == 4:
            loss_fn = _text(value)
        elif number == 5:
            name, held = _entry(_bytes(value), budget)
            old[name] = _double(held)
        elif number == 6:
            forward_only = bool(_whole(value))
        elif number == 7:
            name, held = _entry(_bytes(value), budget)
            config[name] = _setting(_bytes(held), budget)
    return PassMessage(model_id, seq_id, data, loss_fn, config or old, forward_only)


def read_address(body: bytes) -> tuple[str, int, bool]:
    """(model_id, seq_id, forward_only) of a `ForwardBackwardRequest`, whatever its data are.

    Of a message that is broken, as far as it can be read; 0 for a seq_id that was not found.
    """
    model_id, seq_id, forward_only = "", 0, False
    try:
        for number, value in _fields(body, [_FIELDS_MAX]):
            if number == 1:
                model_id = _text(value)
            elif number == 2:
                seq_id = _whole(value)
            elif number == 6:
                forward_only = bool(_whole(value))
    except ProtoError:
        forward_only = False
    return model_id, seq_id, forward_only


def write_outputs(logprobs: Sequence[NDArray[np.float32]], loss: float) -> bytes:
    """A `ForwardBackwardOutput`: float32[n] of each datum, and the sum of the loss."""
    lengths = [4 * len(each) for each in logprobs]
    offsets = np.cumsum([0, *lengths], dtype="<i8")
    raw = b"".join(each.astype("<f4").tobytes() for each in logprobs)
    batched = _part(1, raw) + _part(2, offsets.tobytes()) + _number(3, FLOAT32)
    entry = _part(1, b"logprobs") + _part(2, batched)
    record = _part(1, b"ArrayRecord") + _part(2, entry) + _number(3, len(logprobs))
    metric = _part(1, b"loss:sum") + _key(2, FIXED64) + struct.pack("<d", loss)
    return _part(1, b"ArrayRecord") + _part(2, record) + _part(3, metric)


def write_samples(
    sequences: Sequence[tuple[bool, NDArray[np.int32], NDArray[np.float32]]],
    prompt_logprobs: NDArray[np.float32] | None,
) -> bytes:
    """A `SampleResponse`: of each sequence whether it stopped by itself, its tokens, and their
    logprobs; and those of the prompt, NaN where there is none."""
    found = b""
    for stopped, tokens, logprobs in sequences:
        raw = _part(2, tokens.astype("<i4").tobytes()) + _part(3, logprobs.astype("<f4").tobytes())
        found += _part(1, _number(1, 0 if stopped else 1) + raw)
    if prompt_logprobs is not None:
        found += _part(2, prompt_logprobs.astype("<f4").tobytes())
    return found


def _datum(body: bytes, budget: list[int]) -> DatumMessage:
    chunks, inputs = [], {}
    for number, value in _fields(body, budget):
        if number == 1:
            chunks.append(_chunk(_bytes(value), budget))
        elif number == 2:
            name, held = _entry(_bytes(value), budget)
            inputs[name] = _tensor(name, _bytes(held), budget)
    empty = np.zeros(0, np.int32)
    return DatumMessage(np.concatenate([empty, *chunks]), inputs)


def _chunk(body: bytes, budget: list[int]) -> NDArray[np.int32]:
    found: NDArray[np.int32] = np.zeros(0, np.int32)
    for number, value in _fields(body, budget):
        if number != 1:
            raise ProtoError("images and sound are not supported: text only")
        for inner, raw in _fields(_bytes(value), budget):
            if inner == 1:
                found = _array(_bytes(raw), INT32).astype(np.int32)
    return found


def _tensor(name: str, body: bytes, budget: list[int]) -> TensorMessage:
    raw, dtype, shape = b"", 0, list[int]()
    for number, value in _fields(body, budget):
        if number == 1:
            raw = _bytes(value)
        elif number == 2:
            raise ProtoError(f"{name[:40]!r} is sparse, which is not supported")
        elif number == 3:
            dtype = _whole(value)
        elif number == 4:
            shape += _packed(value)
    values = _array(raw, dtype)
    if len(shape) > 1 or (shape and shape[0] != len(values)):
        raise ProtoError(
            f"{name[:40]!r} is no row of one number a token; several targets a token are not "
            "supported"
        )
    return TensorMessage(values.astype(np.float32 if dtype == FLOAT32 else np.int64))


def _array(raw: bytes, dtype: int) -> NDArray[Any]:
    kind = _DTYPES.get(dtype)
    if kind is None or len(raw) % kind.itemsize:
        raise ProtoError("a tensor of another dtype, or cut")
    return np.frombuffer(raw, kind)


def _packed(value: int | bytes) -> list[int]:
    if isinstance(value, int):
        return [value]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(number)
        if len(found) > 8:
            raise ProtoError("a tensor of too many dimensions")
    return found


def _entry(body: bytes, budget: list[int]) -> tuple[str, int | bytes]:
    """A map's entry: (key, value)."""
    held = dict(_fields(body, budget))
    return _text(held.get(1, b"")), held.get(2, b"")


def _setting(body: bytes, budget: list[int]) -> float | str:
    held = dict(_fields(body, budget))
    return _text(held[2]) if 2 in held else _double(held.get(1, bytes(8)))


def _fields(body: bytes, budget: list[int]) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each; a varint as an int, all else as its bytes."""
    place = 0
    while place < len(body):
        budget[0] -= 1
        if budget[0] < 0:
            raise ProtoError(f"more than {_FIELDS_MAX:,} fields")
        key, place = _varint(body, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(body, place)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, place = _varint(body, place)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ProtoError("a field of no known type")
        if size > len(body) - place:
            raise ProtoError("cut")
        yield key >> 3, body[place : place + size]
        place += size


def _varint(body: bytes, place: int) -> tuple[int, int]:
    found = 0
    for index in range(10):
        if place >= len(body):
            raise ProtoError("cut")
        found |= (body[place] & 127) << (7 * index)
        place += 1
        if body[place - 1] < 128:
            return found & 0xFFFF_FFFF_FFFF_FFFF, place
    raise ProtoError("a number that does not end")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ProtoError("a number where a message should be")
    return value


def _whole(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ProtoError("a message where a number should be")
    return value - (1 << 64) if value >> 63 else value


def _text(value: int | bytes) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ProtoError("a text that is not UTF-8") from error


def _double(value: int | bytes) -> float:
    raw = _bytes(value)
    if len(raw) != 8:
        raise ProtoError("a number of another size")
    return float(struct.unpack("<d", raw)[0])


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _written(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _number(number: int, value: int) -> bytes:
    return _key(number, VARINT) + _written(value)


def _part(number: int, value: bytes) -> bytes:
    return _key(number, BYTES) + _written(len(value)) + value
