"""The owner's check of answers on the CPU: the sums that `integrity.py` defines and judges.

Half of the work is done when a request is made: U*m of its rows is all that is kept of the input.
Sums are in float64, where products of the float32 factors are exact. Owner code only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy
from backends.he.integrity import (
    ROWS,
    Float64Array,
    Judge,
    draw_pool,
    draw_rows,
    mlwe_honesty,
    survey,
)
from backends.he.params import Parameters
from backends.threads import run_split

_GRAIN_VALUES = 1 << 19  # worth a thread: waking one up takes some 0.4 ms
_COLUMNS = 512
"""Columns that all tokens are multiplied by in turn: of ROWS rows they stay in a core's cache."""


# Reassociation lets LLVM sum in vectors; 53 bits are plenty for any order.
@jit.reassociating
def _add_products(value: Any, tile: Any, out: Any) -> None:
    """out[i] += sum_k value[k] * tile[i, k]; four rows share each load of value."""
    for i in range(0, ROWS, 4):
        a = b = c = d = 0.0
        m0, m1, m2, m3 = tile[i], tile[i + 1], tile[i + 2], tile[i + 3]
        for k in range(len(value)):
            v = value[k]
            a += v * m0[k]
            b += v * m1[k]
            c += v * m2[k]
            d += v * m3[k]
        out[i] += a
        out[i + 1] += b
        out[i + 2] += c
        out[i + 3] += d


@jit.kernel
def _widen(matrix: Any, rows: Any, start: int, end: int, tile: Any) -> None:
    """tile float64[ROWS, _COLUMNS] = columns start..end of the rows, filled up with zeros."""
    tile[:] = 0
    for i in range(ROWS):
        for k in range(end - start):
            tile[i, k] = np.float64(matrix[rows[i], start + k])


@jit.kernel
def _expected(
    x: Any, in_scale: Any, factor: Any, projected: Any, rows: Any, ratio: float, out: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """out float64[T, ROWS] = ratio * U*m for tokens first..last, m as it is encrypted."""
    inputs = x.shape[1]
    # Of a fixed width, so that they are contiguous: else no sum is taken in vectors.
    value, tile = np.zeros(_COLUMNS), np.empty((ROWS, _COLUMNS))
    out[first:last] = 0
    for start in range(0, inputs, _COLUMNS):
        end = min(inputs, start + _COLUMNS)
        _widen(projected, rows, start, end, tile)
        scales = in_scale[start:end]
        for t in range(first, last):
            row, scale = x[t, start:end], factor[t]
            for k in range(len(row)):
                value[k] = np.rint(np.float64(row[k]) * np.float64(scales[k]) * scale)
            _add_products(value, tile, out[t])
    value[:] = 0  # of a message: with its ciphertext, a mask and its errors
    tile[:] = 0  # which rows these are is a secret, too
    out[first:last] *= ratio


@jit.kernel
def _differences(
    y: Any, pool: Any, rows: Any, expected: Any, inverse: Any, out_scale: Any, out: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """out float64[T, ROWS] = v*y - expected for tokens first..last; y is then scaled in place."""
    outputs = y.shape[1]
    value, tile = np.zeros(_COLUMNS), np.empty((ROWS, _COLUMNS))
    out[first:last] = -expected[first:last]
    for start in range(0, outputs, _COLUMNS):
        end = min(outputs, start + _COLUMNS)
        _widen(pool, rows, start, end, tile)
        scales = out_scale[start:end]
        for t in range(first, last):
            row, scale = y[t, start:end], inverse[t]
            for j in range(len(row)):
                value[j] = np.float64(row[j])
                row[j] = np.float32(value[j] * scale * np.float64(scales[j]))
            _add_products(value, tile, out[t])
    value[:] = 0  # of an answer that may be a lie: see `MlweOwner.decrypt`
    tile[:] = 0


def _grain(columns: int) -> int:
    """Tokens worth a thread."""
    return max(1, _GRAIN_VALUES // columns)


@dataclass(frozen=True)
class Expected:
    """What the answer to one request is held against.

    rows    int64[ROWS], of the pool of `check`
    values  float64[T, ROWS]
    """

    check: IntegrityCheck
    rows: NDArray[np.int64] = field(repr=False)
    values: Float64Array = field(repr=False)

    def require(
        self, y: NDArray[np.float32], inverse: Float64Array, out_scale: NDArray[np.float32],
        worker: str,
    ) -> None:  # fmt: skip
        """Check centred results float32[T, N] and scale them in place to what is delivered.

        Raises WrongAnswerError when they are not an honest worker's; `y` is then worth nothing.
        """
        found = np.empty_like(self.values)
        pool, rows = self.check.pool, self.rows
        try:
            run_split(
                lambda a, b: _differences(
                    y, pool, rows, self.values, inverse, out_scale, found, a, b
                ),
                len(y), _grain(y.shape[1]),
            )  # fmt: skip
            self.check.judge.require(rows, found, worker)
        finally:
            found[...] = 0

    def wipe(self) -> None:
        """Overwrite which rows these were, and what they gave."""
        self.rows[...] = 0
        self.values[...] = 0


class IntegrityCheck:
    """The owner's secret check of one matrix.

    pool       float32[POOL, N], V
    projected  float32[POOL, K], V*M
    """

    def __init__(
        self, name: str, weight: NDArray[np.int8], forward: bool, entropy: Entropy,
        parameters: Parameters,
    ) -> None:  # fmt: skip
        self.pool = draw_pool(entropy, weight.shape[0 if forward else 1])
        found = survey(torch.from_numpy(self.pool), weight, forward, entropy)
        self.projected = found.projected.float().numpy()
        self.judge = Judge(name, mlwe_honesty(self.pool, found, parameters))
        self._ratio = parameters.worker_modulus / parameters.modulus

    def expect(
        self, x: NDArray[np.float32], in_scale: NDArray[np.float32], factor: Float64Array,
        key: bytearray,
    ) -> Expected:  # fmt: skip
        """For a request float32[T, K] whose message is round(x * in_scale * factor).

        key  rows are drawn by it; it is overwritten
        """
        values = np.empty((len(x), ROWS))
        expected = Expected(self, draw_rows(key), values)
        try:
            run_split(
                lambda a, b: _expected(
                    x, in_scale, factor, self.projected, expected.rows, self._ratio, values, a, b
                ),
                len(x), _grain(x.shape[1]),
            )  # fmt: skip
        except BaseException:
            expected.wipe()
            raise
        return expected
