"""The picture of one training step: who was busy when, and what the step waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib as mpl

from backends.files import replacing
from scenarios.whatif.quantities import show_duration
from sim.trace import HEAD, PARTS, Span

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

mpl.rcParams["text.parse_math"] = False  # a name with a dollar in it is no formula

COLOURS = {
    "owner": "#3b7dd8", "up": "#e0701e", "worker": "#2c9c69", "down": "#9a5fc4",
    "latency": "#8d99a6", "head": "#1b3f73", "idle": "#c3c9d0",
}  # fmt: skip
WORDS = {
    "owner": "the owner's own work", "up": "upload", "worker": "the worker", "down": "download",
    "latency": "latency", "head": "head and loss", "idle": "waiting",
}  # fmt: skip
SHADES = (1.0, 0.72, 0.5, 0.34)


@dataclass(frozen=True)
class Row:
    """One swim lane: which spans belong to it, and in which colour."""

    label: str
    part: str
    spans: list[Span]


def swim_lanes(spans: Sequence[Span]) -> list[Row]:
    """The five rows, from the owner's own layers down to the answers' way back."""
    line = [s for s in spans if "->" in s.track and s.kind]
    sides = [s for s in spans if "->" not in s.track]
    own = [s for s in sides if s.kind == "owner"]
    cipher = [s for s in own if "/cipher" in s.track]
    layers = [s for s in own if "/cipher" not in s.track]
    rows = [Row("owner:\nown layers", "owner", layers), Row("owner:\ncipher", "owner", cipher)]
    up = [s for s in line if s.track.startswith("owner")]
    products = [s for s in sides if s.kind == "worker"]
    down = [s for s in line if not s.track.startswith("owner")]
    for label, part, found in (
        ("up", "up", up), ("worker:\nproducts", "worker", products), ("down", "down", down),
    ):  # fmt: skip
        rows.append(Row(label, part, found))
    return rows


def busy_s(spans: Sequence[Span], start_s: float, end_s: float) -> float:
    """Seconds of [start_s, end_s] in which at least one of the spans went on."""
    total, reached = 0.0, start_s
    for span in sorted(spans, key=lambda s: s.start_s):
        begin, end = max(span.start_s, reached), min(span.end_s, end_s)
        if end > begin:
            total += end - begin
            reached = end
    return total


def headline(parts: Mapping[str, float], step_s: float) -> str:
    """'81 % of a 3.2 s step is upload'."""
    most = max(parts, key=lambda part: parts[part])
    return f"{parts[most]:.0%} of a {step_s:.3g} s step is {WORDS[most]}".replace("%", " %", 1)


def plot_timeline(
    path: Path,
    spans: Sequence[Span],
    step: tuple[float, float],
    parts: Mapping[str, float],
    subtitle: str,
) -> None:
    """Critical path, the whole step, and a look into one layer, as one PNG.

    spans   of one owner's run; those outside `step` (start and end in s) are left out
    parts   of the step on its critical path, sum 1
    """
    start_s, end_s = step
    inside = [s for s in spans if s.end_s > start_s and s.start_s < end_s]
    rows = swim_lanes(inside)
    lanes = list(dict.fromkeys(sorted(s.lane for s in inside if s.lane)))
    figure = plt.figure(figsize=(14, 9.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(0.75, 3.2, 3.2))
    figure.suptitle(headline(parts, end_s - start_s), fontsize=19, fontweight="bold")
    top.set_title(subtitle, fontsize=11, color="#444444", pad=10)
    _bar(top, parts, end_s - start_s)
    _lanes(middle, rows, lanes, start_s, start_s, end_s)
    middle.set_title("the whole step; right: how much of it each part was busy", loc="left")
    for index, row in enumerate(rows):
        busy = [span for span in row.spans if span.kind == row.part]
        share = busy_s(busy, start_s, end_s) / (end_s - start_s)
        middle.text(
            1.005, index + 0.5, f"{share:.1%}".replace("%", " %"),
            transform=middle.get_yaxis_transform(), va="center", fontsize=11,
            color=COLOURS[row.part],
        )  # fmt: skip
    _name_spans(middle, rows, lanes, start_s, start_s, end_s)
    window = _window(inside, lanes, start_s, end_s)
    _lanes(bottom, rows, lanes, start_s, *window)
    _name_spans(bottom, rows, lanes, start_s, *window)
    bottom.set_title(
        f"a closer look: {show_duration(window[1] - window[0])} in the middle of the forward pass"
        + (f"; one stripe and shade for each of the {len(lanes)} lanes" if len(lanes) > 1 else ""),
        loc="left",
    )
    bottom.set_xlabel("seconds since the start of the step")
    middle.axvspan(window[0] - start_s, window[1] - start_s, color="#ffd84d", alpha=0.35, zorder=0)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _bar(axes: Axes, parts: Mapping[str, float], step_s: float) -> None:
    """The critical path as one bar, every part that can be seen named in it."""
    left = 0.0
    for part in PARTS:
        width = parts[part] * step_s
        if width <= 0:
            continue
        axes.barh(0, width, left=left, color=COLOURS[part], edgecolor="white", height=0.8)
        if parts[part] > 0.03:
            text = f"{WORDS[part]}\n{width:.3g} s, {parts[part]:.0%}".replace("%", " %")
            fits = parts[part] > 0.1
            axes.text(
                left + width / 2, 0, text if fits else text.rpartition(", ")[2], ha="center",
                va="center", color="white" if part != "idle" else "black", fontsize=11,
            )  # fmt: skip
        left += width
    axes.set_xlim(0, step_s)
    axes.set_yticks([0], ["what the step\nwaited for"])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _lanes(
    axes: Axes, rows: Sequence[Row], lanes: Sequence[str], zero_s: float, from_s: float, to_s: float
) -> None:
    """The rows between two moments; in each a stripe for every lane."""
    stripes = max(1, len(lanes))
    height = 0.84 / stripes
    shade = dict(zip(lanes, cycle(SHADES), strict=False))
    for index, row in enumerate(rows):
        for span in row.spans:
            if span.end_s <= from_s or span.start_s >= to_s:
                continue
            # What belongs to no lane, the optimiser's update, is for all of them.
            at, part = (lanes.index(span.lane), 1) if span.lane in shade else (0, stripes)
            axes.broken_barh(
                [(span.start_s - zero_s, span.end_s - span.start_s)],
                (index + 0.08 + at * height, height * part * 0.92),
                facecolors=COLOURS[_part(span)], alpha=shade.get(span.lane, 1.0), linewidth=0.7,
                edgecolors=COLOURS[_part(span)],
            )  # fmt: skip
    for index in range(1, len(rows)):
        axes.axhline(index, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [row.label for row in rows])
    axes.set_ylim(len(rows), 0)
    axes.set_xlim(from_s - zero_s, to_s - zero_s)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _part(span: Span) -> str:
    """Whose colour a bar has."""
    return "head" if span.name == HEAD else span.kind


def _window(
    spans: Sequence[Span], lanes: Sequence[str], start_s: float, end_s: float
) -> tuple[float, float]:
    """From one remote linear of the first lane to its fifth next, in the middle of its forward."""
    sent = sorted(s.start_s for s in spans if s.kind == "up" and lanes and s.lane == lanes[0])
    if len(sent) < 8:
        return start_s, end_s
    at = len(sent) // 4
    return sent[at] - 0.02 * (sent[at + 4] - sent[at]), sent[at + 4]


def _name_spans(
    axes: Axes, rows: Sequence[Row], lanes: Sequence[str], zero_s: float, from_s: float, to_s: float
) -> None:
    """Write what the first lane does into its widest bars."""
    stripes = max(1, len(lanes))
    for index, row in enumerate(rows):
        for span in row.spans:
            begin, end = max(span.start_s, from_s), min(span.end_s, to_s)
            if span.lane != (lanes[0] if lanes else "") or end - begin < 0.075 * (to_s - from_s):
                continue
            axes.text(
                (begin + end) / 2 - zero_s, index + 0.08 + 0.42 / stripes, _short(span),
                ha="center", va="center", color="white", fontsize=8.5 if stripes < 6 else 6.5,
                clip_on=True,
            )  # fmt: skip


def _short(span: Span) -> str:
    """What a bar is, in a few letters: the layer's own name without its path."""
    if span.kind in ("up", "down", "latency"):
        return {"up": "request", "down": "answer", "latency": "latency"}[span.kind]
    if span.name == HEAD:
        return "head and loss"
    words = span.name.split()
    kept = [w.rpartition(".")[2].replace("_proj", "") for w in words]
    return " ".join(w for w in kept if w not in ("forward", "backward"))
