"""Parameters of the module-LWE cipher, their presets, and the line they must stay under.

The scheme works in R_q = Z_q[X]/(X^d + 1) with module rank r, so its LWE dimension is
n = r*d. Everything here is public and is pinned, by digest, in the handshake.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from math import log2

RING_DEGREE = 256
"""d: coefficients of a ring element, and the most tokens one encrypted block carries."""

MODULUS_BITS = 28
NTT_PRIME = 268_432_897
"""q = 2^28 - 2559: prime, and q = 1 mod 2d, so X^d + 1 splits into linear factors."""

ERROR_BITS = 40
"""The error is popcount(40 fair bits) - 20: centred binomial, variance 10, sigma 3.16."""

ERROR_BOUND = ERROR_BITS // 2

# Largest log2(q) for 128-bit classical security with a ternary secret, from Bossuat et al.,
# "Security Guidelines for Implementing Homomorphic Encryption", ePrint 2024/463, table 5.2.
SECURITY_TABLE: tuple[tuple[int, float], ...] = ((1024, 26.0), (2048, 53.0), (4096, 106.0))


class InsecureParametersError(ValueError):
    """The parameters lie outside the 128-bit line of ePrint 2024/463, table 5.2."""


def max_log2_modulus(dimension: int) -> float:
    """Largest log2(q) allowed at LWE dimension `dimension`, linear between the table's rows.

    Returns 0.0 below the smallest tabulated dimension, so such parameters are refused.
    """
    first, last = SECURITY_TABLE[0], SECURITY_TABLE[-1]
    if dimension < first[0]:
        return 0.0
    if dimension >= last[0]:
        return last[1]
    for (n0, bits0), (n1, bits1) in itertools.pairwise(SECURITY_TABLE):
        if n0 <= dimension <= n1:
            return bits0 + (bits1 - bits0) * (dimension - n0) / (n1 - n0)
    raise AssertionError("the table is sorted and covers the range")


@dataclass(frozen=True)
class Parameters:
    """One parameter set of the module-LWE cipher.

    rank         r, 5..8; the LWE dimension is r * 256. Nothing in the arithmetic ends at 8
                 (`ring.py` has the bound); no larger rank is tested.
    weight_bits  of the quantised weights, sign included: 4..8
    thin         whether the planner chooses each matrix's `Format` for the error that fine-tuning
                 bears (`plan.py`), with a scale that is calibrated; else every value has 24 bits up
                 and 16 down, and no result can wrap
    """

    name: str
    rank: int
    weight_bits: int = 8
    thin: bool = False
    degree: int = RING_DEGREE
    modulus: int = NTT_PRIME

    def __post_init__(self) -> None:
        if self.degree != RING_DEGREE or self.modulus != NTT_PRIME:
            raise ValueError(
                f"parameters {self.name!r}: only degree {RING_DEGREE} with modulus {NTT_PRIME} "
                "is implemented"
            )
        if not 1 <= self.rank <= 8:
            raise ValueError(f"parameters {self.name!r}: rank must be 1..8, got {self.rank}")
        if not 4 <= self.weight_bits <= 8:
            raise ValueError(
                f"parameters {self.name!r}: weights have 4..8 bits, got {self.weight_bits}"
            )
        allowed = max_log2_modulus(self.dimension)
        if log2(self.modulus) > allowed:
            raise InsecureParametersError(
                f"parameters {self.name!r}: log2(q) = {log2(self.modulus):.1f} at n = "
                f"{self.dimension} is over the 128-bit line ({allowed:.1f} bits, ePrint 2024/463 "
                "table 5.2); raise the rank"
            )

    @property
    def dimension(self) -> int:
        """LWE dimension n = r*d."""
        return self.rank * self.degree

    @property
    def weight_limit(self) -> int:
        """Largest absolute value of a quantised weight."""
        return (1 << (self.weight_bits - 1)) - 1

    def digest(self) -> bytes:
        """32 bytes that name this set; both sides compare them in the handshake."""
        text = json.dumps({"scheme": "mlwe-int8-v2"} | asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).digest()


PRESETS: dict[str, Parameters] = {
    "thin": Parameters("thin", rank=5, thin=True),
    "thin-6bit": Parameters("thin-6bit", rank=5, weight_bits=6, thin=True),
    "exact": Parameters("exact", rank=5),
    "conservative": Parameters("conservative", rank=6),
    "paranoid": Parameters("paranoid", rank=8),
}
"""The worst known attack on each, in classical core-SVP bits without / with the rounding counted:
thin, thin-6bit and exact 126.0 / 130.9, conservative 158.8 / 164.8, paranoid 226.9 / 234.9 (counted
with the 24 bits of exact: of fewer, more is rounded away). Always the dual hybrid;
`python -m scenarios.params` and docs/security.md have every attack and cost model. `Parameters`
refuses by the guideline's line alone: that every rank which it builds is also above the floor of
125 of these bits (backends/he/estimate/verdict.py) is for a test to hold, not for each process."""


def preset(name: str) -> Parameters:
    """The preset called `name`.

    Raises ValueError, naming the choices, when there is none.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}") from None
