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
from backends.he.integrity import ROWS, Float64Array, Judge, draw_pool, mlwe_honesty, survey
from backends.he.params import Parameters
from backends.threads import run_split

_GRAIN = 8  # tokens worth a thread
_COLUMNS = 512
"""Columns that all tokens are multiplied by in turn: of ROWS rows they stay in a core's cache."""


# Reassociation lets LLVM sum in vectors; 53 bits are plenty for any order.
@jit.reassociating
def _add_products(value: Any, matrix: Any, rows: Any, start: int, out: Any) -> None:
    """out[i] += sum_k value[k] * matrix[rows[i], start + k]; four rows share each load of value."""
    end = start + len(value)
    for i in range(0, ROWS, 4):
        a = b = c = d = 0.0
        m0, m1 = matrix[rows[i], start:end], matrix[rows[i + 1], start:end]
        m2, m3 = matrix[rows[i + 2], start:end], matrix[rows[i + 3], start:end]
        for k in range(len(value)):
            v = value[k]
            a += v * np.float64(m0[k])
            b += v * np.float64(m1[k])
            c += v * np.float64(m2[k])
            d += v * np.float64(m3[k])
        out[i] += a
        out[i + 1] += b
        out[i + 2] += c
        out[i + 3] += d


@jit.kernel
def _expected(
    x: Any, in_scale: Any, factor: Any, projected: Any, rows: Any, ratio: float, out: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """out float64[T, ROWS] = ratio * U*m for tokens first..last, m as it is encrypted."""
    inputs = x.shape[1]
    value = np.empty(_COLUMNS)
    out[first:last] = 0
    for start in range(0, inputs, _COLUMNS):
        end = min(inputs, start + _COLUMNS)
        scales, part = in_scale[start:end], value[: end - start]
        for t in range(first, last):
            row, scale = x[t, start:end], factor[t]
            for k in range(len(part)):
                part[k] = np.rint(np.float64(row[k]) * np.float64(scales[k]) * scale)
            _add_products(part, projected, rows, start, out[t])
    out[first:last] *= ratio


@jit.kernel
def _differences(
    y: Any, pool: Any, rows: Any, expected: Any, inverse: Any, out_scale: Any, out: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """out float64[T, ROWS] = v*y - expected for tokens first..last; y is then scaled in place."""
    outputs = y.shape[1]
    value = np.empty(_COLUMNS)
    out[first:last] = -expected[first:last]
    for start in range(0, outputs, _COLUMNS):
        end = min(outputs, start + _COLUMNS)
        scales, part = out_scale[start:end], value[: end - start]
        for t in range(first, last):
            row, scale = y[t, start:end], inverse[t]
            for j in range(len(part)):
                part[j] = np.float64(row[j])
                row[j] = np.float32(part[j] * scale * np.float64(scales[j]))
            _add_products(part, pool, rows, start, out[t])


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
                len(y), _GRAIN,
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
        self.judge = Judge(name, mlwe_honesty(self.pool, found, parameters), entropy)
        self._ratio = parameters.worker_modulus / parameters.modulus

    def expect(
        self, x: NDArray[np.float32], in_scale: NDArray[np.float32], factor: Float64Array
    ) -> Expected:
        """For a request float32[T, K] whose message is round(x * in_scale * factor)."""
        rows = self.judge.draw_rows()
        values = np.empty((len(x), ROWS))
        run_split(
            lambda a, b: _expected(
                x, in_scale, factor, self.projected, rows, self._ratio, values, a, b
            ),
            len(x), _GRAIN,
        )  # fmt: skip
        return Expected(self, rows, values)
