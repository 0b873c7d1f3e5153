"""What lattice reduction reaches, and what it costs: root Hermite factor and cost models.

All costs are log2 of a count; what is counted differs by model, so figures of two models are not
to be compared. Everything takes and returns float64 arrays, over block sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import e, log, log2, pi
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

SIEVED_EXPONENT = 0.2075
"""A sieve in dimension b ends with 2^(0.2075 b) = (4/3)^(b/2) vectors (Nguyen, Vidick 2008)."""

PROGRESSIVE = 1 / (1 - 2**-0.292)
"""All the smaller sieves of a progressive one together, over its last: 5.46."""

MIN_BLOCK = 60
"""Block sizes below are not looked at: the formulas are asymptotic, and nothing so weak is of
interest here."""


def log2_root_hermite(block: Floats) -> Floats:
    """log2 of delta, BKZ's root Hermite factor at a block size (Chen's thesis, "Reduction de reseau
    et securite concrete du chiffrement completement homomorphe", 2013)."""
    ball = np.log2(block / (2 * pi * e)) + np.log2(pi * block) / block
    return ball / (2 * (block - 1))


def free_dimensions(block: Floats) -> Floats:
    """By how many dimensions a sieve may stay below the block (Ducas, "Shortest vector from lattice
    sieving: a few dimensions for free", Eurocrypt 2018)."""
    return np.maximum(0.0, block * log(4 / 3) / np.log(block / (2 * pi * e)))


class CostModel(ABC):
    """What BKZ with sieving costs.

    name   as in the literature
    unit   what is counted
    """

    name: str
    unit: str

    @abstractmethod
    def log2_reduction(self, block: Floats, dimension: float) -> Floats:
        """log2 of the cost to BKZ-reduce a basis of that dimension."""

    def short_vectors(self, block: Floats, dimension: float) -> tuple[Floats, Floats]:
        """Reduction, then a sieve on the first vectors that yields 2^(0.2075 b') short ones.

        Returns b', the sieve's dimension, and log2 of the cost of both. Here the last sieve of the
        reduction is that sieve, at no further cost.
        """
        return block, self.log2_reduction(block, dimension)


class CoreSvp(CostModel):
    """One sieve in the block's dimension and nothing else (Alkim, Ducas, Poppelmann, Schwabe,
    "Post-quantum key exchange - a new hope", Usenix 2016, section 6): a lower bound by intent."""

    unit = "core-SVP"

    def __init__(self, name: str, exponent: float) -> None:
        self.name = name
        self.exponent = exponent

    def log2_reduction(self, block: Floats, dimension: float) -> Floats:
        return self.exponent * block


class Bdgl16(CostModel):
    """8d sieves, each with the overhead measured by Becker, Ducas, Gama, Laarhoven, "New directions
    in nearest neighbor searching", SODA 2016; the number of sieves after Chen 2013; LLL before."""

    name = "BDGL16"
    unit = "operations"

    def log2_reduction(self, block: Floats, dimension: float) -> Floats:
        sieves = 0.292 * block + 16.4 + log2(8 * dimension)
        return np.logaddexp2(3 * log2(dimension), sieves)


class Matzov(CostModel):
    """Gates of progressive sieving with list decoding: MATZOV, "Report on the security of LWE:
    improved dual lattice attack", 2022.

    The gates of one sieve are a line through the figures of Albrecht, Gheorghiu, Postlethwaite,
    Schanck (Asiacrypt 2020) as the report corrects them; its two coefficients are those of the
    lattice-estimator (estimator/reduction.py).
    """

    name = "MATZOV"
    unit = "gates"
    slope = 0.29613500308205365
    offset = 20.387885985467914

    def _log2_sieve(self, block: Floats) -> Floats:
        return log2(PROGRESSIVE) + self.slope * block + self.offset

    def log2_reduction(self, block: Floats, dimension: float) -> Floats:
        sieve = self._log2_sieve(block - free_dimensions(block))
        sieves = log2(PROGRESSIVE) + np.log2(np.maximum(1.0, dimension - block))
        return np.logaddexp2(3 * log2(dimension), sieve + sieves)

    def short_vectors(self, block: Floats, dimension: float) -> tuple[Floats, Floats]:
        """One more sieve, as large as costs what the reduction did (Guo, Johansson, "Faster dual
        lattice attacks for solving LWE", Asiacrypt 2021)."""
        reduction = self.log2_reduction(block, dimension)
        one = self._log2_sieve(np.zeros_like(block))
        sieved = np.minimum(dimension, (reduction - one) / self.slope)
        return sieved, np.logaddexp2(reduction, self._log2_sieve(sieved))


CLASSICAL = CoreSvp("ADPS16 classical", 0.292)
QUANTUM = CoreSvp("ADPS16 quantum", 0.265)
MODELS: tuple[CostModel, ...] = (CLASSICAL, QUANTUM, Bdgl16(), Matzov())
"""Every model that figures are given in; the first is the one parameters are judged by."""
