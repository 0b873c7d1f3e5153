"""The problem an attacker meets: learning with errors (LWE), as plain numbers.

Module-LWE over Z_q[X]/(X^d + 1) is judged as the LWE problem of the same dimension n = r*d, as the
guideline (ePrint 2024/463) judges ring-LWE: no attack is known that gains much from the structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, log2, sqrt

from backends.he.params import ERROR_BITS


@dataclass(frozen=True)
class Distribution:
    """A centred distribution of one coefficient.

    variance    of the coefficient
    guess_bits  log2 of the tries per coefficient to guess a vector of many, at most: its Renyi
                entropy of order 1/2 (Arikan, "An inequality on guessing", 1996). That is log2 3
                for uniform ternary, where it is exact. 0 where nothing is ever guessed.
    """

    variance: float
    guess_bits: float = 0.0

    def __post_init__(self) -> None:
        if not self.variance > 0 or self.guess_bits < 0:
            raise ValueError(f"no distribution: {self}")

    def widened(self, step: float) -> Distribution:
        """With uniform noise of width `step` added: an error that a public rounding adds to."""
        return Distribution(self.variance + step * step / 12)


def finite(chances: Sequence[float], values: Sequence[int]) -> Distribution:
    """A distribution on a few integers with mean 0.

    chances  their probabilities, which sum to 1
    """
    variance = sum(chance * value * value for chance, value in zip(chances, values, strict=True))
    return Distribution(variance, 2 * log2(sum(sqrt(chance) for chance in chances)))


def centred_binomial(bits: int) -> Distribution:
    """popcount(`bits` fair bits) - bits/2, for an even number of bits: variance bits/4."""
    chances = [comb(bits, ones) / 2**bits for ones in range(bits + 1)]
    return finite(chances, [ones - bits // 2 for ones in range(bits + 1)])


TERNARY = finite([1 / 3] * 3, [-1, 0, 1])
"""Uniform on -1, 0, 1: variance 2/3."""


@dataclass(frozen=True)
class Lwe:
    """b = A*s + e mod q: A uniform, `samples` x `dimension`; find s, or tell b from uniform.

    samples  rows an attacker may use, None for as many as it likes
    """

    dimension: int
    modulus: int
    secret: Distribution
    error: Distribution
    samples: int | None = None

    def __post_init__(self) -> None:
        too_few = self.samples is not None and self.samples < 1
        if self.dimension < 1 or self.modulus < 2 or too_few:
            raise ValueError(f"no LWE problem: {self}")


def cipher_lwe(dimension: int, modulus: int, rounded_to: int | None = None) -> Lwe:
    """One encrypted block, which has more samples than any attack here wants.

    rounded_to  p, to count the public rounding from q to p as the noise it is to an attacker:
                uniform, of width q/p. None leaves it out, which is the line that presets are
                judged by: rounding is a function of the ciphertext, so it can only hide more.
    """
    error = centred_binomial(ERROR_BITS)
    if rounded_to is not None:
        error = error.widened(modulus / rounded_to)
    return Lwe(dimension, modulus, TERNARY, error)
