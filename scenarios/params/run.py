"""Security, exactness and bytes of parameters: estimated, and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any

import torch

from backends.he.estimate.lwe import cipher_lwe
from backends.he.estimate.verdict import (
    FLOOR_BITS,
    estimates,
    judged,
    many_blocks_loss,
    nearest_secure,
    require_floor,
    worst,
)
from backends.he.params import (
    PRESETS,
    InsecureParametersError,
    Parameters,
    max_log2_modulus,
    preset,
)
from backends.he.plan import MatrixPlan, nominal_gain, plan_matrix
from backends.he.quantise import quantise
from backends.he.wire import EXACT
from backends.units import human_bytes

# Of the stand-in weight, at most; its figures hardly change with more rows.
_SAMPLE_ROWS, _SAMPLE_VALUES = 4096, 1 << 24


@dataclass(frozen=True)
class Shape:
    """One frozen linear and what goes through it: K inputs, N outputs, tokens at a time."""

    inputs: int
    outputs: int
    tokens: int

    def plan(self, parameters: Parameters) -> MatrixPlan:
        """Of a stand-in weight: Gaussian, quantised as a model's would be."""
        generator = torch.Generator().manual_seed(0)
        rows = min(self.outputs, _SAMPLE_ROWS, max(1, _SAMPLE_VALUES // self.inputs))
        weight = torch.randn((rows, self.inputs), generator=generator)
        codes, scales = quantise(weight, parameters.weight_limit)
        return plan_matrix(codes, scales, parameters)


def security(parameters: Parameters, blocks: int) -> dict[str, Any]:
    """Every attack's figures, the worst, and the guideline's line.

    Raises InsecureParametersError when the worst is below the floor.
    """
    problem = judged(parameters)
    found = estimates(problem, blocks)
    require_floor(parameters, found)
    # With the most bits that travel: of fewer, more is rounded away.
    rounded = cipher_lwe(parameters.dimension, parameters.modulus, EXACT.modulus)
    return {
        "blocks": blocks,
        "floor_bits": FLOOR_BITS,
        "worst": asdict(worst(found)),
        "many_blocks_loss_bits": many_blocks_loss(problem, blocks),
        "attacks": [asdict(e) for e in found],
        "attacks_rounding_counted": [asdict(e) for e in estimates(rounded, blocks)],
        "log2_modulus": log2(parameters.modulus),
        "guideline_max_log2_modulus": max_log2_modulus(parameters.dimension),
    }


def exactness(parameters: Parameters, shape: Shape) -> dict[str, float]:
    """What the planner says about a linear of that shape, as fractions.

    Raises ValueError when it is too wide for the parameters; it names a width that is not.
    """
    plan = shape.plan(parameters)
    try:
        plan.amplitude(parameters)
    except ValueError as error:
        raise ValueError(f"{error}; --in {_widest(parameters, shape, plan)} fits") from error
    return {
        "predicted_error": plan.predicted_error(parameters, _gain(parameters, plan)),
        "margin": plan.margin(parameters) / (plan.format.modulus / 2),
    }


def _gain(parameters: Parameters, plan: MatrixPlan) -> float:
    return nominal_gain(plan.in_features) if parameters.thin else 1.0


def _widest(parameters: Parameters, shape: Shape, plan: MatrixPlan) -> int:
    """Nearly the most inputs that leave room, for a shape and its plan that do not."""
    inputs = shape.inputs
    while plan.margin(parameters) >= (half := plan.format.modulus / 2):
        # The margin goes with the inputs, but for weights of few rows, whose sizes vary.
        inputs = int(0.99 * inputs * half / plan.margin(parameters))
        inputs -= inputs % 256
        plan = Shape(inputs, shape.outputs, shape.tokens).plan(parameters)
    return inputs


def traffic(parameters: Parameters, shape: Shape) -> dict[str, float]:
    """Wire bytes of values, without the few bytes of a message's header."""
    form = shape.plan(parameters).format
    up, down = form.up_bytes(shape.inputs), form.down_bytes(shape.outputs)
    block = min(shape.tokens, parameters.degree)
    return {
        "up_bits_per_value": form.up_bits,
        "down_bits_per_value": form.down_bits,
        "up_bytes_per_block": up * block,
        "down_bytes_per_block": down * block,
        "tokens_per_block": block,
        "blocks_per_request": -(-shape.tokens // parameters.degree),
    }


def chosen(name: str, rank: int | None) -> Parameters:
    """A preset's, or of another rank. Raises InsecureParametersError for one without security."""
    return preset(name) if rank is None else Parameters(f"rank {rank}", rank=rank)


def figures_of(parameters: Parameters, shape: Shape, blocks: int) -> dict[str, Any]:
    """Everything that is said of them. Raises as `security` and `exactness` do."""
    return {
        "parameters": asdict(parameters),
        "shape": asdict(shape),
        "security": security(parameters, blocks),
        "exactness": exactness(parameters, shape),
        "traffic": traffic(parameters, shape),
    }


def table(plain: Sequence[dict[str, Any]], rounded: Sequence[dict[str, Any]]) -> str:
    """The attacks' figures as text: bits, block size, dimension; without rounding, and with."""
    head = f"{'':29}{'':17}{'':11}{'without rounding':>21}{'rounding counted':>22}"
    lines = [head, f"{'attack':29}{'cost model':17}{'unit':11}" + 2 * "   bits block     dim"]
    for one, other in zip(plain, rounded, strict=True):
        figures = "".join(f"{e['bits']:7.1f}{e['block']:6}{e['dimension']:8}" for e in (one, other))
        lines.append(f"{one['attack']:29}{one['model']:17}{one['unit']:11}{figures}")
    return "\n".join(lines)


def summary(parameters: Parameters, shape: Shape, f: dict[str, Any]) -> str:
    """What a person reads."""
    s, e, t = f["security"], f["exactness"], f["traffic"]
    low = s["worst"]
    choices = ", ".join(f"{name} {value}" for name, value in low["choices"].items())
    return f"""
{parameters.name}: module rank {parameters.rank}, n = {parameters.dimension}, \
q = {parameters.modulus} (2^{s["log2_modulus"]:.2f}), p = 2^{t["up_bits_per_value"]}; \
secret uniform ternary, error centred binomial of variance 10

{table(s["attacks"], s["attacks_rounding_counted"])}

worst      {low["bits"]:.1f} core-SVP bits: {low["attack"]} ({choices}), rounding not counted; \
the floor is {s["floor_bits"]:.0f}
many       {s["blocks"]:,} blocks share A. One hypothesis tested on all of them costs \
{s["many_blocks_loss_bits"]:.1f} bits less than on one.
guideline  log2 q = {s["log2_modulus"]:.1f}, at most {s["guideline_max_log2_modulus"]:.1f} at this \
n for 128 classical bits (ePrint 2024/463, table 5.2)
{_wraps(parameters, e)}
error      {e["predicted_error"]:.2%} predicted against the same {parameters.weight_bits}-bit \
weights ({shape.inputs} inputs; a Gaussian stand-in for the weight)
bytes      {t["up_bits_per_value"]} bits up and {t["down_bits_per_value"]} down a value; a block \
of {t["tokens_per_block"]} tokens {human_bytes(t["up_bytes_per_block"])} up, \
{human_bytes(t["down_bytes_per_block"])} down; {shape.tokens} tokens are \
{t["blocks_per_request"]} block(s)
"""


def _wraps(parameters: Parameters, exactness: dict[str, float]) -> str:
    kept = f"of which {exactness['margin']:.2%} is kept for "
    if parameters.thin:
        return (
            f"wraps      rare: the scale is learnt from results, p/2 {kept}noise; what wraps is "
            "seen and repaired"
        )
    return (
        f"no wrap    for no input at all: |result| stays within p/2 by Cauchy-Schwarz, {kept}"
        "everything that noise can add"
    )


def refusal(error: InsecureParametersError, rank: int, blocks: int) -> str:
    """The error and what to choose instead."""
    near = nearest_secure(rank, blocks)
    if near is None:
        return f"error: {error}; no rank is secure"
    choice = f"--preset {near.name}" if near.name in PRESETS else f"--rank {near.rank}"
    return f"error: {error}; the nearest secure choice is {choice}"
