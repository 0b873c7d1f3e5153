"""The page's sentences: the result, the security of the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import log2

from backends.defaults import SHARED_BLOCKS
from backends.he.estimate.reduction import CLASSICAL
from backends.he.estimate.verdict import estimates, judged, worst
from backends.he.params import ERROR_BITS, Parameters, max_log2_modulus
from scenarios.page.content import Content


def percent(share: float, digits: int = 1) -> str:
    """'24.8 %', which no line ends within."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def headline(content: Content) -> str:
    """The result in one sentence."""
    base, private = content.base_loss, content.private_loss
    if private is None:
        steps = f"{content.steps:,} step{'s' * (content.steps != 1)}"
        return f"Trained privately for {steps}"
    if base is None:
        return f"Held-out loss is {private:.3f} nats per token"
    change = private / base - 1
    if abs(change) < 5e-5:
        return f"Held-out loss stayed at {private:.3f} nats per token"
    verb = "fell" if change < 0 else "rose"
    return f"Held-out loss {verb} by {percent(abs(change))}, from {base:.3f} to {private:.3f}"


def beside_clear(content: Content) -> str:
    """How the same training in clear ended, if it was run."""
    if content.private_loss is None or content.clear_loss is None:
        return ""
    gap = content.private_loss / content.clear_loss - 1
    return (
        f"The same training in clear, from the same seed, ended at {content.clear_loss:.4f}: "
        f"private and clear differ by {percent(abs(gap), 2)}."
    )


@dataclass(frozen=True)
class Security:
    """What is said of parameters. bits: the lowest estimate, classical core-SVP."""

    bits: float
    rows: list[tuple[str, str]]


@cache
def security(p: Parameters) -> Security:
    """The cheapest known attack, estimated now (a second), and the numbers that it depends on."""
    low = worst(estimates(judged(p), SHARED_BLOCKS, [CLASSICAL]))
    noise = (
        "a few results may wrap; the owner sees and repairs them (docs/security.md has the odds)"
        if p.thin
        else "no result can wrap, whatever the input (Cauchy-Schwarz)"
    )
    return Security(low.bits, [
        ("preset", p.name),
        ("problem", f"module-LWE, ring degree {p.degree}, module rank {p.rank}: "
                    f"dimension n = {p.dimension}"),
        ("modulus", f"q = {p.modulus:,} (2^{log2(p.modulus):.0f}); the 128-bit guideline "
                    f"(ePrint 2024/463, table 5.2) allows up to "
                    f"2^{max_log2_modulus(p.dimension):.1f} at this n"),
        ("secret, error", "uniform ternary, a fresh one for every encrypted block; centred "
                          f"binomial of variance {ERROR_BITS // 4}"),
        ("cheapest known attack", f"{low.attack}: 2^{low.bits:.0f} by the lowest usual estimate "
                                  "(classical core-SVP, rounding not counted)"),
        ("base weights", f"{p.weight_bits} bits, public"),
        ("results", noise),
    ])  # fmt: skip
