"""Differential privacy of what is trained: an adapter that tells little of any one sequence.

DP-SGD (Abadi et al. 2016), or rather Adam on its gradients, which is post-processing:

    a step's batch   each of the n sequences by itself with probability m/n, and of those B at most,
                     a uniform choice; from the system's entropy. What is missing to B is filled
                     with sequences that count for nothing, so that workers always see B
    its gradient     (sum over the batch of clip(g_i) + N(0, (z C)^2)) / m, where g_i is that of a
                     sequence's mean loss, and clip makes it no longer than C

The unit is one packed sequence, and neighbours are data where one is replaced by any other: so a
sum changes by 2C at most, and n is public. The accountant is Google's `dp-accounting`: privacy loss
distributions of that sampling (Ganesh et al. 2025, arXiv 2508.15089), composed over steps. Each
step's gradients must depend on each sequence alone, ciphers included: `thin` ones learn the scale
of their results from all of them, and are not for this.
docs/dp.md says what that promises, and what not.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from backends.defaults import CLIP, LEAST_DELTA
from backends.errors import UserError
from backends.he.entropy import Keystream, OsEntropy
from backends.nn.corpus import Sequences
from backends.nn.marks import UNCOUNTED, predictions
from backends.nn.persample import PerSample, clipped_sum

_LEAST_NOISE = 0.5
_TOLERANCE = 5e-3
"""Of the noise that is searched for."""
_INTERVAL = 5e-3
"""Privacy losses are rounded to multiples of it, upward: any is sound. A fifth of it finds an
epsilon that is 0.1 to 2 % less (of 100 to 5,000 steps), in several times as long."""
_BELOW_FULL = 0.5
"""Square roots of B that a batch has less than B in the mean. With none half of all batches were
cut, which costs privacy, with two a large part would be filling; this is within a sixth of the best
ratio of gradient to noise for B from 8 to 256."""
_DRAWS = 4
"""Gaussians a number of noise is made of, over sqrt(4): who would undo the rounding of one to find
what it was added to has to know all of them (Holohan and Braghin 2021, as opacus has it)."""
_AT_ONCE = 1 << 16
"""Numbers of noise: what making them takes is several times as much as they are."""
_BITS = 52  # of a uniform number, so that it plus a half is exact
_MOST_TIMES = 20  # doublings of the sequences, looking for enough


class DpError(UserError, ValueError):
    """What was asked of differential privacy cannot be had; the text says what can."""


@dataclass(frozen=True)
class DifferentialPrivacy:
    """What an adapter may tell of any one sequence, after all steps of a run.

    epsilon  the budget
    delta    from `LEAST_DELTA`, below 1/n; None for n^-1.1, of n sequences
    clip     the most that the gradient of a sequence's mean loss may weigh: its norm over all of
             the adapter
    """

    epsilon: float
    delta: float | None = None
    clip: float = CLIP

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.clip < math.inf):
            raise ValueError("epsilon and clip are positive and finite")
        if self.delta is not None and not LEAST_DELTA <= self.delta < 1:
            raise ValueError(f"delta is {LEAST_DELTA:g} at least and below 1, not {self.delta}")

    def delta_of(self, sequences: int) -> float:
        """Raises DpError for one that would let whole sequences be published."""
        delta = sequences**-1.1 if self.delta is None else self.delta
        if delta >= 1 / sequences:
            raise DpError(
                f"delta {delta:g} is not below 1/{sequences}, of {sequences} sequences: publishing "
                f"one of them would keep to it; give --dp-delta {sequences**-1.1:.1g} or less"
            )
        return delta


def require_accountant() -> None:
    """Raises DpError when `dp-accounting` is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise DpError(
            "differential privacy needs the package dp-accounting, which is not installed: "
            "pip install -c constraints.txt -e '.[dp]'"
        )


def _accountant() -> Any:
    require_accountant()
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE, _INTERVAL)


