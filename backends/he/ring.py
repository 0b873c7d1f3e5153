"""Fast arithmetic in R_q: forward and inverse NTT, and the mask A*s by tiles of rows.

Layout. Rows of a public matrix (A, or a hint H = Wq*A) come in tiles of LANES = 16 rows with
the row innermost: int32[tiles, rank, 256, 16], NTT domain, centred residues in [-q/2, q/2].
With the rows innermost every butterfly is one 16-lane vector operation.

One mask tile costs, per row: rank*256 products accumulated lazily in 64 bits, 256 Montgomery
reductions, and 8*128 butterflies. The slow definition of the same is in `reference.py`.

Bounds, for q < 2^28 and rank <= 8:
  * |sum of rank products of centred residues| <= 8 * (q/2)^2 < 2^57;
  * Montgomery: acc and t*q agree in their low halves, |acc >> 32| <= rank*q/64 <= q/8, and
    |t*q >> 32| <= q/2. The difference of the high halves is within +-q (up to rank 31), so one
    conditional add makes it canonical;
  * Shoup: x*w - floor(x*w'/2^32)*q < 2q for every 32-bit x, so one conditional subtract does.
The conditional add and subtract are unsigned minima, hence free of branches and of
secret-dependent timing.

Sixteen multiples of q fit 32 bits, so butterflies could be lazy: of the eight conditional subtracts
of two stages on four rows, three would do (rows below 2q, differences made positive by 2q and 4q).
Not done: every stage would have a bound of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.params import NTT_PRIME, RING_DEGREE
from backends.he.vector import LANES, slot_product, two_stages

Int32Array: TypeAlias = NDArray[np.int32]

_Q = NTT_PRIME
_D = RING_DEGREE
_MONTGOMERY = (1 << 32) % _Q


def _bit_reverse(index: int, bits: int = 8) -> int:
    return int(format(index, f"0{bits}b")[::-1], 2)


def _find_psi() -> int:
    """A primitive 512th root of unity: the least g^((q-1)/512) whose 256th power is -1."""
    for g in range(2, 1000):
        psi = pow(g, (_Q - 1) // (2 * _D), _Q)
        if pow(psi, _D, _Q) == _Q - 1:
            return psi
    raise AssertionError("q = 1 mod 512 has such a root")


PSI = _find_psi()
EVALUATION_EXPONENTS = [2 * _bit_reverse(i) + 1 for i in range(_D)]
"""Slot i of the NTT domain holds the value of the polynomial at PSI**EVALUATION_EXPONENTS[i]."""

_ZETA = np.array([pow(PSI, _bit_reverse(i), _Q) for i in range(_D)], dtype=np.uint32)
_ZETA_INVERSE = np.array([pow(int(z), -1, _Q) for z in _ZETA], dtype=np.uint32)


def _shoup(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """floor(w * 2^32 / q), the companion that makes a product by the constant w cheap."""
    return ((values.astype(np.uint64) << np.uint64(32)) // np.uint64(_Q)).astype(np.uint32)


_ZETA_SHOUP = _shoup(_ZETA)
_ZETA_INVERSE_SHOUP = _shoup(_ZETA_INVERSE)


@jit.kernel
def _forward_ntt(values: Any, zeta: Any, zeta_shoup: Any, factor: int, out: Any) -> None:
    """uint32[256] in [0, q), overwritten -> centred int32[256]: its NTT times `factor` mod q."""
    q = np.uint32(_Q)
    h = _D // 2
    group = 1
    while h >= 1:
        for g in range(group):
            w = np.uint32(zeta[group + g])
            ws = np.uint32(zeta_shoup[group + g])
            for j in range(2 * g * h, 2 * g * h + h):
                a = values[j]
                b = values[j + h]
                m = np.uint32((np.uint64(b) * np.uint64(ws)) >> np.uint64(32))
                x = np.uint32(np.uint32(b * w) - np.uint32(m * q))
                x = min(x, np.uint32(x - q))
                up = np.uint32(a + x)
                values[j] = min(up, np.uint32(up - q))
                down = np.uint32(a - x)
                values[j + h] = min(down, np.uint32(down + q))
        h //= 2
        group *= 2
    for j in range(_D):
        v = np.int64(np.uint64(values[j]) * np.uint64(factor) % np.uint64(_Q))
        out[j] = np.int32(v - _Q if v > _Q // 2 else v)


# What `specialised` puts into the loop below, for one module rank.
_product: Any = None
_SIZE = 0


def _mask_tile(matrix: Any, tile: int, secret: Any, out: Any, zeta: Any, zeta_shoup: Any) -> None:
    for slot in range(_D):
        _product(matrix, tile * _SIZE, secret, slot, out)
    h = 1
    groups = _D // 2
    while h < _D:  # two stages at a time: h, then 2h
        for g in range(groups // 2):
            for j in range(4 * g * h, 4 * g * h + h):
                two_stages(
                    out, j * LANES, h * LANES, zeta, zeta_shoup,
                    groups + 2 * g, groups // 2 + g,
                )  # fmt: skip
        h *= 4
        groups //= 4


@cache
def mask_tile_kernel(rank: int) -> Callable[..., None]:
    """The numba function `mask(matrix, tile, secret, out, zeta, zeta_shoup)` for one rank.

    matrix  int32[tiles * rank * 256 * 16], flat: a tiled public matrix
    secret  int32[rank * 256], as `secret_to_ntt` makes it
    out     uint32[256 * 16]; out[t*16 + row] = coefficient t of (row . s) in [0, q)

    The rank is a compile-time constant, so the sum over it unrolls.
    """
    return jit.specialised(
        _mask_tile, f"rank{rank}", _product=slot_product(rank), _SIZE=rank * _D * LANES
    )


def _first_of_tile(matrix: Any, tile: int, secret: Any, out: Any) -> None:
    for slot in range(_D):
        _product(matrix, tile * _SIZE, secret, slot, out)
    for lane in range(LANES):
        total = np.uint64(0)  # 256 values below 2^28
        for slot in range(_D):
            total += np.uint64(out[slot * LANES + lane])
        out[lane] = np.uint32(total % np.uint64(_Q))


@cache
def first_coefficient_kernel(rank: int) -> Callable[..., None]:
    """The numba function `first(matrix, tile, secret, out)` for one rank.

    As `mask_tile_kernel`, of coefficient 0 alone: out[row] for 16 rows. The inverse transform's
    first value is the sum of all it is given, so a block of one token needs no butterfly.
    """
    return jit.specialised(
        _first_of_tile, f"rank{rank}", _product=slot_product(rank), _SIZE=rank * _D * LANES
    )


@jit.kernel
def _transform_secret(secret: Any, zeta: Any, zeta_shoup: Any, factor: int, out: Any) -> None:
    values = np.empty(_D, np.uint32)
    for row in range(len(secret)):
        for j in range(_D):
            s = np.int64(secret[row, j])
            values[j] = np.uint32(s + (s >> np.int64(63)) * -_Q)
        _forward_ntt(values, zeta, zeta_shoup, factor, out[row])
    values[:] = 0  # the last row's transform


def inverse_tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(zeta, zeta_shoup) that `mask_tile_kernel` functions take."""
    return _ZETA_INVERSE, _ZETA_INVERSE_SHOUP


def centre(residues: NDArray[np.integer[Any]]) -> Int32Array:
    """Residues in [0, q) as centred int32 in [-q/2, q/2]."""
    wide = residues.astype(np.int64)
    return np.where(wide > _Q // 2, wide - _Q, wide).astype(np.int32)


def secret_to_ntt(secret: NDArray[np.int8]) -> Int32Array:
    """int8[rank, 256] -> centred int32[rank, 256] with the factors the kernels leave out.

    The result is NTT(s) * 2^32 / 256 mod q: 2^32 cancels the Montgomery reduction, 1/256 is
    the inverse transform's factor. One pass over the secret saves one over every row.
    """
    factor = _MONTGOMERY * pow(_D, -1, _Q) % _Q
    out = np.empty(secret.shape, np.int32)
    _transform_secret(secret, _ZETA, _ZETA_SHOUP, factor, out)
    return out


def tiles_of(rows: int) -> int:
    """Tiles of LANES rows that hold `rows` rows."""
    return -(-rows // LANES)
