"""Pictures and texts a run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from backends.files import replacing

mpl.use("Agg")
from matplotlib import pyplot as plt


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def smooth(values: list[float], window: int = 7) -> list[float]:
    """Centred running mean, shorter at the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_losses(
    path: Path, private: list[float], clear: list[float], figures: dict[str, Any]
) -> None:
    """Both loss curves, and the held-out losses as bars, in one PNG."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(2.4, 1), layout="constrained"
    )
    # One may have been trained for more steps than the other.
    steps, clear_steps = range(1, len(private) + 1), range(1, len(clear) + 1)
    left.plot(steps, private, color="#1f6fb4", alpha=0.25, linewidth=1)
    left.plot(steps, smooth(private), color="#1f6fb4", linewidth=2.6, label="private (encrypted)")
    left.plot(
        clear_steps, smooth(clear), color="#e08a1e", linewidth=1.6, linestyle="--", label="in clear"
    )
    left.set_xlabel("optimiser step")
    left.set_ylabel("training loss (nats per token)")
    left.set_title("Training loss, encrypted and in clear (running mean)")
    left.legend(frameon=False)
    names = ["base", "clear\nLoRA", "private\nLoRA"]
    values = [figures["base_loss"], figures["clear_loss"], figures["private_loss"]]
    bars = right.bar(names, values, color=["#9aa5b1", "#e08a1e", "#1f6fb4"], width=0.62)
    right.bar_label(bars, fmt="%.3f", padding=3)
    right.set_ylim(0, max(values) * 1.15)
    right.set_title("Held-out loss (lower is better)")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