def _event(sequences: int, batch: int, steps: int, noise: float) -> Any:
    """What so many steps are to the accountant, which wants noise over the norm of one part."""
    import dp_accounting

    rate = expected(batch) / sequences
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(sequences, rate, batch, noise)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def expected(batch: int) -> float:
    """How many sequences a step of at most `batch` draws in the mean."""
    return batch - _BELOW_FULL * math.sqrt(batch)


@lru_cache(maxsize=64)
def spent(sequences: int, batch: int, steps: int, noise: float, delta: float) -> float:
    """Epsilon of so many steps, each on at most `batch` of the sequences.

    noise  its standard deviation over the clip norm

    Raises DpError without an accountant.
    """
    if steps == 0:
        return 0.0
    accountant = _accountant()
    return float(accountant.compose(_event(sequences, batch, steps, noise)).get_epsilon(delta))


@lru_cache(maxsize=16)
def noise_for(sequences: int, batch: int, steps: int, privacy: DifferentialPrivacy) -> float:
    """The least noise, over the clip norm, with which so many steps keep to the budget.

    Raises DpError where it would drown the gradient: where, in every direction, a step's noise is
    more than all of its sequences could add up to; for batches larger than the data; without an
    accountant.
    """
    require_accountant()
    import dp_accounting

    if batch > sequences:
        raise DpError(
            f"a step takes {batch} sequences, and there are {sequences}: with differential privacy "
            "none is taken twice; give more text, shorter sequences, or a smaller batch"
        )
    delta, most = privacy.delta_of(sequences), float(batch)
    if spent(sequences, batch, steps, most, delta) > privacy.epsilon:
        raise DpError(
            f"epsilon {privacy.epsilon:g} for {steps} steps on {sequences} sequences takes more "
            "noise than a step's gradients can add up to: nothing would be learned. What would do: "
            f"{_enough(sequences, batch, steps, privacy)}"
        )
    less = most / 2  # from above: of little noise the losses are many, and slow to compose
    while (fits := spent(sequences, batch, steps, less, delta) <= privacy.epsilon) and (
        less > _LEAST_NOISE
    ):
        less /= 2
    if fits:
        return less
    return float(
        dp_accounting.calibrate_dp_mechanism(
            _accountant,
            lambda noise: _event(sequences, batch, steps, noise),
            privacy.epsilon,
            delta,
            dp_accounting.ExplicitBracketInterval(less, 2 * less),
            tol=_TOLERANCE,
        )
    )


def _enough(sequences: int, batch: int, steps: int, privacy: DifferentialPrivacy) -> str:
    """In words, with what the noise would be no more than the gradients."""
    delta = privacy.delta_of(sequences)
    found = [f"--dp-epsilon {_above(spent(sequences, batch, steps, batch, delta)):g}"]
    for times in range(1, _MOST_TIMES):
        more = sequences << times
        # A given delta may be too large for more sequences.
        if spent(more, batch, steps, batch, min(delta, more**-1.1)) <= privacy.epsilon:
            found.append(f"{more} sequences")
            break
    for fewer in (steps >> shift for shift in range(1, steps.bit_length())):
        if spent(sequences, batch, fewer, batch, delta) <= privacy.epsilon:
            found.append(f"--steps {fewer}")
            break
    return ", or ".join(found)


def _above(epsilon: float) -> float:
    """Rounded up to two digits, and more than nothing."""
    unit = 10.0 ** (math.floor(math.log10(max(epsilon, 1e-3))) - 1)
    return math.ceil(epsilon / unit) * unit


