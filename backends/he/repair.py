"""Results that wrapped: how they are moved back, and how they are kept rare. Owner code only.

Under `thin` parameters the scale of a matrix is larger than what could never wrap, by a gain that
the owner learns from results it has decrypted. A result beyond p/2 then comes back less p. The
check of answers (`integrity.py`) sees it, as it compares in real numbers, and so does the owner, as
what goes a little beyond p/2 comes back close to it. Results that are close are computed in clear,
from the int8 weights, and so is a whole token that the check still finds off: each is moved by the
multiple of p that brings it nearest to what it should be. Whether the worker told the truth is
judged afterwards, on the results as moved: a multiple of p is nothing that a worker can add or take
away. A result that was looked at must then be within the cipher's noise of what it should be, so
whoever adds something to answers, to see by the owner's pace which tokens it looks at, is found by
the first.

A gain lives in the owner's memory and in its token scales; neither it nor a repair makes any
difference to what is sent. It is learnt from some tokens of a matrix's first request, multiplied in
clear, and from answers that were accepted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.integrity import LIMIT
from backends.he.params import Parameters
from backends.he.plan import LARGEST_GAIN, MARGIN, MatrixPlan
from backends.threads import run_split

Float64Array = NDArray[np.float64]

_GRAIN = 256  # outputs that are worth a thread
_AT_ONCE = 64  # tokens
FEW = 16
"""Results of a token, on average, that are computed one by one rather than all of them."""
_OCTAVE = 8
"""Bins of a histogram for each factor of two."""
_BINS = 12 * _OCTAVE
_REMEMBERED = 1 << 14  # tokens, after which those before count half
ENOUGH = 32
"""Tokens before which nothing is concluded: the one that a session begins with is made of ones."""
_ROOM = 1.25
"""How far the results that a gain is made for are kept from p/2."""
RARE = 2.0**-12
"""The share of tokens that may have results beyond those."""
EDGE = 1 / _ROOM
"""Results beyond this share of p/2 are computed in clear, wrapped or not: what wraps mostly goes
little beyond p/2, and comes back close to it."""
LEAST_PERIOD = 2.0**-140
"""Of what p stands for in a result: below it, float32 keeps no more of one than its sign."""
_LEAST, _MOST = 2.0**-148, float(np.finfo(np.float32).max)


class _Histogram:
    """Of the tokens' largest results as shares of the Cauchy-Schwarz bound, by their logarithm."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS)

    def add(self, shares: Float64Array) -> None:
        """Count float64[T]; tokens without any input have none."""
        found = shares[shares > 0]
        places = np.clip(np.floor(-np.log2(found) * _OCTAVE), 0, _BINS - 1).astype(np.int64)
        if self._counts.sum() > _REMEMBERED:
            self._counts /= 2
        np.add.at(self._counts, places, 1.0)

    def gain(self) -> float:
        """The largest one that leaves but a share of RARE with too little room."""
        total = self._counts.sum()
        if total < ENOUGH:
            return 1.0
        beyond = np.cumsum(self._counts) > RARE * total
        share = 2.0 ** (-int(np.argmax(beyond)) / _OCTAVE)  # the upper end of the bin
        return float(np.clip(1 / (_ROOM * share), 1.0, LARGEST_GAIN))


class Gains:
    """The gain of every matrix: 1 while too few results are known, then what they allow."""

    def __init__(self) -> None:
        self._histograms: dict[str, _Histogram] = {}
        self._lock = threading.Lock()

    def of(self, matrix: str) -> float:
        """The gain for a request that is made now."""
        with self._lock:
            known = self._histograms.get(matrix)
            return known.gain() if known else 1.0

    def known(self, matrix: str) -> bool:
        """Whether a result of it has been seen."""
        with self._lock:
            return matrix in self._histograms

    def forget(self) -> None:
        """As if nothing had been seen."""
        with self._lock:
            self._histograms.clear()

    def learn(self, matrix: str, peaks: Float64Array, gain: float) -> None:
        """Take in float64[T], each token's largest |result| over p/2, where `gain` was used."""
        with self._lock:
            self._histograms.setdefault(matrix, _Histogram()).add(peaks / gain)


@dataclass
class Repairs:
    """Counts for a report.

    tokens  that were looked at, because of their check
    wraps   results that had wrapped, and were repaired
    """

    tokens: int = 0
    wraps: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, tokens: int, wraps: int) -> None:
        with self._lock:
            self.tokens += tokens
            self.wraps += wraps


# Reassociation lets LLVM sum in vectors. Sums are to tell one multiple of p from the next.
@jit.reassociating
def _times_rows(values: Any, weight: Any, out: Any, first: int, last: int) -> None:
    """out float32[T, N] = values float32[T, K] @ weight.T, for rows first..last of it."""
    row = np.empty(weight.shape[1], np.float32)
    for j in range(first, last):
        row[:] = weight[j]
        for t in range(len(values)):
            total = np.float32(0)
            x = values[t]
            for k in range(len(row)):
                total += x[k] * row[k]
            out[t, j] = total


