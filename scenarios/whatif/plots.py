"""Pictures of what-if sweeps: lines for one knob, heat maps for two, panels of them for more."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np

from backends.files import replacing
from scenarios.whatif.answers import Answer, Row, of, relative, words_of
from scenarios.whatif.knobs import KEYS, OF_ELSEWHERE, SettingError, provenance, shown
from scenarios.whatif.quantities import Value
from scenarios.whatif.study import Study, varying

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams["text.parse_math"] = False  # a name with a dollar in it is no formula

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
    width = int(7.4 * figure.get_figwidth())
    figure.suptitle(fill(answer.headline, width), fontsize=15, fontweight="bold")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _facts(study: Study, rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """What stays the same in a picture, for its small print."""
    row = rows[0]
    told = ["model", "gpu", "owner-device", "workers", "owners", "lanes", "tokens", "bandwidth"]
    told += ["rtt", "site-bandwidth", "sites", "placement", "head"]
    if row["workers"] == 1:
        told = [knob for knob in told if knob not in ("sites", "placement", "workers")]
    if all(each["worker"] == "here" for each in rows):
        told = [knob for knob in told if knob not in OF_ELSEWHERE] + ["worker"]
    parts = []
    for knob in told:
        if knob in left_out or len({of(r, knob) for r in rows}) > 1:
            continue
        text = f"{knob} {shown(knob, of(row, knob))}"
        if knob in ("gpu", "owner-device"):
            text += f" ({provenance(str(of(row, knob)))})"
        parts.append(text)
    return "simulated: " + ", ".join(parts)


def _lines(study: Study, rows: Sequence[Row], knob: str, answer: Answer) -> Figure:
    """Step times on the left, speed on the right, against the knob."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    if knob in study.sweep:
        rows = sorted(rows, key=lambda row: study.sweep[knob].index(of(row, knob)))
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
                label, (at[-1], height[-1]), xytext=(8, 9 if colour == series[0][1] else -9),
                textcoords="offset points", color=colour, va="center", fontsize=11,
                annotation_clip=False,
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
    axes.set_xlabel(_axis(knob))
    if numeric and len(at) > 2 and _geometric(at):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(at, [shown(knob, value) for value in values])


def _geometric(values: Sequence[float]) -> bool:
    """Whether ratios of neighbours are more alike than their distances."""
    if min(values) <= 0:
        return False
    ratios = [math.log(b / a) for a, b in pairwise(sorted(values))]
    gaps = [b - a for a, b in pairwise(sorted(values))]
    return float(np.std(ratios) / np.mean(ratios)) < float(np.std(gaps) / np.mean(gaps))


def _axis(knob: str) -> str:
    """A knob's name and meaning, for an axis."""
    return f"{knob} ({re.split('[,:]', KEYS[knob].meaning)[0]})"


# --- heat maps ------------------------------------------------------------------------------------


def _maps(study: Study, rows: Sequence[Row], knobs: Sequence[str], answer: Answer) -> Figure:
    """A heat map of two knobs; a panel for each value of a third; others at their best.

    With `against` in the study's plot section: the last value of that knob against its first.
    """
    value = str(study.plot.get("value", study.answer.get("value", "tokens_per_s_owner")))
    against = study.plot.get("against")
    what = _meaning(study, value, against, bool(answer.mark))
    if against is not None:
        rows = [r for r in relative(study, rows, against, value)
                if of(r, against) == study.sweep[against][-1]]  # fmt: skip
        knobs = [knob for knob in knobs if knob != against]
    x, y, panel = _axes_of(study, knobs)
    rest = [knob for knob in knobs if knob not in (x, y, panel)]
    fixed = {knob: _at(study, knob, answer) for knob in rest}
    kept = [row for row in rows if all(of(row, k) == v for k, v in fixed.items())]
    panels = _panels(study, panel) if panel else [None]
    figure, grid = _grid(len(panels), len(study.sweep[x]), len(study.sweep[y]))
    numbers = [row[value] for row in kept]
    shades = _shades(min(numbers), max(numbers))
    form = "+.1%" if against is not None else words_of(value)[3]
    for axes, choice in zip(grid, panels, strict=False):
        chosen = [row for row in kept if panel is None or of(row, panel) == choice]
        mark = answer.mark if panel is None or answer.mark.get(panel) == choice else {}
        _map(axes, study, chosen, (x, y), value, form, shades, mark)
        if panel is not None and choice is not None:
            axes.set_title(f"{panel} {shown(panel, choice)}", fontsize=12)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    note = "".join(f", {knob} {shown(knob, v)}" for knob, v in fixed.items())
    facts = _facts(study, kept, [x, y, *rest, *([against] if against else [])])
    text = fill(facts + note, int(11 * figure.get_figwidth()))
    figure.supxlabel(f"in the cells: {what}\n{text}", fontsize=10, color="#444444")
    return figure


