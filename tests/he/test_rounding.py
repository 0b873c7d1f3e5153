"""Rounding from q to p: exact but at two residues, in lanes and in what is left over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from backends.he.epilogue import open_row, rounded, seal_row
from backends.he.mlwe_owner import ERROR_BYTES
from backends.he.params import MODULUS_BITS
from backends.he.params import NTT_PRIME as Q
from backends.he.wire import UP_BITS, Format

MISSED: dict[int, list[int]] = {16: [], 18: [], 20: [], 24: [111_086_533, 215_984_109]}
"""By bits of p: the residues at which rounding gives one less, next to a tie."""


def least_rounding_to(b: NDArray[np.int64], p: int) -> NDArray[np.int64]:
    """The least u with round(u * p/q) = b: u*p/q > b - 1/2, and there are no ties, q being odd."""
    return (2 * b - 1) * Q // (2 * p) + 1


@njit
def _round_all(u: Any, bits: int, out: Any) -> None:
    for i in range(len(u)):
        out[i] = rounded(u[i], bits)


def all_rounded(u: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    out = np.empty(len(u), np.uint32)
    _round_all(u.astype(np.uint32), bits, out)
    return out.astype(np.int64)


@pytest.mark.parametrize("up_bits", UP_BITS)
def test_rounding_is_exact_but_at_two_residues(up_bits: int) -> None:
    """At both sides of every step, and it is monotone: so everywhere."""
    p, bits = 1 << up_bits, MODULUS_BITS - up_bits
    b = np.arange(1, p + 1)
    first = least_rounding_to(b, p)
    at, before = all_rounded(first, bits), all_rounded(first - 1, bits)
    assert np.array_equal(before, b - 1)
    missed = first[at != b]
    assert missed.tolist() == MISSED[up_bits]
    assert np.all(at[at != b] == b[at != b] - 1)
    assert np.all((2 * missed * p % (2 * Q) - Q) < 2 * Q * 2.0**-24), "a tie is not far"
    assert all_rounded(first[:1] * 0, bits) == 0
    assert all_rounded(first[:1] * 0 + Q - 1, bits) == p


@pytest.mark.parametrize("up_bits", UP_BITS)
def test_kernels_round_so_in_every_lane(up_bits: int) -> None:
    """Sealing and opening at the edges of steps, 16 at a time and those left over."""
    form = Format(up_bits, 12)
    limbs, unused, whole = form.limbs, form.unused_bits, form.modulus
    p, bits = 1 << up_bits, MODULUS_BITS - up_bits
    rng = np.random.default_rng(up_bits)
    first = least_rounding_to(rng.integers(1, p + 1, 300), p)
    u = np.concatenate([first, first - 1, [0, 1, Q - 1, Q // 2, Q // 2 + 1], MISSED[up_bits]])
    u = rng.permutation(u).astype(np.int64)
    size = len(u)
    assert size % 16, "some are left over"
    expected = (u + (u * (2**48 * 2559 // Q) >> 48) + (1 << (bits - 1))) >> bits
    mask, ones, zeros = u.astype(np.uint32), np.ones(size, np.float32), np.zeros(size, np.float32)
    noise = np.zeros(ERROR_BYTES * size, np.uint8)
    noise[: 4 * size] = 0b11111  # 4 bytes of 5 bits: an error of zero
    planes = np.empty(limbs * size, np.int8)
    seal_row(mask, 0, zeros, 0, ones, 0, size, 1.0, noise, 0, 4 * size, planes, size, limbs, unused)
    digits = planes.reshape(limbs, size).astype(np.int64)
    sealed = sum(256**n * digits[n] for n in range(limbs)) % whole
    assert np.array_equal(sealed, (expected << unused) % whole)
    out, answer = np.empty(size, np.float32), np.zeros(size, np.uint16)
    open_row(mask, 0, answer, 0, 1.0, ones, 0, size, form.dropped_bits, limbs, unused, out)
    bits = MODULUS_BITS - 8 * limbs  # the owner's own rounding has all bits
    expected = (u + (u * (2**48 * 2559 // Q) >> 48) + (1 << (bits - 1))) >> bits
    assert np.array_equal(out, ((whole // 2 - expected - (1 << unused) // 2) % whole - whole // 2))
