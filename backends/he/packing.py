"""Between arrays of whole bytes and what travels, in the layout that `wire.py` states.

Where a format uses all bits of its bytes nothing is copied. Elsewhere each byte on the wire is made
from one word, as many values beside each other as it holds, so that compilers make vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.wire import Format
from backends.threads import run_split

_GRAIN = 1 << 18  # values worth a thread

# What `specialised` puts into the loops below: bits of a packed value, and of the array's values.
_BITS = _WIDTH = 0
_WORD: Any = np.uint64


def _pack(words: Any, shift: int, packed: Any, first: int, last: int) -> None:
    """The _BITS bits from bit `shift` on of all values of a word -> a byte, for first..last."""
    # Slices, for whole ranges: indices that might be negative keep LLVM from making vectors.
    words, packed = words[first:last], packed[first:last]
    for i in range(packed.size):
        byte = _WORD(0)
        for part in range(8 // _BITS):
            value = words[i] >> _WORD(_WIDTH * part + shift) & _WORD((1 << _BITS) - 1)
            byte |= value << _WORD(_BITS * part)
        packed[i] = np.uint8(byte)


def _unpack(packed: Any, shift: int, words: Any, first: int, last: int) -> None:
    """The reverse; all other bits become zero."""
    words, packed = words[first:last], packed[first:last]
    for i in range(packed.size):
        byte, word = _WORD(packed[i]), _WORD(0)
        for part in range(8 // _BITS):
            value = byte >> _WORD(_BITS * part) & _WORD((1 << _BITS) - 1)
            word |= value << _WORD(_WIDTH * part + shift)
        words[i] = word


@jit.kernel
def _upper(values: Any, bits: int, upper: Any, first: int, last: int) -> None:
    """upper uint8 = values uint16 without their lowest `bits` bits, for first..last."""
    values, upper = values[first:last], upper[first:last]
    for i in range(upper.size):
        upper[i] = np.uint8(values[i] >> bits)


@jit.kernel
def _put_upper(upper: Any, bits: int, values: Any, first: int, last: int) -> None:
    """The reverse: beside the lowest bits, which are there."""
    values, upper = values[first:last], upper[first:last]
    for i in range(upper.size):
        values[i] |= np.uint16(upper[i]) << bits


@cache
def _loop(function: Callable[..., None], bits: int, width: int) -> Callable[..., None]:
    """`_pack` or `_unpack` for values of `width` bits, of which `bits` travel."""
    word = np.dtype(f"u{width // bits}").type
    case = f"{bits}of{width}"
    return jit.specialised(function, case, _BITS=bits, _WIDTH=width, _WORD=word)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False  # as what comes off the wire is: one compilation for all
    return view


def _packed(values: NDArray[Any], bits: int, shift: int, out: NDArray[np.uint8]) -> None:
    """values uint8 or uint16[T, n] -> out uint8[T * packed_bytes(n, bits)]."""
    tokens, count = values.shape
    each, width = 8 // bits, 8 * values.itemsize
    if count % each:
        whole = np.zeros((tokens, count + -count % each), values.dtype)
        whole[:, :count] = values
        values = whole
    words = np.ascontiguousarray(values).reshape(-1).view(f"u{width // bits}")
    loop, words = _loop(_pack, bits, width), _read_only(words)
    run_split(lambda a, b: loop(words, shift, out, a, b), out.size, _GRAIN // each)


def _unpacked(packed: NDArray[np.uint8], bits: int, shift: int, out: NDArray[Any]) -> None:
    """packed uint8[T * packed_bytes(n, bits)] -> out uint8 or uint16[T, n], contiguous."""
    tokens, count = out.shape
    each, width = 8 // bits, 8 * out.itemsize
    ragged = count % each
    whole = np.empty((tokens, count + -count % each), out.dtype) if ragged else out
    words = whole.reshape(-1).view(f"u{width // bits}")
    loop, packed = _loop(_unpack, bits, width), _read_only(packed)
    run_split(lambda a, b: loop(packed, shift, words, a, b), packed.size, _GRAIN // each)
    if ragged:
        out[:] = whole[:, :count]


def _copied(source: NDArray[Any], target: NDArray[Any]) -> None:
    """source -> target, both flat, cut to the target's type."""
    run_split(
        lambda a, b: np.copyto(target[a:b], source[a:b], casting="unsafe"), len(target), _GRAIN
    )


