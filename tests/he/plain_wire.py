"""What travels and what a worker answers, by definition and value by value, in Python's integers.

It shares no code with `backends/he`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[int]]


def row_bytes(values: Sequence[int], bits: int) -> bytes:
    """One row of unsigned values, the first in the lowest bits: a long integer, little endian."""
    number = sum(value << (bits * i) for i, value in enumerate(values))
    return number.to_bytes((len(values) * bits + 7) // 8, "little")


def row_values(row: bytes, count: int, bits: int) -> list[int]:
    """The reverse."""
    number = int.from_bytes(row, "little")
    return [(number >> (bits * i)) % (1 << bits) for i in range(count)]


def request_bytes(planes: Sequence[Rows], up_bits: int) -> bytes:
    """planes of signed digits [limbs][T][K], lowest first, as they travel."""
    unused = 8 * len(planes) - up_bits
    if not unused:
        return b"".join(row_bytes([d % 256 for d in row], 8) for plane in planes for row in plane)
    high = [row_bytes([d % 256 for d in row], 8) for plane in planes[1:] for row in plane]
    low = [row_bytes([(d % 256) >> unused for d in row], 8 - unused) for row in planes[0]]
    return b"".join(high + low)


def request_values(payload: bytes, tokens: int, inputs: int, up_bits: int) -> list[list[int]]:
    """The signed values [T][K] that a request is made of."""
    limbs = (up_bits + 7) // 8
    unused = 8 * limbs - up_bits
    bits = 8 - unused
    low_bytes = (inputs * bits + 7) // 8
    at_low = (limbs - 1) * tokens * inputs if unused else 0
    values = []
    for t in range(tokens):
        start = at_low + t * low_bytes
        low = row_values(payload[start : start + low_bytes], inputs, bits)
        row = [_signed(value << unused) for value in low]
        for limb in range(1, limbs):
            start = ((limb - bool(unused)) * tokens + t) * inputs
            digits = payload[start : start + inputs]
            row = [v + (_signed(d) << (8 * limb)) for v, d in zip(row, digits, strict=True)]
        values.append(row)
    return values


def _signed(digit: int) -> int:
    return digit - 256 if digit >= 128 else digit


def answer_bytes(values: Rows, down_bits: int) -> bytes:
    """Results of `down_bits` bits [T][N] as they travel."""
    low = down_bits - 8
    if low == 8:
        return b"".join(row_bytes(row, 16) for row in values)
    upper = [row_bytes([value >> low for value in row], 8) for row in values]
    return b"".join(
        upper + [row_bytes([value % (1 << low) for value in row], low) for row in values]
    )


def answer(
    payload: bytes, tokens: int, weight: NDArray[np.int8], up_bits: int, down_bits: int
) -> bytes:
    """What a worker answers to a request for the product with weight^T, int8[N, K]."""
    inputs = weight.shape[1]
    dropped = 8 * ((up_bits + 7) // 8) - down_bits
    values = np.array(request_values(payload, tokens, inputs, up_bits), np.int64)
    sums: list[list[int]] = (values @ weight.T.astype(np.int64)).tolist()
    half = (1 << dropped) // 2
    results = [[((y + half) >> dropped) % (1 << down_bits) for y in row] for row in sums]
    return answer_bytes(results, down_bits)
