"""Catches a worker that returns wrong products, whatever its reason (Freivalds 1977; Slalom).

What is compared. Per matrix M (N x K) the owner keeps POOL secret rows v in R^N and U = V*M, made
from the public weights once. When a request is made, ROWS of them are drawn for it; when its
answer has been decrypted to centred integers y in R^N, and before anyone sees a value, each row's

    d = v*y - (p/q) * U*m,          m = round(alpha*x*q/p), the message that was encrypted,

is a real number: v times the error of the answer. Nothing here is taken mod p, so no error is its
own opposite (+p/2 and -p/2 are far apart), and a result that wrapped is off by p.

What a lie must get past. Every coefficient is a random sign times a number uniform on [1/2, 1), so
its density is 1. Let e in R^N be the error of one token's answer, chosen without knowing v, and
let a row tolerate |d| <= t. Then the row passes with probability at most

    min(1,  2t / max_j |e_j|,  4*sqrt(2)*t / ||e||_2).

Proof. Fix all coefficients but that of the largest error: d moves with slope max|e_j| while the
coefficient has density 1, so d lies in an interval of length 2t with probability 2t / max|e_j|.
For the other bound fix the signs: d is a constant plus sum e_j*w_j/2 with w uniform on the unit
cube, whose density is at most sqrt(2) / (||e||/2) (Ball, Cube slicing in R^n, 1986). (Coefficients
have 23 random bits; the grid adds 2^-24*||e||_1, below a quarter of t for N up to 2^18.) And if e
has one coordinate only, |e_j| > 2t never passes. The rows of a request are independent, so a
request passes with at most the ROWS-th power, minimised over its tokens; and since every request
has rows of its own, what passed once has to pass others next time.

What an honest answer shows. With r the roundings of u to p and the errors of LWE, s the roundings
of the answer: d = sum_k U_k*r_k + sum_j v_j*s_j. They do not depend on x, are fresh in every
token, and strictly sub-Gaussian (uniform, binomial), with mean and variance known exactly
(`mlwe_honesty`). So z = (d - mean)/deviation is over LIMIT = 8 with probability 2*exp(-32).

What is too small to see once. Over all answers of one worker for one matrix, sums of z and z^2 are
kept, per row of the pool and per place in the request mod CLASSES. After n tokens

    |sum z| <= 8*sqrt(n),        sum (z^2 - 1) <= 2*sqrt(32*n) + 64

fail for an honest worker with probability 2*exp(-32) and exp(-32) (Laurent and Massart 2000): a
bias b of one output shows when b*|v_j| > 8*deviation/sqrt(n). Sums are kept by worker, so nobody
is accused of what another one did. All of this is secret and lives as long as the process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy, Keystream, random_bytes
from backends.he.params import ERROR_BITS, Parameters
from protocol.errors import WrongAnswerError

POOL = 64
"""Secret rows of one matrix."""
ROWS = 8
"""Rows of the pool that one request is checked with."""
LIMIT = 8.0
"""Standard deviations: an honest difference exceeds it with probability 2*exp(-32)."""
CLASSES = 16
"""Sums are kept for places in a request that are equal mod this: a bias may be for some tokens."""
_MARKS = 16
_SLAB_BYTES = 64 << 20

Float64Array = NDArray[np.float64]


def draw_pool(entropy: Entropy, outputs: int) -> NDArray[np.float32]:
    """float32[POOL, outputs], each a random sign times a uniform number of [1/2, 1)."""
    words = random_bytes(entropy, 4 * POOL * outputs).view("<u4")
    size = ((words >> np.uint32(9)) + np.uint32(1 << 23)).astype(np.float32) * np.float32(2**-24)
    pool = np.where(words & np.uint32(1), size, -size).reshape(POOL, outputs)
    words[...] = 0
    size[...] = 0
    return pool


@dataclass(frozen=True)
class Survey:
    """What one pass over a matrix M (N x K) yields for its check.

    projected  float64[POOL, K], V*M
    marks      float64[N, 16], M times random integers below 2^16: exact, tells zero rows, parallel
               rows and common powers of two
    """

    projected: torch.Tensor = field(repr=False)
    marks: Float64Array = field(repr=False)


def survey(pool: torch.Tensor, weight: NDArray[np.int8], forward: bool, entropy: Entropy) -> Survey:
    """Multiply float32[POOL, N] by the matrix (the weight, or its transpose), where the pool is."""
    device, wide = pool.device, pool.double()
    rows, columns = weight.shape
    inputs, outputs = (columns, rows) if forward else (rows, columns)
    raw = random_bytes(entropy, 2 * inputs * _MARKS).view("<u2").astype(np.float64)
    probes = torch.from_numpy(raw.reshape(inputs, _MARKS)).to(device)
    projected = torch.zeros((POOL, inputs), dtype=torch.float64, device=device)
    marks = torch.zeros((outputs, _MARKS), dtype=torch.float64, device=device)
    step = max(1, _SLAB_BYTES // (8 * columns))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        slab = torch.from_numpy(np.array(weight[part])).to(device).double()
        if forward:
            projected += wide[:, part] @ slab
            marks[part] = slab @ probes
        else:
            projected[:, part] = wide @ slab.T
            marks += slab.T @ probes[part]
    return Survey(projected, marks.cpu().numpy())


@dataclass(frozen=True)
class Honesty:
    """How an honest worker's differences are distributed, for each row of the pool.

    mean, deviation  float64[POOL]
    drift            deviations by which an honest mean may be off for ever (0: noise is random)
    """

    mean: Float64Array = field(repr=False)
    deviation: Float64Array = field(repr=False)
    drift: float = 0.0


def mlwe_honesty(pool: NDArray[np.float32], found: Survey, parameters: Parameters) -> Honesty:
    """The distribution under the module-LWE cipher, in units of the worker modulus.

    Up: rounding u to p, uniform, 1/12, and the error's variance times (p/q)^2, for each input,
    times U. Down: the dropped bits and the owner's own rounding, 4^delta/12 together, for each
    output, times v; two outputs' are uncorrelated unless their rows of M are parallel.

    Means: rounding from q to p averages to zero but for 2^-27 (`epilogue.py`), for u and for the
    owner's mask; rounding half up is off by half of a result's grid.
    """
    p_over_q = parameters.worker_modulus / parameters.modulus
    up = 1 / 12 + p_over_q**2 * ERROR_BITS / 4
    down = 4.0**parameters.dropped_bits / 12
    projected = found.projected.cpu().numpy()
    variance = up * np.sum(projected**2, axis=1) + down * _correlated_squares(pool, found.marks)
    grid = _lowest_bits(found.marks)
    half = np.where(grid < 1 << parameters.dropped_bits, grid, 0) / 2
    mean = pool.astype(np.float64) @ half
    return Honesty(mean, np.sqrt(variance))


def _correlated_squares(pool: NDArray[np.float32], marks: Float64Array) -> Float64Array:
    """float64[POOL]: what the sum of v_j^2 is where all outputs' roundings are uncorrelated.

    Equal rows of M have equal roundings: their coefficients add up. Other parallel rows are taken
    to have equal ones too, of the worst sign. A row of zeros has none.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        # Marks are exact, so parallel rows have quotients that are equal to the last bit.
        quotients = marks[:, 1] / marks[:, 0]
    order = np.lexsort((marks[:, 0], quotients))
    order = order[marks[order, 0] != 0]
    if not len(order):
        return np.zeros(len(pool))
    parallel = np.diff(quotients[order], prepend=np.nan) != 0
    other = parallel | (np.diff(marks[order, 0], prepend=0) != 0)
    equal = np.add.reduceat(pool[:, order].astype(np.float64), np.flatnonzero(other), axis=1)
    firsts = np.flatnonzero(parallel[other])
    return np.sum(np.add.reduceat(np.abs(equal), firsts, axis=1) ** 2, axis=1)


