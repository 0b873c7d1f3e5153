"""All attacks under all models, the worst of them, and the least that this project accepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from backends.defaults import SHARED_BLOCKS
from backends.he.estimate.attacks import (
    Estimate,
    dual_hybrid,
    dual_hypothesis,
    primal_any_of,
    primal_usvp,
)
from backends.he.estimate.lwe import Lwe, cipher_lwe
from backends.he.estimate.reduction import CLASSICAL, MODELS, CoreSvp, CostModel
from backends.he.params import PRESETS, InsecureParametersError, Parameters

FLOOR_BITS = 125.0
"""The least that the worst attack must cost, in classical core-SVP bits, not counting the rounding.

More than the guideline's own line: its (n, log2 q) = (1024, 26) has 104 of these bits and 130 of
MATZOV's gates. Parameters refuse what is over that line; what is under it and below this floor only
a test and `python -m scenarios.params` refuse, since the modulus is fixed and the ranks are few.
"""


def estimates(
    problem: Lwe, blocks: int = SHARED_BLOCKS, models: Sequence[CostModel] = MODELS
) -> list[Estimate]:
    """Every attack under every one of the models that applies to it.

    blocks  encrypted blocks that share A, from 2 on, for the attacks that use them all
    """
    found = []
    for model in models:
        found += [primal_usvp(problem, model), dual_hybrid(problem, model)]
        found.append(dual_hypothesis(problem, model, blocks))
        if isinstance(model, CoreSvp):
            found.append(primal_any_of(problem, model, blocks))
    return found


def worst(found: Iterable[Estimate]) -> Estimate:
    """The cheapest attack in classical core-SVP bits, which must be among the estimates."""
    return min((e for e in found if e.model == CLASSICAL.name), key=lambda e: e.bits)


def many_blocks_loss(problem: Lwe, blocks: int = SHARED_BLOCKS) -> float:
    """Bits by which testing one hypothesis on many blocks is cheaper than on one (core-SVP)."""
    alone = dual_hypothesis(problem, CLASSICAL, 1).bits
    return alone - dual_hypothesis(problem, CLASSICAL, blocks).bits


def judged(parameters: Parameters) -> Lwe:
    """The problem that a parameter set is judged by: rounding not counted."""
    return cipher_lwe(parameters.dimension, parameters.modulus)


def require_floor(parameters: Parameters, found: Iterable[Estimate]) -> None:
    """Raises InsecureParametersError when the worst attack of `judged` is below the floor."""
    weakest = worst(found)
    if weakest.bits < FLOOR_BITS:
        raise InsecureParametersError(
            f"parameters {parameters.name!r}: {weakest.attack} at {weakest.bits:.1f} core-SVP bits "
            f"is below the floor of {FLOOR_BITS:.0f}"
        )


def nearest_secure(rank: int, blocks: int = SHARED_BLOCKS) -> Parameters | None:
    """The secure parameters whose module rank is nearest, a preset where that has the same rank.

    Returns None when no rank is secure.
    """
    presets = {known.rank: known for known in PRESETS.values()}
    for other in sorted(range(1, 9), key=lambda r: (abs(r - rank), -r)):
        try:
            candidate = presets.get(other) or Parameters(f"rank {other}", rank=other)
            require_floor(candidate, estimates(judged(candidate), blocks, [CLASSICAL]))
        except InsecureParametersError:
            continue
        return candidate
    return None
