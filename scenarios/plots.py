"""Pictures of what-if sweeps: lines for one knob, heat maps for two, panels of them for more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np

from backends.files import replacing
from scenarios.answers import Answer, Row, of, varying, words_of
from scenarios.quantities import Value
from scenarios.setting import KEYS, SettingError, shown
from scenarios.study import Study

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#1f6fb4", "#e0701e", "#2c9c69"
PANELS_MAX = 6


def plot_study(path: Path, study: Study, rows: Sequence[Row], answer: Answer) -> None:
    """One PNG: the answer as its title, the figures under it."""
    good = [row for row in rows if "error" not in row]
    knobs = varying(study)
    if len(knobs) <= 1:
        knob = knobs[0] if knobs else next(iter(study.sweep), "lanes")
        figure = _lines(study, good, knob, answer)
    else:
        figure = _maps(study, good, knobs, answer)
    figure.suptitle(fill(answer.headline, 100), fontsize=15, fontweight="bold")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _facts(study: Study, rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """What stays the same in a picture, for its small print."""
    row = rows[0]
    told = ["model", "gpu", "workers", "owners", "owner-device", "bandwidth", "site-bandwidth"]
    told += ["rtt", "lanes", "tokens", "sites", "placement", "far-rtt"]
    if row["sites"] == 1:
        told.remove("far-rtt")
    if row["workers"] == 1:
        told = [knob for knob in told if knob not in ("sites", "placement", "workers")]
    parts = [
        f"{knob} {shown(knob, of(row, knob))}"
        for knob in told
        if knob not in left_out and len({of(r, knob) for r in rows}) == 1
    ]
    return "simulated: " + ", ".join(parts)


def _lines(study: Study, rows: Sequence[Row], knob: str, answer: Answer) -> Figure:
    """Step times on the left, speed on the right, against the knob."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    rows = sorted(rows, key=lambda row: study.sweep[knob].index(of(row, knob))) if rows else []
    values = [of(row, knob) for row in rows]
    numeric = all(isinstance(v, int | float) for v in values)
    at: list[Any] = list(values) if numeric else list(range(len(values)))
    marker = answer.mark.get(knob)
    for axes, series in (
        (left, (("step_p99_s", ORANGE, "p99"), ("step_p50_s", BLUE, "median"))),
        (right, (("tokens_per_s_gpu", GREEN, "a GPU"), ("tokens_per_s_owner", BLUE, "an owner"))),
    ):
        for name, colour, label in series:
            height = [row[name] for row in rows]
            axes.plot(at, height, "o-", color=colour, linewidth=2.2, markersize=5)
            axes.annotate(
                label, (at[-1], height[-1]), xytext=(8, 0), textcoords="offset points",
                color=colour, va="center", fontsize=11, annotation_clip=False,
            )  # fmt: skip
        _scale(axes, knob, at, values, numeric)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if marker is not None and len(values) > 1:
            axes.axvline(at[values.index(marker)], color="#999999", linestyle="--", linewidth=1.2)
    left.set_title("step time, s", loc="left")
    right.set_title("tokens per second", loc="left")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    _note_limit(study, left, rows, at)
    right.text(
        1.0, 1.02, f"GPU busy {100 * rows[-1]['gpu_utilisation']:.2g} % at the right end",
        transform=right.transAxes, ha="right", color=GREEN,
    )  # fmt: skip
    figure.supxlabel(_facts(study, rows, [knob]), fontsize=9, color="#555555")
    return figure


def _note_limit(study: Study, axes: Axes, rows: Sequence[Row], at: Sequence[Any]) -> None:
    """The line an "until" study is about."""
    if study.answer.get("kind") != "until":
        return
    factor = float(study.answer.get("factor", 2.0))
    limit = factor * rows[0][study.answer.get("value", "step_p99_s")]
    axes.axhline(limit, color="#999999", linestyle=":", linewidth=1.4)
    axes.text(at[0], limit, f"{factor:g} x the first", va="bottom", color="#666666")


def _scale(
    axes: Axes, knob: str, at: Sequence[Any], values: Sequence[Value], numeric: bool
) -> None:
    axes.set_xlabel(knob)
    if numeric and min(at) > 0 and max(at) / min(at) > 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(at, [shown(knob, value) for value in values])


# --- heat maps ------------------------------------------------------------------------------------


