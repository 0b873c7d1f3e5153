"""The check of `integrity.py` where an answer's only honest error is small and has a known bound.

So it is without encryption (roundings of float32 sums), and under schemes that multiply integers
exactly, or to within a noise far below one unit of the result. What the owner compares is

    d = v*y - (v*M)*m

in float64, for the message m and the results y of one token: both sums are of products of the
numbers themselves, with no scheme between. Owner code only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy
from backends.he.integrity import POOL, Float64Array, Honesty, Judge, Pool, draw_rows

_SLAB = 1 << 22  # weights that are widened to float64 at a time


@dataclass(frozen=True)
class Expected:
    """For one request: the rows of the pool, float64[T, ROWS], and each token's unit float64[T]."""

    check: DirectCheck
    rows: NDArray[np.int64] = field(repr=False)
    values: Float64Array = field(repr=False)
    unit: Float64Array = field(repr=False)

    def require(self, answer: NDArray[np.floating], worker: str) -> None:
        """Raise WrongAnswerError unless answer float[T, N] fits."""
        found = self.check.rows(answer, self.rows)
        found -= self.values
        try:
            self.check.judge.require(self.rows, found, worker, self.unit)
        finally:
            found[...] = 0

    def wipe(self) -> None:
        """Overwrite it."""
        for part in (self.rows, self.values, self.unit):
            part[...] = 0


class DirectCheck:
    """The owner's secret check of one matrix M (N x K).

    norm    ||M||, the root of the sum of all entries' squares
    judge   takes a unit of 1 for a deviation. Roundings are the same for the same x, so a mean may
            drift by as much for ever
    """

    def __init__(
        self, name: str, weight: NDArray[np.int8], forward: bool, entropy: Entropy
    ) -> None:
        self._pool = Pool(entropy, weight.shape[0 if forward else 1]).whole()
        self._projected, squares = _survey(self._pool, weight, forward)
        self.norm = float(np.sqrt(squares))
        self.judge = Judge(name, Honesty(np.zeros(POOL), np.ones(POOL), drift=1.0))
        self._entropy = entropy

    def expect(self, values: NDArray[np.floating], unit: Float64Array) -> Expected:
        """For a request of float[T, K].

        unit  float64[T], all results' errors of each token as a vector are at most that long
        """
        rows = draw_rows(self._entropy.fresh_key())
        found = values.astype(np.float64) @ self._projected[rows].T
        return Expected(self, rows, found, unit)

    def rows(self, answer: NDArray[np.floating], rows: NDArray[np.int64]) -> Float64Array:
        """float64[T, ROWS]: v*y for rows of the pool."""
        with np.errstate(invalid="ignore", over="ignore"):
            return answer.astype(np.float64) @ self._pool[rows].T.astype(np.float64)


def _survey(
    pool: NDArray[np.float32], weight: NDArray[np.int8], forward: bool
) -> tuple[Float64Array, float]:
    """float64[POOL, K] V*M of float32[POOL, N], and the sum of M's squares; a slab at a time."""
    wide = pool.astype(np.float64)
    out = np.zeros((POOL, weight.shape[1 if forward else 0]))
    squares = 0.0
    step = max(1, _SLAB // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        slab = weight[part].astype(np.float64)
        squares += float(np.sum(slab**2))
        if forward:
            out += wide[:, part] @ slab
        else:
            out[:, part] = wide @ slab.T
    return out, squares
