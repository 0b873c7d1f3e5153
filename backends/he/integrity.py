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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy, Keystream, random_bytes
from backends.he.params import ERROR_BITS, Parameters
from backends.he.wire import Format
from protocol.errors import WrongAnswerError

if TYPE_CHECKING:
    import torch  # not when this is loaded: schemes on a CPU may do without

POOL = 64
"""Secret rows of one matrix."""
ROWS = 8
"""Rows of the pool that one request is checked with."""
LIMIT = 8.0
"""Standard deviations: an honest difference exceeds it with probability 2*exp(-32)."""
SUSPICION = 37.33
"""Of the sum of ROWS squares of standard normal numbers: exceeded with probability 1e-5."""
CLASSES = 16
"""Sums are kept for places in a request that are equal mod this: a bias may be for some tokens."""
_MARKS = 32
"""By them rows are told apart mod 2 too, where each is one bit: of 8,192 rows hardly a pair by
chance, of a head's 128,256 about two, which makes what is tolerated of them a little larger."""
_MIX = np.random.default_rng(0).integers(0, 1 << 63, _MARKS, np.uint64) * 2 + 1
"""Odd factors that make one number of a row's marks; which ones does not matter."""
_LEAST_DEVIATION = 2.0**-20
_SLAB_BYTES = 64 << 20

Float64Array = NDArray[np.float64]


@jit.kernel
def _coefficients(words: Any, out: Any) -> None:
    """out float32[n], each a sign times a number of [1/2, 1), from 32 random bits each."""
    for i in range(len(words)):
        size = np.float32((words[i] >> 9) + (1 << 23)) * np.float32(2**-24)
        out[i] = size if words[i] & 1 else -size


