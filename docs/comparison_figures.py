"""The tables of docs/comparison.md and docs/machines.md, from benchmarks/results/*.json."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.everything import told_before
from docs.pages import origin

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
MACHINES = RESULTS / "machines"
KIND = "amx"
"""The kind of machine that the comparison quotes."""


def _spoken(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "0"


def peers() -> str:
    """One linear by everyone."""
    figures = json.loads((MACHINES / KIND / "peers.json").read_text())
    lines = [
        "| who, how | server, a token | owner, a token | bytes up | bytes down | keys the server "
        "needs | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kernels: set[str] = set()
    for row in figures["rows"]:
        name, scheme = row["name"], row["scheme"]
        if name == "ours":
            if scheme in kernels:
                continue  # the fastest kernel of a preset comes first
            kernels.add(scheme)
        version = "" if name.startswith(("ours", "clear")) else f" {row['version']}"
        reckoned = " (reckoned)" if row["extrapolated"] else ""
        keys = f"{row['key_bytes'] / 1e6:.3g} MB" if row["key_bytes"] else "none"
        lines.append(
            f"| {name}{version}, {scheme} | {_spoken(row['server_s_per_token'])}{reckoned} "
            f"| {_spoken(row['owner_s_per_token'])} | {row['up_bytes_per_token']:,.0f} "
            f"| {row['down_bytes_per_token']:,.0f} | {keys} | {row['relative_error']:.2g} |"
        )
    told = (
        f"\nA worker of ours under `thin` takes {figures['server_times_less']:,.0f} times less "
        f"than {figures['fastest_peer']}, the fastest of the others, and "
        f"{figures['server_over_clear']:.2f} times what clear torch takes at its best; "
        f"{figures['bytes_ratio']:.2f} of the bytes of {figures['smallest_peer']} travel, which "
        "sends the fewest of the others. *Reckoned*: some of the 2,048 outputs were computed, and "
        "the time of all is in proportion.\n"
    )
    if figures["left_out"]:  # the fastest of the others is the fastest of those that ran
        told += f"\nNot measured: {', '.join(sorted(figures['left_out']))}.\n"
    return "\n".join([*lines, told, origin(figures)])


def training() -> str:
    """The quickstart in clear, quantised, and privately."""
    return _training(MACHINES / KIND / "training.json")


def gemma_training() -> str:
    """The same of a model with weights that were learnt."""
    return _training(RESULTS / "training-gemma.json")


def _training(path: Path) -> str:
    figures = json.loads(path.read_text())
    runs = figures["runs"]
    clear = runs[0]["final_loss"]
    lines = [
        "| run | held-out loss | against clear int8 | gradient norm | at the first step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        lines.append(
            f"| {run['name']} | {run['final_loss']:.4f} | {run['final_loss'] / clear - 1:+.2%} "
            f"| {run['gradient_norm_ratio']:.3f} "
            f"| {run['gradient_norms'][0] / runs[0]['gradient_norms'][0]:.3f} |"
        )
    return "\n".join([*lines, "", origin(figures)])


def machines() -> str:
    """Each kind of machine: the headline of every measurement, and what it was before."""
    parts = []
    for place in sorted(path.parent for path in MACHINES.glob("*/history.jsonl")):
        parts.append(f"## {place.name}\n")
        told = told_before(place / "history.jsonl")
        told.sort(key=_where)  # stable: the oldest first
        for where, group in groupby(told, key=_where):
            parts += [f"{where}\n", *_moves(list(group)), ""]
    return "\n".join(parts)


def _where(run: dict[str, Any]) -> str:
    """Another machine of a kind has figures, and a history, of its own."""
    return f"{run['machine']['cores']} cores of {run['machine']['processor']}"


def _moves(told: list[dict[str, Any]]) -> list[str]:
    """The table of one machine, from its history."""
    lines = ["| measurement | now | commit | before |\n| --- | --- | --- | --- |"]
    told.sort(key=lambda each: each["name"])
    for name, group in groupby(told, key=lambda each: each["name"]):
        runs = list(group)
        for key, value in runs[-1]["headline"].items():
            before = [
                f"{run['headline'][key]:.4g} (`{run['commit'][:8]}`, {run['date']})"
                for run in runs[:-1] if key in run["headline"]
            ]  # fmt: skip
            lines.append(
                f"| {name}: {key} | {value:.4g} | `{runs[-1]['commit'][:8]}`, "
                f"{runs[-1]['date']} | {', '.join(before[-5:]) or 'none'} |"
            )
    return lines
