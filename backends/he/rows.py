"""Kernels for the part of a language-model head that the owner multiplies itself (`nn/head.py`).

They are here because compiled code is kept by a digest of this folder (`jit.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.threads import run_split


@jit.kernel
def _sampled(weights: Any, offset: Any, index: Any, value: Any, first: int, last: int) -> None:
    count = index.shape[1]
    for t in range(first, last):
        row = weights[t]
        total = 0.0
        for k in range(len(row)):
            total += np.float64(row[k])
        step = total / count
        value[t] = np.float32(step)
        place, running, found = 0, 0.0, -1
        for k in range(len(row)):
            if row[k] > 0:
                running += np.float64(row[k])
                found = k
                while place < count and running > (place + offset[t]) * step:
                    index[t, place] = k
                    place += 1
        # What rounding left over at the end.
        for rest in range(place, count):
            index[t, rest] = max(found, 0)


def sampled(
    weights: NDArray[np.float32], offset: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Systematic sampling: int64[T, count] places in each row of weights float32[T, V] >= 0.

    offset  float64[T] in [0, 1), where the first of equal steps through a row's sum lies

    A place is taken as often as its weight over the step, on average exactly, and up to one. Also
    returns float32[T], the step: what one of the places stands for. A row of zeros has step zero.
    """
    index = np.zeros((len(weights), count), np.int64)
    value = np.zeros(len(weights), np.float32)
    run_split(lambda a, b: _sampled(weights, offset, index, value, a, b), len(weights), grain=4)
    return index, value


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
