"""The owner's check of answers on the CPU: the sums that `integrity.py` defines and judges.

Half of the work is done when a request is made: U*m of its rows is all that is kept of the input.
Sums are in float64, where products of the float32 factors are exact. Owner code only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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
    Pool,
    draw_rows,
    mlwe_honesty,
    survey,
    suspicious,
)
from backends.he.interface import OwnerMatrix
from backends.he.params import Parameters
from backends.he.repair import clear_products

_COLUMNS = 128
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
    x: Any, in_scale: Any, factor: Any, projected: Any, rows: Any, out: Any, first: int, last: int
) -> None:
    """out float64[T, ROWS] += U*m over inputs first..last, m as it is encrypted."""
    # Of a fixed width, so that they are contiguous: else no sum is taken in vectors.
    value, tile = np.zeros(_COLUMNS), np.empty((ROWS, _COLUMNS))
    for start in range(first, last, _COLUMNS):
        end = min(last, start + _COLUMNS)
        _widen(projected, rows, start, end, tile)
        scales = in_scale[start:end]
        for t in range(len(x)):
            row, scale = x[t, start:end], factor[t]
            for k in range(len(row)):
                value[k] = np.rint(np.float64(row[k]) * np.float64(scales[k]) * scale)
            _add_products(value, tile, out[t])
    value[:] = 0  # of a message: with its ciphertext, a mask and its errors
    tile[:] = 0  # which rows these are is a secret, too


@jit.kernel
def _found(
    y: Any, coefficients: Any, inverse: Any, out_scale: Any, out: Any, peaks: Any, first: int,
    last: int,
) -> None:  # fmt: skip
    """out float64[T, ROWS] += v*y over outputs first..last, which are then scaled in place.

    peaks float32[T] becomes the largest |y| seen, or stays what it is.
    """
    value, tile = np.zeros(_COLUMNS), np.empty((ROWS, _COLUMNS))
    # Numbers without a sign are ordered like their bits, of which a maximum is taken in vectors.
    bits, most = y.view(np.int32), peaks.view(np.int32)
    for start in range(first, last, _COLUMNS):
        end = min(last, start + _COLUMNS)
        _widen(coefficients, np.arange(ROWS), start, end, tile)
        scales = out_scale[start:end]
        for t in range(len(y)):
            row, seen, scale, peak = y[t, start:end], bits[t, start:end], inverse[t], most[t]
            for j in range(len(row)):
                peak = max(peak, seen[j] & 0x7FFFFFFF)
            most[t] = peak
            for j in range(len(row)):
                value[j] = np.float64(row[j])
                row[j] = np.float32(value[j] * scale * np.float64(scales[j]))
            _add_products(value, tile, out[t])
    value[:] = 0  # of an answer that may be a lie: see `MlweOwner.decrypt`
    tile[:] = 0


class _Sum:
    """float64[T, ROWS], added up from parts that threads compute, each of its own columns."""

    def __init__(self, tokens: int) -> None:
        self.values = np.zeros((tokens, ROWS))
        self._lock = threading.Lock()

    def add(self, part: Callable[[Float64Array], None]) -> None:
        """Let `part` add to zeros, and add those; they are overwritten."""
        own = np.zeros_like(self.values)
        try:
            part(own)
            with self._lock:
                self.values += own
        finally:
            own[...] = 0


class Expected:
    """What the answer to one request is held against: U*m for rows of `check`, and then v*y.

    peaks  float64[T], the largest |y| of each token taken in so far
    """

    def __init__(self, check: IntegrityCheck, tokens: int, key: bytearray) -> None:
        self.check = check
        self.rows = draw_rows(key)
        self._coefficients: NDArray[np.float32] | None = None
        self._expected, self._found = _Sum(tokens), _Sum(tokens)
        self.peaks = np.zeros(tokens)
        self._lock = threading.Lock()

    def add_inputs(
        self, x: NDArray[np.float32], in_scale: NDArray[np.float32], factor: Float64Array,
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Take in inputs first..last of float32[T, K], the message being round(x*in_scale*factor).

        Every input once, by any threads, while they are encrypted: a thread costs more to wake up.
        """

        def part(out: Float64Array) -> None:
            _expected(x, in_scale, factor, self.check.projected, self.rows, out, first, last)
            out *= self.check.ratio

        self._expected.add(part)

    def add_outputs(
        self, y: NDArray[np.float32], inverse: Float64Array, out_scale: NDArray[np.float32],
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Take in centred results first..last of float32[T, N], and scale them in place.

        They are worth nothing until `require` has agreed.
        """
        peaks, rows = np.zeros(len(y), np.float32), self._own_rows()

        def part(out: Float64Array) -> None:
            _found(y, rows, inverse, out_scale, out, peaks, first, last)

        self._found.add(part)
        with self._lock:
            np.maximum(self.peaks, peaks, out=self.peaks)
        peaks[...] = 0

    def _own_rows(self) -> NDArray[np.float32]:
        """v, float32[ROWS, N], for as long as answers are looked at."""
        with self._lock:
            if self._coefficients is None:
                self._coefficients = self.check.pool.rows(self.rows)
            return self._coefficients

    def _drop_rows(self) -> None:
        if self._coefficients is not None:
            self._coefficients[...] = 0
            self._coefficients = None

    def suspicious(self) -> NDArray[np.int64]:
        """The tokens whose results cannot well be the product's, once all is taken in."""
        honesty = self.check.judge.honesty
        differences = self._found.values - self._expected.values
        found = suspicious(differences, honesty.mean[self.rows], honesty.deviation[self.rows])
        differences[...] = 0
        return found

    def add_turns(self, tokens: NDArray[np.int64], turns: Float64Array, modulus: int) -> None:
        """Take in that results of some tokens were moved by float64[tokens, N] times p."""
        rows = self._own_rows().astype(np.float64)
        self._found.values[tokens] += modulus * (turns @ rows.T)
        rows[...] = 0

    def require(self, worker: str) -> None:
        """Raise WrongAnswerError unless what was taken in is an honest worker's answer.

        What was taken in of the answer is forgotten: another worker's may follow.
        """
        differences = self._found.values
        differences -= self._expected.values
        try:
            self.check.judge.require(self.rows, differences, worker)
        finally:
            differences[...] = 0

    def forget_outputs(self) -> None:
        """Overwrite what was taken in of an answer that is given up."""
        self._drop_rows()
        self._found.values[...] = 0
        self.peaks[...] = 0

    def wipe(self) -> None:
        """Overwrite which rows these were, and what they gave."""
        self._drop_rows()
        self.rows[...] = 0
        self._expected.values[...] = 0
        self._found.values[...] = 0
        self.peaks[...] = 0


class IntegrityCheck:
    """The owner's secret check of one matrix.

    pool       V, float32[POOL, N]
    projected  float32[POOL, K], V*M
    ratio      p/q, of what is added up of a message
    """

    def __init__(
        self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool, entropy: Entropy,
        parameters: Parameters,
    ) -> None:  # fmt: skip
        form = matrix.plan.format
        self._weight, self._forward = weight, forward
        self.pool = Pool(entropy, weight.shape[0 if forward else 1])
        pool = self.pool.whole()
        found = survey(torch.from_numpy(pool), weight, forward, entropy)
        self.projected = found.projected.float().numpy()
        self.judge = Judge(matrix.name, mlwe_honesty(pool, found, form, parameters))
        pool[...] = 0
        self.ratio = form.modulus / parameters.modulus

    def products(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[T, K] -> float32[T, N]: what the matrix makes of them, in clear."""
        return clear_products(values, self._weight, self._forward)

    def results(
        self, values: NDArray[np.float32], places: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32[n]: of row i of float32[n, K], the matrix's output number places[i], in clear."""
        rows = self._weight[places] if self._forward else self._weight[:, places].T
        found: NDArray[np.float32] = np.einsum("nk,nk->n", values, rows.astype(np.float32))
        return found