def _lowest_bits(marks: Float64Array) -> NDArray[np.int64]:
    """int64[N]: the largest power of two that divides a row of M; 0 where the row is zero."""
    common = np.bitwise_or.reduce(marks.astype(np.int64), axis=1)
    return common & -common


@dataclass
class _Sums:
    """Over the answers of one worker, float64[POOL, CLASSES]: tokens, sums of z and of z^2 - 1."""

    tokens: Float64Array = field(default_factory=lambda: np.zeros((POOL, CLASSES)))
    total: Float64Array = field(default_factory=lambda: np.zeros((POOL, CLASSES)))
    energy: Float64Array = field(default_factory=lambda: np.zeros((POOL, CLASSES)))


@jit.kernel
def _tally(differences: Any, mean: Any, deviation: Any, unit: Any, total: Any, energy: Any) -> bool:
    """Sum up z and z^2 - 1 of [T, ROWS] to [ROWS, CLASSES]; whether no |z| is over LIMIT."""
    fits = True
    for t in range(len(differences)):
        place = t % CLASSES
        for i in range(ROWS):
            z = (differences[t, i] / unit[t] - mean[i]) / deviation[i]
            fits &= abs(z) <= LIMIT  # a NaN is within nothing
            total[i, place] += z
            energy[i, place] += z * z - 1
    return fits