def pack_request(planes: NDArray[np.int8], format: Format) -> NDArray[np.uint8]:
    """planes int8[limbs, T, K], lowest digits first -> uint8[T * up_bytes(K)].

    The same memory where all bits are in use and the planes are contiguous. The lowest
    `unused_bits` bits of the lowest digits are taken to be zero.

    Raises ValueError when there are not as many planes as the format has limbs.
    """
    if planes.dtype != np.int8 or planes.ndim != 3 or len(planes) != format.limbs:
        raise ValueError(
            f"planes are int8[{format.limbs}, T, K], not {planes.dtype}{list(planes.shape)}"
        )
    if not format.unused_bits:
        return planes.reshape(-1).view(np.uint8)
    _, tokens, inputs = planes.shape
    out = np.empty(tokens * format.up_bytes(inputs), np.uint8)
    low = out[planes[1:].size :]
    _copied(planes[1:].reshape(-1).view(np.uint8), out[: planes[1:].size])
    _packed(planes[0].view(np.uint8), 8 - format.unused_bits, format.unused_bits, low)
    return out


def unpack_request(
    payload: NDArray[np.uint8], tokens: int, inputs: int, format: Format
) -> NDArray[np.int8]:
    """uint8[tokens * up_bytes(inputs)] -> planes int8[limbs, tokens, inputs], lowest first.

    A view of the payload where all bits are in use. Raises ValueError for another size.
    """
    format.require_request(payload.size, tokens, inputs)
    shape = (format.limbs, tokens, inputs)
    if not format.unused_bits:
        return payload.view(np.int8).reshape(shape)
    planes = np.empty(shape, np.int8)
    high = planes[1:].reshape(-1)
    _copied(payload[: high.size].view(np.int8), high)
    low = payload[high.size :]
    _unpacked(low, 8 - format.unused_bits, format.unused_bits, planes[0].view(np.uint8))
    return planes


def pack_answer(values: NDArray[np.uint16], format: Format) -> NDArray[np.uint8]:
    """values uint16[T, N] of `down_bits` bits -> uint8[T * down_bytes(N)].

    The same memory for 16 bits and contiguous values. Higher bits than `down_bits` are taken to be
    zero. Raises ValueError for another type or shape.
    """
    if values.dtype != np.uint16 or values.ndim != 2:
        raise ValueError(f"results are uint16[T, N], not {values.dtype}{list(values.shape)}")
    flat, bits = values.reshape(-1), format.down_bits - 8
    if bits == 8:
        return flat.view(np.uint8)
    out = np.empty(len(values) * format.down_bytes(values.shape[1]), np.uint8)
    if not bits:
        _copied(flat, out)
        return out
    source = _read_only(flat)
    run_split(lambda a, b: _upper(source, bits, out, a, b), flat.size, _GRAIN)
    _packed(values, bits, 0, out[flat.size :])
    return out


def unpack_answer(
    payload: NDArray[np.uint8], tokens: int, outputs: int, format: Format
) -> NDArray[np.uint16]:
    """uint8[tokens * down_bytes(outputs)] -> uint16[tokens, outputs] of `down_bits` bits.

    A view of the payload for 16 bits. Raises ValueError for another size.
    """
    format.require_answer(payload.size, tokens, outputs)
    bits = format.down_bits - 8
    if bits == 8:
        return payload.view(np.uint16).reshape(tokens, outputs)
    values = np.empty((tokens, outputs), np.uint16)
    flat, upper = values.reshape(-1), _read_only(payload)
    if not bits:
        _copied(payload, flat)
        return values
    _unpacked(payload[flat.size :], bits, 0, values)
    run_split(lambda a, b: _put_upper(upper, bits, flat, a, b), flat.size, _GRAIN)
    return values