@jit.reassociating
def _times_columns(values: Any, weight: Any, out: Any, first: int, last: int) -> None:
    """out float32[T, K] += values float32[T, N] @ weight, for columns first..last of it."""
    row = np.empty(last - first, np.float32)
    for j in range(len(weight)):
        row[:] = weight[j, first:last]
        for t in range(len(values)):
            x, sums = values[t, j], out[t, first:last]
            for k in range(len(row)):
                sums[k] += x * row[k]


def in_parts(tokens: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Tokens to repair, a few at a time, which bounds the memory that many take."""
    return [tokens[i : i + _AT_ONCE] for i in range(0, len(tokens), _AT_ONCE)]


def held(values: Float64Array, periods: Float64Array) -> bool:
    """Whether float32 holds all results [n, N] well enough to read units off them."""
    return bool(np.isfinite(values).all() and (periods >= LEAST_PERIOD).all())


def wipe(*private: NDArray[Any]) -> None:
    """Overwrite arrays."""
    for array in private:
        array[...] = 0


def clear_products(
    values: NDArray[np.float32], weight: NDArray[np.int8], forward: bool
) -> NDArray[np.float32]:
    """float32[T, K] times the transposed weight int8[N, K] (forward), or float32[T, N] times it.

    For a few tokens: what it costs is reading the weight once.
    """
    rows, columns = weight.shape
    weight = weight.view()
    weight.flags.writeable = False  # mapped weights are: one compilation for all
    out = np.zeros((len(values), rows if forward else columns), np.float32)
    kernel = _times_rows if forward else _times_columns
    run_split(lambda a, b: kernel(values, weight, out, a, b), out.shape[1], grain=_GRAIN)
    return out


def unwrap(
    out: NDArray[np.float32], tokens: NDArray[np.int64], right: NDArray[np.float32], modulus: int,
    scale: Float64Array,
) -> Float64Array:  # fmt: skip
    """Move each result of some tokens by the multiple of p that brings it nearest to `right`.

    out    float32[T, N], results times their scale, changed in place
    right  float32[tokens, N], in units of which the period is `modulus`
    scale  float64[tokens, N]: what a unit is in `out`

    Returns the multiples, float64[tokens, N].
    """
    with np.errstate(invalid="ignore", over="ignore"):
        turns = np.rint((right - out[tokens] / scale) / modulus)
    lost = ~np.isfinite(turns) | (modulus * scale < LEAST_PERIOD)
    if lost.any():
        # All that is left of a result that float32 cannot hold is its sign: in the outer half of
        # the period, which is where noise can take it over the edge, that is enough.
        whole = np.rint(right / np.float64(modulus))
        part = right / np.float64(modulus) - whole
        over = (np.abs(part) > 0.25) & (np.signbit(out[tokens]) != np.signbit(part))
        turns[lost] = (whole + over * np.sign(part))[lost]
    moved = np.flatnonzero(turns.any(axis=1))
    if len(moved):
        at = tokens[moved]
        with np.errstate(over="ignore"):
            there = out[at] + turns[moved] * modulus * scale[moved]
            # One that overflowed has nothing left that could be moved.
            gone = np.isinf(out[at]) & (turns[moved] != 0)
            out[at] = np.where(gone, right[moved] * scale[moved], there).astype(np.float32)
    return turns


def edge(modulus: int, gain: float) -> float:
    """The |result| beyond which a token is multiplied in clear: none where nothing can wrap."""
    return EDGE * modulus / 2 if gain > 1 else np.inf


def tolerance(plan: MatrixPlan, parameters: Parameters) -> float:
    """What the cipher adds to one result, at most, in units of the worker modulus.

    It exceeds LIMIT standard deviations, and what is dropped from an answer, with probability
    2*exp(-32).
    """
    return LIMIT / MARGIN * plan.margin(parameters) + 2.0**plan.format.dropped_bits


def astray(
    out: NDArray[np.float32], tokens: NDArray[np.int64], right: NDArray[np.float32], most: float,
    scale: Float64Array,
) -> bool:  # fmt: skip
    """Whether a result is further than `most` units from where `right` says, all as for `unwrap`.

    What float32 rounds, and where it ends, is forgiven.
    """
    true = right * scale
    slack = most * scale + 2.0**-22 * np.abs(true) + _LEAST
    errors = np.clip(out[tokens].astype(np.float64), -_MOST, _MOST)
    errors -= np.clip(true, -_MOST, _MOST)
    try:
        return not bool(np.all(np.abs(errors) <= slack))
    finally:
        errors[...] = 0
        true[...] = 0
        slack[...] = 0