class Draws:
    """What differential privacy rests on nobody knowing: batches, and noise.

    From the operating system's generator and never from a seed, so that nothing of it is in a
    checkpoint and no run repeats another's.
    """

    def __init__(self) -> None:
        self._choice = random.SystemRandom()
        self._entropy = OsEntropy()

    def batch(self, sequences: int, batch: int) -> list[int]:
        """Each with the same probability by itself; a uniform choice where they are too many."""
        drawn = self._uniform(sequences) < expected(batch) / sequences
        chosen: list[int] = drawn.nonzero().flatten().tolist()
        return chosen if len(chosen) <= batch else self._choice.sample(chosen, batch)

    def noise(self, shape: Sequence[int], deviation: float) -> torch.Tensor:
        """Independent Gaussians, float64[*shape]."""
        total = torch.zeros(math.prod(shape), dtype=torch.float64)
        for part in torch.split(total, _AT_ONCE):
            for _ in range(_DRAWS):
                part += torch.special.ndtri(self._uniform(len(part)))
        return total.mul_(deviation / math.sqrt(_DRAWS)).view(tuple(shape))

    def _uniform(self, count: int) -> torch.Tensor:
        """float64[count] between 0 and 1, from an AES-256-CTR stream of their own."""
        stream = Keystream(self._entropy.fresh_key())
        try:
            bits = stream.take(8 * count).view(np.uint64)
        finally:
            stream.wipe()
        bits >>= np.uint64(64 - _BITS)
        found = bits.astype(np.float64)
        found += 0.5
        found /= 2.0**_BITS
        return torch.from_numpy(found)


class DpSteps:
    """What of a run's steps is otherwise with differential privacy: batches, and gradients.

    noise  standard deviation over the clip norm; that of an earlier run where one is gone on with
    """

    def __init__(
        self, model: nn.Module, sequences: int, batch: int, privacy: DifferentialPrivacy
    ) -> None:
        """Raises DpError for a delta that is none, or without an accountant; SeparationError for a
        model whose sequences cannot be told apart."""
        require_accountant()
        self.privacy = privacy
        self.delta = privacy.delta_of(sequences)
        self.noise = 0.0
        self._sequences, self._batch = sequences, batch
        self._per_sample = PerSample(model)
        self._per_sample.require_apart()
        self._draws = Draws()
        self.adapted = self._per_sample.adapted

    def settle(self, noise: float | None, steps: int) -> None:
        """Fix the noise: what so many steps take, or that of a run that is gone on with.

        Raises DpError when the budget is not enough.
        """
        if noise is None:
            self.noise = noise_for(self._sequences, self._batch, steps, self.privacy)
            return
        self.noise = noise
        epsilon = self.spent(steps)
        if epsilon > self.privacy.epsilon:
            raise DpError(
                f"{steps} steps would spend epsilon {epsilon:.4g} with the noise that this run "
                f"began with, and the budget is {self.privacy.epsilon:g}: give --dp-epsilon "
                f"{_above(epsilon):g}, fewer steps, or start over with --fresh"
            )

    def spent(self, steps: int) -> float:
        """Epsilon of so many steps of this run."""
        return spent(self._sequences, self._batch, steps, self.noise, self.delta)

    def batch(self, sequences: Sequences) -> torch.Tensor:
        """int64[B, S] for a step: those that were drawn, and rows of which nothing is counted."""
        chosen = self._draws.batch(self._sequences, self._batch)
        drawn = sequences[chosen]
        filling = drawn.new_full((self._batch - len(chosen), sequences.shape[1]), UNCOUNTED)
        return torch.cat((drawn, filling))

    def clipped(self, part: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        """Of a micro-batch int64[B, S]: its summed loss, and the float64 sums over its sequences of
        the clipped gradients of each sequence's mean loss."""
        counts = predictions(part).sum(1).clamp(min=1)
        loss, gradients = self._per_sample.of_each(part)
        weights = (1.0 / counts.double()).to(gradients[0].device)
        return loss, tuple(clipped_sum(gradients, weights, self.privacy.clip))

    def released(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The batch's mean gradient with its noise, float64, of its clipped sum.

        Over as many sequences as there are in the mean: how many there were is no one's business.
        """
        deviation, count = self.noise * self.privacy.clip, expected(self._batch)
        for total in sums:  # in their own place, as each is twice the adapter
            total += self._draws.noise(total.shape, deviation).to(total.device)
            total /= count
        return list(sums)