def _maps(study: Study, rows: Sequence[Row], knobs: Sequence[str], answer: Answer) -> Figure:
    """A heat map of two knobs; a panel for each value of a third; others at their best."""
    value = str(study.plot.get("value", study.answer.get("value", "tokens_per_s_owner")))
    words, unit, more, _ = words_of(value)
    x, y, panel = _axes_of(study, knobs)
    rest = [knob for knob in knobs if knob not in (x, y, panel)]
    fixed = {knob: _at(study, knob, answer) for knob in rest}
    kept = [row for row in rows if all(of(row, k) == v for k, v in fixed.items())]
    panels = list(study.sweep[panel])[:PANELS_MAX] if panel else [None]
    across = len(study.sweep[x])
    width = max(4.6, 0.95 * across + 1.6)
    height = 0.62 * len(study.sweep[y]) + 2.6
    columns = min(len(panels), max(1, int(18 // width)))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(max(8.0, width * columns), height * lines + 0.8),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    numbers = [row[value] for row in kept]
    limits = (min(numbers), max(numbers))
    for axes, choice in zip(grid.flat, panels, strict=False):
        chosen = [row for row in kept if panel is None or of(row, panel) == choice]
        _map(axes, study, chosen, (x, y), value, limits, answer.mark)
        if panel is not None and choice is not None:
            axes.set_title(f"{panel} {shown(panel, choice)}", fontsize=12)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    better = "darker is better" if more else "darker is worse"
    what = f"{words}, {unit}" if unit else words
    note = "".join(f", {knob} {shown(knob, v)}" for knob, v in fixed.items())
    facts = fill(_facts(study, kept, [x, y, *rest]) + note, int(11 * figure.get_figwidth()))
    figure.supxlabel(
        f"in the cells: {what} ({better})\n{facts}",
        fontsize=10, color="#555555",
    )  # fmt: skip
    return figure


def _axes_of(study: Study, knobs: Sequence[str]) -> tuple[str, str, str | None]:
    """(x, y, panels): as the study wants, else the knobs with most values first."""
    wanted = {name: study.plot.get(name) for name in ("x", "y", "panels")}
    for name, knob in wanted.items():
        if knob is not None and knob not in knobs:
            raise SettingError(f"[plot] {name}={knob!r}: it varies none of {', '.join(knobs)}")
    left = sorted(
        (k for k in knobs if k not in wanted.values()), key=lambda k: -len(study.sweep[k])
    )
    x = wanted["x"] or left.pop(0)
    y = wanted["y"] or left.pop(0)
    panel = wanted["panels"] or (left.pop(0) if left else None)
    return x, y, panel


def _at(study: Study, knob: str, answer: Answer) -> Value:
    """Where a knob that has no axis stands in the picture: where the study says, else the best."""
    wanted: Mapping[str, Any] = study.plot.get("at", {})
    if knob in wanted:
        value = KEYS[knob].form.read(str(wanted[knob]))
        if value in study.sweep[knob]:
            return value
        raise SettingError(f"[plot.at] {knob}={wanted[knob]!r} is none of its values")
    return answer.mark.get(knob, study.sweep[knob][-1])


def _map(
    axes: Axes, study: Study, rows: Sequence[Row], knobs: tuple[str, str], value: str,
    limits: tuple[float, float], mark: Mapping[str, Value],
) -> None:  # fmt: skip
    x, y = knobs
    columns, lines = study.sweep[x], study.sweep[y]
    cells = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        cells[lines.index(of(row, y)), columns.index(of(row, x))] = row[value]
    low, high = limits
    # In proportion where the figures span decades, or the small ones would all look alike.
    norm = mpl.colors.LogNorm(low, high) if low > 0 and high > 8 * low else (
        mpl.colors.Normalize(low, high if high > low else low + 1)
    )  # fmt: skip
    axes.imshow(cells, cmap="Blues", norm=norm, aspect="auto")
    form = words_of(value)[3]
    for i, j in np.ndindex(cells.shape):
        number = cells[i, j]
        text = "none" if np.isnan(number) else f"{number:{form}}".replace("%", " %")
        dark = not np.isnan(number) and norm(number) > 0.55
        best = (mark.get(x), mark.get(y)) == (columns[j], lines[i])
        axes.text(
            j, i, text, ha="center", va="center", color="white" if dark else "#222222",
            fontweight="bold" if best else "normal", fontsize=11,
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [shown(x, v) for v in columns])
    axes.set_yticks(range(len(lines)), [shown(y, v) for v in lines])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
