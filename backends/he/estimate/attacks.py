"""Known lattice attacks on LWE, each at the block size and with the choices that cost least.

Primal: find the short vector (e, s, 1) in a lattice that A and b span. Dual: find many short
vectors orthogonal to A, and see whether their products with b are too small for chance. Not here,
because they do not compete at these sizes: BKW and Arora-Ge (many samples of tiny error), hybrid
primal attacks and meet-in-the-middle (sparse secrets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log, log2, pi, sqrt
from statistics import NormalDist

import numpy as np

from backends.he.estimate.lwe import Lwe
from backends.he.estimate.reduction import (
    MIN_BLOCK,
    SIEVED_EXPONENT,
    CoreSvp,
    CostModel,
    Floats,
    log2_root_hermite,
)

_SLICER_EXPONENT = 0.234  # of a closest vector in a batch; see primal_any_of
_MULTIPLICATION = 32 * 32  # gates, MATZOV 2022, p. 37
_ADDITION = 5 * 32  # as the lattice-estimator has it
_FFT_MODULI = range(2, 8)


@dataclass(frozen=True)
class Estimate:
    """What one attack costs under one model.

    bits       log2 of the cost, in the model's unit; infinite when the attack cannot work
    block      BKZ block size
    dimension  of the lattice that is reduced
    choices    what else the attack chose, by name
    """

    attack: str
    model: str
    unit: str
    bits: float
    block: int
    dimension: int
    choices: dict[str, int] = field(default_factory=dict)


# --- primal -----------------------------------------------------------------------------------


def primal_usvp(problem: Lwe, model: CostModel) -> Estimate:
    """Unique-SVP embedding: the least block size that finds (e, s, 1), on the fewest samples.

    BKZ-b finds a vector whose projection on the last b Gram-Schmidt directions is shorter than the
    one expected there: sigma sqrt(b) <= delta^(2b - d - 1) Vol^(1/d) (ADPS16 section 6.3; Albrecht,
    Gopfert, Virdia, Wunderer, "Revisiting the expected cost of solving uSVP", Asiacrypt 2017). The
    secret's coordinates are scaled by sigma_e/sigma_s to the error's size (Bai, Galbraith, ACISP
    2014).
    """
    block, dimension = _least_block(problem, 0.0)
    bits = float(model.log2_reduction(np.array([float(block)]), dimension)[0])
    return Estimate("primal uSVP", model.name, model.unit, bits, block, dimension)


def primal_any_of(problem: Lwe, model: CoreSvp, targets: int) -> Estimate:
    """The same on many blocks that share A, where to break one of them is enough.

    A is reduced once. Then every block is one more target b for the same lattice, and of T blocks
    the luckiest has a projection so short as happens with probability 1/T: that of a chi-square
    variable with b degrees of freedom, not its mean. A target costs 2^(0.234 b), amortised over
    2^(0.058 b) of them, once a sieve's list is there (Ducas, Laarhoven, van Woerden, "The
    randomized slicer for CVPP: sharper, faster, smaller, batchier", PKC 2020); here, for fewer too.
    The attacker takes as many as balance the reduction. Exponents without their lower terms, as in
    core-SVP, so under no other model.
    """
    best = None
    for used in range(int(log2(targets)) + 1):
        block, dimension = _least_block(problem, float(used))
        shared = model.exponent * block
        bits = float(np.logaddexp2(shared, used + _SLICER_EXPONENT * block))
        if best is None or bits < best.bits:
            best = Estimate(
                "primal uSVP, any of many", model.name, model.unit, bits, block, dimension,
                {"log2 targets": used},
            )  # fmt: skip
    assert best is not None
    return best


def _least_block(problem: Lwe, log2_luck: float) -> tuple[int, int]:
    """The least block size that succeeds with probability 2^-log2_luck, and its dimension."""
    low = high = MIN_BLOCK
    while not _primal_dimension(problem, high, log2_luck):
        low, high = high, high + high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if _primal_dimension(problem, middle, log2_luck):
            high = middle
        else:
            low = middle
    return high, _primal_dimension(problem, high, log2_luck)


def _primal_dimension(problem: Lwe, block: int, log2_luck: float) -> int:
    """The least lattice dimension at which that block size succeeds, 0 if none."""
    n, log2_q = problem.dimension, log2(problem.modulus)
    log2_delta = float(log2_root_hermite(np.array([float(block)]))[0])
    # Beyond this dimension more samples lengthen the shortest vector again.
    most = ceil(sqrt(n * log2_q / log2_delta)) + 1
    if problem.samples is not None:
        most = min(most, n + 1 + problem.samples)
    d = np.arange(max(n + 2, block), most + 1, dtype=np.float64)
    log2_error = log2(problem.error.variance) / 2
    scale = log2_error - log2(problem.secret.variance) / 2
    log2_volume = (d - n - 1) * log2_q + n * scale + log2_error
    reached = log2_delta * (2 * block - d - 1) + log2_volume / d
    works = d[reached >= log2_error + log2(_chi_square(block, log2_luck)) / 2]
    return int(works[0]) if len(works) else 0


def _chi_square(freedom: int, log2_luck: float) -> float:
    """A chi-square variable's mean, or its quantile at 2^-log2_luck from two bits of luck on.

    By Wilson and Hilferty's cube root, good to some percent of the deviation even far out.
    """
    if log2_luck < 2:
        return float(freedom)
    z = NormalDist().inv_cdf(2.0**-log2_luck)
    return float(freedom * (1 - 2 / (9 * freedom) + z * sqrt(2 / (9 * freedom))) ** 3)


# --- dual -------------------------------------------------------------------------------------


def dual_hybrid(problem: Lwe, model: CostModel) -> Estimate:
    """Dual attack with guessing, modulus switching and an FFT: MATZOV 2022, theorem 7.6.

    The secret is split three ways: some coordinates are guessed, some are switched to a small
    modulus and searched by FFT, the rest is left to short dual vectors. Taken from the report:
    that the scores of wrong guesses are independent (contested: Ducas, Pulles, Crypto 2023; the
    attack may cost more, not less), one half for the probability of success. Other than there, the
    number of samples is chosen too, sizes are not rounded to integers, and what a guess costs is
    the distribution's own (`Distribution.guess_bits`) and not a Gaussian's: all three favour the
    attacker.
    """
    usvp, _ = _least_block(problem, 0.0)
    blocks = np.arange(max(MIN_BLOCK, int(0.6 * usvp)), int(1.3 * usvp), dtype=np.float64)
    best = _Search(
        lambda at, p: dual_hybrid_costs(problem, model, blocks, (at[0], at[1], at[2], p)),
        (_first_samples(problem), 8, 40),
    )
    for modulus in _FFT_MODULI:
        best.descend(modulus)
    (samples, guessed, transformed), index = best.at, best.index
    return Estimate(
        "dual hybrid", model.name, model.unit, best.bits, int(blocks[index]),
        samples + problem.dimension - guessed - transformed,
        {"samples": samples, "guessed": guessed, "FFT": transformed, "modulus": best.modulus},
    )  # fmt: skip


def dual_hypothesis(problem: Lwe, model: CostModel, targets: int) -> Estimate:
    """One hypothesis, such as "these blocks encrypt this text", tested on many blocks that share A.

    The dual vectors of A are found once and serve every block. Each product of one with a block's
    b - message is a wave cos(2 pi w.b/q) with mean eps = exp(-2 (pi l sigma/q)^2) if the hypothesis
    is true and 0 if not, and variance 1/2, so the sum over N vectors and T blocks decides once
    N*T >= ln(1/mu)/eps^2: T blocks stand in for a T-th of the vectors, that is, for vectors longer
    by a little. The secrets differ from block to block, so nothing of them is guessed. A product
    counts as one operation, which favours the attacker.
    """
    usvp, _ = _least_block(problem, 0.0)
    blocks = np.arange(max(MIN_BLOCK, int(0.6 * usvp)), int(1.3 * usvp), dtype=np.float64)
    best = _Search(
        lambda at, _: _hypothesis_costs(problem, model, blocks, at[0], log2(targets)),
        (_first_samples(problem),),
    )
    best.descend(0)
    return Estimate(
        "dual, one hypothesis on all", model.name, model.unit, best.bits,
        int(blocks[best.index]), best.at[0] + problem.dimension,
        {"samples": best.at[0]},
    )  # fmt: skip


def _first_samples(problem: Lwe) -> int:
    return min(problem.dimension, problem.samples or problem.dimension)


class _Search:
    """Least cost over whole numbers, by steps that halve: costs have one valley up to kinks.

    costs  of a point and an FFT modulus: an array over the block sizes
    """

    def __init__(self, costs: Callable[[tuple[int, ...], int], Floats], at: tuple[int, ...]):
        self._costs = costs
        self.at, self.modulus = at, 0
        self.bits, self.index = inf, 0

    def descend(self, modulus: int) -> None:
        """From the best point so far, with another modulus; kept where it costs less."""
        at = self.at
        bits, index = self._look(at, modulus)
        step = 32
        while step:
            looked = [(self._look(to, modulus), to) for to in _neighbours(at, step)]
            (found, place), to = min(looked)
            if found < bits:
                bits, index, at = found, place, to
            else:
                step //= 2
        if bits < self.bits:
            self.bits, self.index, self.at, self.modulus = bits, index, at, modulus

    def _look(self, at: tuple[int, ...], modulus: int) -> tuple[float, int]:
        costs = self._costs(at, modulus)
        index = int(costs.argmin())
        return float(costs[index]), index


def _neighbours(at: tuple[int, ...], step: int) -> Sequence[tuple[int, ...]]:
    """One coordinate moved by a step, or one given to another."""
    moves = []
    for i in range(len(at)):
        for sign in (step, -step):
            one = [*at]
            one[i] += sign
            moves.append(tuple(one))
            for j in range(i + 1, len(at)):
                both = [*one]
                both[j] -= sign
                moves.append(tuple(both))
    return moves


def _log2_ratio(problem: Lwe, blocks: Floats, sieved: Floats, samples: int, rest: int) -> Floats:
    """log2 of l sigma/q: what a dual vector leaves of b, from a sieve after reduction (p. 39)."""
    d = samples + rest
    log2_q = log2(problem.modulus)
    log2_secret = log2(problem.secret.variance) / 2 + log2_q
    log2_volume = (samples * log2(problem.error.variance) / 2 + rest * log2_secret) / d
    # A sieve's vectors are sqrt(4/3) times the Gaussian heuristic of its block.
    sieve = np.log2(sieved / (2 * pi * np.e)) / 2 + log2(4 / 3) / 2
    return log2_volume + sieve + (d - sieved) * log2_root_hermite(blocks) - log2_q


def _log2_vectors(log2_ratio: Floats) -> Floats:
    """log2 of eps^-2 = exp(4 (pi l sigma/q)^2), the vectors a difference needs, but for a factor.

    Cut off where it is astronomical and its square would overflow.
    """
    return 4 * (pi * np.exp2(np.minimum(log2_ratio, 8.0))) ** 2 / log(2)


def dual_hybrid_costs(
    problem: Lwe, model: CostModel, blocks: Floats, choice: tuple[int, int, int, int]
) -> Floats:
    """log2 of what the dual-hybrid attack costs at every block size, infinite where it cannot work.

    choice  samples; coordinates that are guessed; that are searched by FFT; the FFT's modulus
    """
    samples, guessed, transformed, p = choice
    rest = problem.dimension - guessed - transformed
    most = inf if problem.samples is None else problem.samples
    if not 1 <= samples <= most or min(guessed, transformed) < 0 or rest < 1:
        return np.full_like(blocks, inf)
    d = samples + rest
    sieved, cost = model.short_vectors(blocks, d)
    switching = transformed / 3 * problem.secret.variance * (pi / p) ** 2
    log2_guesses = guessed * problem.secret.guess_bits
    hypotheses = log(2) * (log2_guesses + transformed * log2(p) + 1)  # 1: ln(1/mu), mu = 1/2
    ratio = _log2_ratio(problem, blocks, sieved, samples, rest)
    wanted = _log2_vectors(ratio) + switching / log(2) + log2(hypotheses)
    sampling = cost + np.maximum(0.0, wanted - SIEVED_EXPONENT * sieved)
    per_guess = wanted + log2(4 * _ADDITION)
    if transformed:
        fft = log2(_MULTIPLICATION * transformed) + (transformed + 1) * log2(p)
        per_guess = np.logaddexp2(per_guess, fft)
    total = np.logaddexp2(sampling, log2_guesses + per_guess)
    return np.where(blocks <= d, total, inf)


def _hypothesis_costs(
    problem: Lwe, model: CostModel, blocks: Floats, samples: int, log2_targets: float
) -> Floats:
    """log2 of the cost at every block size."""
    most = inf if problem.samples is None else problem.samples
    if not 1 <= samples <= most:
        return np.full_like(blocks, inf)
    d = samples + problem.dimension
    sieved, cost = model.short_vectors(blocks, d)
    ratio = _log2_ratio(problem, blocks, sieved, samples, problem.dimension)
    products = np.maximum(_log2_vectors(ratio) + log2(log(2)), log2_targets)
    sampling = cost + np.maximum(0.0, products - log2_targets - SIEVED_EXPONENT * sieved)
    return np.where(blocks <= d, np.logaddexp2(sampling, products), inf)