def _panels(study: Study, knob: str) -> list[Value]:
    """The values of a knob that get a panel: those the study shows, or the first few."""
    shown_ones = [KEYS[knob].form.read(str(v)) for v in study.plot.get("show", [])]
    strange = [v for v in shown_ones if v not in study.sweep[knob]]
    if strange:
        raise SettingError(f"[plot] show: {knob} is never {shown(knob, strange[0])}")
    return shown_ones or list(study.sweep[knob])[:PANELS_MAX]


def _meaning(study: Study, value: str, against: str | None, marked: bool) -> str:
    """What the numbers in the cells are."""
    words, unit, more, _ = words_of(value)
    if against is not None:
        first, last = (shown(against, study.sweep[against][i]) for i in (0, -1))
        return f"change of the {words} with {against} {last} instead of {first}"
    better = "darker is better" if more else "darker is worse"
    if value == "private_over_clear":
        better += "; above 1 private is faster; *: clear would not fit the owner's memory"
    best = "; bold: the best" if marked else ""
    return f"{words}, {unit} ({better}{best})"


def _grid(panels: int, across: int, down: int) -> tuple[Figure, list[Axes]]:
    """A figure with room for so many panels of so many cells."""
    width, height = max(4.6, 0.95 * across + 1.6), 0.62 * down + 1.2
    columns = min(panels, max(1, int(20 // width)))
    if panels > columns:  # even rows
        columns = -(-panels // (-(-panels // columns)))
    lines = -(-panels // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(max(9.0, width * columns), height * lines + 1.8),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    return figure, list(grid.flat)


def _shades(low: float, high: float) -> Callable[[Any], Any]:
    """Figures to darkness, 0 to 1."""
    if low > 0 and high > 8 * low:  # in proportion, or the small ones would all look alike
        return lambda numbers: np.log(np.asarray(numbers) / low) / math.log(high / low)
    if low < 0:  # changes: the further from none, the darker
        most = max(-low, abs(high))
        return lambda numbers: np.abs(np.asarray(numbers)) / most
    span = high - low if high > low else 1.0
    return lambda numbers: (np.asarray(numbers) - low) / span


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
    axes: Axes, study: Study, rows: Sequence[Row], knobs: tuple[str, str], value: str, form: str,
    shades: Callable[[Any], Any], mark: Mapping[str, Value],
) -> None:  # fmt: skip
    x, y = knobs
    focus = {k: KEYS[k].form.read(str(v)) for k, v in study.answer.get("at", {}).items()}
    columns, lines = study.sweep[x], study.sweep[y]
    cells = np.full((len(lines), len(columns)), np.nan)
    no_clear = set()
    for row in rows:
        place = lines.index(of(row, y)), columns.index(of(row, x))
        cells[place] = row[value]
        if value == "private_over_clear" and not row["clear_fits"]:
            no_clear.add(place)
    axes.imshow(shades(cells), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(cells.shape):
        number = cells[i, j]
        text = "none" if np.isnan(number) else f"{number:{form}}".replace("%", " %")
        text += "*" if (i, j) in no_clear else ""
        dark = not np.isnan(number) and float(shades(number)) > 0.55
        best = (mark.get(x), mark.get(y)) == (columns[j], lines[i])
        axes.text(
            j, i, text, ha="center", va="center", color="white" if dark else "#222222",
            fontweight="bold" if best else "normal", fontsize=13 if best else 11,
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [shown(x, v) for v in columns])
    axes.set_yticks(range(len(lines)), [shown(y, v) for v in lines])
    axes.set_xlabel(_axis(x))
    axes.set_ylabel(fill(_axis(y), 8 * len(lines)))
    if x in focus and focus[x] in columns:
        axes.add_patch(
            mpl.patches.Rectangle(
                (columns.index(focus[x]) - 0.5, -0.5), 1, len(lines),
                fill=False, edgecolor=ORANGE, linewidth=3, clip_on=False,
            )
        )  # fmt: skip
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