class Pool:
    """V, float32[POOL, N], each a random sign times a uniform number of [1/2, 1).

    A key is all that is kept of it: the pools of a 1B are 200 MB, and few rows are used at a time.
    """

    def __init__(self, entropy: Entropy, outputs: int) -> None:
        self._outputs = outputs
        self._stream = Keystream(entropy.fresh_key())

    def rows(self, which: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[n, N], rows of it. Whoever asks for them overwrites them."""
        words = np.zeros((len(which), self._outputs), "<u4")
        size = 4 * self._outputs
        self._stream.add_several(
            (row.view(np.uint8), size * int(place)) for row, place in zip(words, which, strict=True)
        )
        out = np.empty(words.shape, np.float32)
        _coefficients(words.reshape(-1), out.reshape(-1))
        words[...] = 0
        return out

    def whole(self) -> NDArray[np.float32]:
        """All of it."""
        return self.rows(range(POOL))


@dataclass(frozen=True)
class Survey:
    """What one pass over a matrix M (N x K) yields for its check.

    projected  float64[POOL, K], V*M
    marks      float64[N, 32], M times random integers below 2^16: exact, tells which rows are alike
    bits       uint8[N], all entries of a row, or-ed: its lowest bit is what divides the row
    """

    projected: torch.Tensor = field(repr=False)
    marks: Float64Array = field(repr=False)
    bits: NDArray[np.uint8] = field(repr=False)


def survey(pool: torch.Tensor, weight: NDArray[np.int8], forward: bool, entropy: Entropy) -> Survey:
    """Multiply float32[POOL, N] by the matrix (the weight, or its transpose), where the pool is."""
    import torch

    device, wide = pool.device, pool.double()
    rows, columns = weight.shape
    inputs, outputs = (columns, rows) if forward else (rows, columns)
    raw = random_bytes(entropy, 2 * inputs * _MARKS).view("<u2").astype(np.float64)
    probes = torch.from_numpy(raw.reshape(inputs, _MARKS)).to(device)
    projected = torch.zeros((POOL, inputs), dtype=torch.float64, device=device)
    marks = torch.zeros((outputs, _MARKS), dtype=torch.float64, device=device)
    bits = np.zeros(outputs, np.uint8)
    step = max(1, _SLAB_BYTES // (8 * columns))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        codes = np.array(weight[part])
        slab = torch.from_numpy(codes).to(device).double()
        found = np.bitwise_or.reduce(codes, axis=1 if forward else 0).view(np.uint8)
        if forward:
            projected += wide[:, part] @ slab
            marks[part] = slab @ probes
            bits[part] = found
        else:
            projected[:, part] = wide @ slab.T
            marks += slab.T @ probes[part]
            bits |= found
    return Survey(projected, marks.cpu().numpy(), bits)


@dataclass(frozen=True)
class Honesty:
    """How an honest worker's differences are distributed, for each row of the pool.

    mean, deviation  float64[POOL]
    drift            deviations by which an honest mean may be off for ever (0: noise is random)
    """

    mean: Float64Array = field(repr=False)
    deviation: Float64Array = field(repr=False)
    drift: float = 0.0


def mlwe_honesty(
    pool: NDArray[np.float32], found: Survey, form: Format, parameters: Parameters
) -> Honesty:
    """The distribution under the module-LWE cipher, in units of the worker modulus.

    Up: rounding u to a multiple of `unit`, uniform, unit^2/12, and the error's variance times
    (p/q)^2, for each input, times U. Down: the dropped bits and the owner's own rounding,
    4^delta/12 together, for each output, times v; two outputs' are uncorrelated unless their rows
    of M are alike (`_dropped_variance`). What is dropped of values that are multiples of `unit` is
    the same in units of it.

    A matrix of zeros has exact answers; the least deviation is far below any error it could have.

    Means: rounding from q to p averages to zero but for 2^-27 (`epilogue.py`), for u and for the
    owner's mask; rounding half up is off by half of a result's grid, of which the owner takes off
    what most rows have.
    """
    p_over_q = form.modulus / parameters.modulus
    up = form.unit**2 / 12 + p_over_q**2 * ERROR_BITS / 4
    delta, wide = form.dropped_bits - form.unused_bits, pool.astype(np.float64)
    projected = found.projected.cpu().numpy()
    grid = found.bits & -found.bits.astype(np.int64)
    down = (
        form.unit**2 * _dropped_variance(wide, found.marks, grid, delta)
        + _parallel_squares(wide, found.marks) / 12
    )
    variance = up * np.sum(projected**2, axis=1) + down
    mean = wide @ (form.unit * np.where(grid < 1 << delta, grid, 0) / 2 - form.unit // 2)
    return Honesty(mean, np.maximum(np.sqrt(variance), _LEAST_DEVIATION))


def _dropped_variance(
    pool: Float64Array, marks: Float64Array, grid: NDArray[np.int64], dropped: int
) -> Float64Array:
    """float64[POOL]: the variance of V times what rounding drops of the answers' values.

    It adds half of 2^dropped and drops that many bits. A row of M is grid * r where an entry of r
    is odd; its value is grid * (r*u), u uniform. Bit e of r*u is worth grid * 2^e, or nothing, each
    time as likely: variance a quarter of its square. Two rows whose r are equal mod 2^(e+1) have it
    in common: they add up before they are squared. Of rows whose r are odd multiples of each other
    mod 2^(e+1) it is correlated, and they are taken to be fully alike, of the worst sign: what
    cancels mostly does not when all dropped bits are zero, and then it is far beyond its deviation.
    All other bits are uncorrelated, pair by pair: were r' = c*r + 2^m*s with s no multiple of r
    mod 2, then s*u is uniform whatever r*u is.
    """
    whole = marks.astype(np.int64) // np.maximum(grid, 1)[:, None]
    first = np.argmax(whole & 1, axis=1)
    odd = whole[np.arange(len(whole)), first].astype(np.uint64) | np.uint64(1)
    inverse = odd.copy()  # mod 8; each step doubles the bits
    for _ in range(5):
        inverse *= np.uint64(2) - odd * inverse
    directions = whole.astype(np.uint64) * inverse[:, None]
    total = np.zeros(len(pool))
    for bit in range(dropped):
        live = np.flatnonzero((grid != 0) & (grid << bit < 1 << dropped))
        mask = np.uint64((2 << bit) - 1)
        equal = _ids(whole[live].astype(np.uint64) & mask)
        family = _ids(directions[live] & mask)
        worth = grid[live] << bit
        worth = np.where(worth == 1 << dropped - 1, -worth, worth)  # half of 2^dropped is added
        weighted = pool[:, live] * worth
        total += _worst_squares(weighted, family, equal) / 4
    return total


def _ids(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[n] of [n, 32]: equal for equal rows, and for others almost never."""
    return np.asarray((keys * _MIX).sum(axis=1, dtype=np.uint64))


def _worst_squares(terms: Float64Array, family: NDArray[Any], equal: NDArray[Any]) -> Float64Array:
    """float64[R]: of float64[R, n], what squares sum up to where families are of one value each.

    Equal ones (of one family) are added up; others of a family as if all had the worst sign.
    """
    if not terms.shape[1]:
        return np.zeros(len(terms))
    order = np.lexsort((equal, family))
    begins = np.diff(family[order], prepend=family[order[:1]] + 1) != 0
    others = begins | (np.diff(equal[order], prepend=equal[order[:1]]) != 0)
    if begins.all():
        return np.asarray((terms**2).sum(axis=1))
    sums = np.abs(np.add.reduceat(terms[:, order], np.flatnonzero(others), axis=1))
    return np.asarray(
        (np.add.reduceat(sums, np.flatnonzero(begins[others]), axis=1) ** 2).sum(axis=1)
    )


def _parallel_squares(pool: Float64Array, marks: Float64Array) -> Float64Array:
    """float64[POOL]: what the sum of v_j^2 is where all outputs' roundings are uncorrelated.

    Equal rows of M have equal roundings: their coefficients add up. Other parallel rows are taken
    to have equal ones too, of the worst sign. A row of zeros has none.
    """
    rows = np.flatnonzero(marks.any(axis=1))
    found, each = marks[rows], np.arange(len(rows))
    column = np.argmax(found != 0, axis=1)
    first = found[each, column]
    # Marks are exact, so parallel rows have quotients that are equal to the last bit; none is -0.
    quotient = found[each, (column + 1) % found.shape[1]] / first + 0.0
    family = quotient.view(np.uint64) * np.uint64(_MARKS + 1) + column.astype(np.uint64)
    return _worst_squares(pool[:, rows], family, first)


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


def draw_rows(key: bytearray) -> NDArray[np.int64]:
    """int64[ROWS], the rows of the pool for one request, by a key that is overwritten."""
    stream = Keystream(key)
    words, order = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    try:
        words = stream.take(8 * POOL).view("<u8")
        order = np.argsort(words)
        return order[:ROWS].copy()
    finally:
        stream.wipe()
        words[...] = 0
        order[...] = 0


def suspicious(
    differences: Float64Array, mean: Float64Array, deviation: Float64Array
) -> NDArray[np.int64]:
    """The tokens of float64[T, ROWS] whose differences are larger together than noise is.

    Of an honest answer in which nothing wrapped, one in 100,000 is.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        together = np.sum(((differences - mean) / deviation) ** 2, axis=1)
    return np.flatnonzero(~(together <= SUSPICION))


class Judge:
    """Decides whether the differences of an answer are an honest worker's. One for a matrix.

    honesty  what they are held against
    """

    def __init__(self, name: str, honesty: Honesty) -> None:
        self._name = name
        self.honesty = honesty
        self._sums: dict[str, _Sums] = {}
        self._lock = threading.Lock()

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
        try:
            if not _tally(differences, mean, deviation, units, total, energy):
                raise self.wrong_result()
            with self._lock:
                sums = self._sums.setdefault(worker, _Sums())
                tokens = sums.tokens[rows] + (size + CLASSES - 1 - np.arange(CLASSES)) // CLASSES
                total += sums.total[rows]
                energy += sums.energy[rows]
                if not _within(tokens, total, energy, self.honesty.drift):
                    raise self._wrong("off by a little, and always alike")
                sums.tokens[rows], sums.total[rows], sums.energy[rows] = tokens, total, energy
        finally:
            for private in (total, energy, mean, deviation):
                private[...] = 0

    def wrong_result(self) -> WrongAnswerError:
        """What to raise for an answer with a result that no noise explains."""
        return self._wrong("not the product that was asked for")

    def _wrong(self, what: str) -> WrongAnswerError:
        return WrongAnswerError(
            f"{self._name}: the worker's answer is {what}; the worker is broken or lying: "
            "stop using it (the request revealed nothing to it)"
        )
