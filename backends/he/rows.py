"""Kernels for the part of a language-model head that the owner multiplies itself (`nn/head.py`).

They are here because compiled code is kept by a digest of this folder (`jit.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.threads import run_split

_BIN_BITS = 19
"""Low bits of a float32 that do not tell its bin: a bin is a sixteenth of an octave."""
_BINS = 1 << (31 - _BIN_BITS)


@jit.kernel
def _take_largest(values: Any, weights: Any, counts: Any, index: Any) -> None:
    """index int64[n] = places of the n largest |values|, all others' |values| in weights.

    Of those in one bin with the last, any may be taken. counts int64[_BINS] is scratch.
    """
    for k in range(len(values)):
        weights[k] = abs(values[k])
    bits = weights.view(np.int32)  # numbers without a sign are ordered like their bits
    counts[:] = 0
    for k in range(len(bits)):
        counts[bits[k] >> _BIN_BITS] += 1
    left, last = len(index), _BINS - 1
    while last > 0 and counts[last] < left:
        left -= counts[last]
        last -= 1
    place, low, high = 0, last << _BIN_BITS, (last + 1) << _BIN_BITS
    for k in range(len(bits)):
        if bits[k] >= low:
            if bits[k] < high:
                if left == 0:
                    continue
                left -= 1
            index[place] = k
            place += 1
            weights[k] = 0


# Reassociation lets LLVM add in vectors.
@jit.reassociating
def _total(weights: Any) -> float:
    total = 0.0
    for k in range(len(weights)):
        total += np.float64(weights[k])
    return total


@jit.kernel
def _sample(weights: Any, offset: float, index: Any) -> float:
    """Systematic sampling: places in weights float32[V] >= 0, in order; returns the step.

    Steps are equal parts of the weights' sum, the first begins at `offset` of one, in [0, 1). A
    place is taken as often as its weight over the step, on average exactly, and up to one.
    """
    count = len(index)
    step = _total(weights) / count
    place, running, found = 0, 0.0, 0
    for k in range(len(weights)):
        if weights[k] > 0:
            running += np.float64(weights[k])
            found = k
            while place < count and running > (place + offset) * step:
                index[place] = k
                place += 1
    index[place:] = found  # what rounding left over at the end
    return step


@jit.kernel
def _choose(
    dy: Any, scale: Any, largest: int, offset: Any, index: Any, factors: Any, first: int, last: int
) -> None:
    size = dy.shape[1]
    values, weights = np.empty(size, np.float32), np.empty(size, np.float32)
    counts = np.empty(_BINS, np.int64)
    for t in range(first, last):
        row, places, out = dy[t], index[t], factors[t]
        for k in range(size):
            values[k] = row[k] * scale[k]
        _take_largest(values, weights, counts, places[:largest])
        step = np.float32(_sample(weights, offset[t], places[largest:]))
        for i in range(len(places)):
            value = values[places[i]]
            if i < largest:
                out[i] = value
            else:
                out[i] = step if value > 0 else -step
    values[:] = 0  # of a gradient
    weights[:] = 0


def chosen(
    dy: NDArray[np.float32], scale: NDArray[np.float32], largest: int, offset: NDArray[np.float64]
    , count: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:  # fmt: skip
    """(factors float32[T, n], places int64[T, n]), n = largest + count, for dy * scale [T, V].

    The `largest` entries of each row are themselves (`_take_largest`); `count` are drawn of the
    others, by `_sample` with offset float64[T], and stand for all of them.
    """
    index = np.zeros((len(dy), largest + count), np.int64)
    factors = np.zeros(index.shape, np.float32)
    run_split(
        lambda a, b: _choose(dy, scale, largest, offset, index, factors, a, b), len(dy), grain=4
    )
    return factors, index


# Reassociation lets LLVM add in vectors.
@jit.reassociating
def _weighted(values: Any, index: Any, codes: Any, out: Any, first: int, last: int) -> None:
    for t in range(first, last):
        sums = out[t]
        for i in range(index.shape[1]):
            row, factor = codes[index[t, i]], values[t, i]
            for k in range(len(row)):
                sums[k] += factor * np.float32(row[k])


def weighted_rows(
    values: NDArray[np.float32], index: NDArray[np.int64], codes: NDArray[np.int8]
) -> NDArray[np.float32]:
    """float32[T, K]: sum over i of values[T, i] * codes[index[T, i]], codes int8[V, K]."""
    codes = codes.view()
    codes.flags.writeable = False  # as mapped ones are: one compilation for all
    out = np.zeros((len(values), codes.shape[1]), np.float32)
    run_split(lambda a, b: _weighted(values, index, codes, out, a, b), len(values), grain=2)
    return out
