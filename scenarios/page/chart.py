"""The loss curves, laid out: everything in units of the picture, ready to be drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scenarios.page.content import Curve
from scenarios.report import smooth

MOST_POINTS = 1000


@dataclass(frozen=True)
class Line:
    """A polyline; kind is the curve's name, and "raw", "smooth" or "held"."""

    name: str
    kind: str
    points: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One picture. left, top, right and bottom bound the curves; dots are (name, x, y)."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    last_step: int
    lines: list[Line]
    dots: list[tuple[str, float, float]]
    across: list[Tick]
    up: list[Tick]


@dataclass(frozen=True)
class Points:
    """Of one curve, no more than MOST_POINTS: (step, loss, running mean)."""

    name: str
    training: list[tuple[int, float, float]]
    held_out: list[tuple[int, float]]


def points(curve: Curve) -> Points:
    """Those that are finite; of a long curve every so many."""
    finite = [(i, v) for i, v in enumerate(curve.losses, 1) if math.isfinite(v)]
    means = smooth([v for _, v in finite])
    every = -(-len(finite) // MOST_POINTS) or 1
    training = [(i, v, m) for (i, v), m in zip(finite, means, strict=True)][::every]
    held_out = [(i, v) for i, v in curve.held_out if math.isfinite(v)]
    return Points(curve.name, training, held_out[:: -(-len(held_out) // MOST_POINTS) or 1])


def chart(curves: Sequence[Points], width: int, height: int) -> Chart | None:
    """A picture of so many units; None where there is nothing to draw."""
    values = [v for c in curves for _, *both in c.training for v in both]
    values += [v for c in curves for _, v in c.held_out]
    if not values:
        return None
    steps = [i for c in curves for i, _, _ in c.training]
    steps += [i for c in curves for i, _ in c.held_out]
    last = max([1, *steps])
    ticks = _ticks(min(values), max(values), 5)
    low, high = min(min(values), ticks[0]), max(max(values), ticks[-1])
    left, top, right, bottom = 46, 12, width - 14, height - 34

    def x(step: float) -> float:
        return round(left + (right - left) * step / last, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / ((high - low) or 1), 1)

    lines = []
    for kind in ("raw", "smooth", "held"):
        for curve in curves:
            if kind == "held":
                # Of two, a start and an end, a line would tell a way that nobody has measured.
                pairs = curve.held_out if len(curve.held_out) > 2 else []
            else:
                pairs = [(i, m if kind == "smooth" else v) for i, v, m in curve.training]
            if pairs:
                drawn = " ".join(f"{x(i)},{y(v)}" for i, v in pairs)
                lines.append(Line(curve.name, kind, drawn))
    return Chart(
        width, height, left, top, right, bottom, last, lines,
        [(c.name, x(i), y(v)) for c in curves for i, v in c.held_out],
        [Tick(x(t), f"{t:g}") for t in _ticks(0, last, 4 if width < 500 else 8) if t == int(t)],
        [Tick(y(t), f"{t:g}") for t in ticks],
    )  # fmt: skip


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at least `low` to at most `high`, some `about` of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * about >= span)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)] or [low]