@jit.kernel
def _within(tokens: Any, total: Any, energy: Any, drift: float) -> bool:
    """Whether sums [ROWS, CLASSES] are an honest worker's, of every class and of all together."""
    for i in range(ROWS):
        n = s = q = 0.0
        for place in range(CLASSES + 1):
            if place < CLASSES:
                a, b, c = tokens[i, place], total[i, place], energy[i, place]
                n, s, q = n + a, s + b, q + c
            else:
                a, b, c = n, s, q
            root = np.sqrt(a)
            if abs(b) > LIMIT * root + drift * a or c > np.sqrt(2.0) * LIMIT * root + LIMIT**2:
                return False
    return True


class Judge:
    """Decides whether the differences of an answer are an honest worker's. One for a matrix.

    honesty  what they are held against
    """

    def __init__(self, name: str, honesty: Honesty, entropy: Entropy) -> None:
        self._name = name
        self.honesty = honesty
        self._draws = Keystream(entropy.fresh_key())
        self._sums: dict[str, _Sums] = {}
        self._lock = threading.Lock()

    def draw_rows(self) -> NDArray[np.int64]:
        """int64[ROWS], the rows of the pool for one request."""
        with self._lock:
            words = self._draws.take(8 * POOL).view("<u8")
        order = np.argsort(words)
        rows = order[:ROWS].copy()
        words[...] = 0
        order[...] = 0
        return rows

    def require(
        self, rows: NDArray[np.int64], differences: Float64Array, worker: str,
        unit: Float64Array | None = None,
    ) -> None:  # fmt: skip
        """Raise WrongAnswerError unless float64[T, ROWS] are an honest worker's, now and so far.

        unit  float64[T] of the differences, where tokens have their own
        """
        total, energy = np.zeros((2, ROWS, CLASSES))
        mean, deviation = self.honesty.mean[rows], self.honesty.deviation[rows]
        size = len(differences)
        units = np.ones(size) if unit is None else unit
        if not _tally(differences, mean, deviation, units, total, energy):
            raise self._wrong("not the product that was asked for")
        with self._lock:
            sums = self._sums.setdefault(worker, _Sums())
            tokens = sums.tokens[rows] + (size + CLASSES - 1 - np.arange(CLASSES)) // CLASSES
            total += sums.total[rows]
            energy += sums.energy[rows]
            if not _within(tokens, total, energy, self.honesty.drift):
                raise self._wrong("off by a little, and always alike")
            sums.tokens[rows], sums.total[rows], sums.energy[rows] = tokens, total, energy

    def _wrong(self, what: str) -> WrongAnswerError:
        return WrongAnswerError(
            f"{self._name}: the worker's answer is {what}; the worker is broken or lying: "
            "stop using it (the request revealed nothing to it)"
        )
