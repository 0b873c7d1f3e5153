"""Writes the README's figures from benchmarks/results/*.json, so that none is typed by hand.

python -m docs.generate_figures           rewrite the part between the markers
python -m docs.generate_figures --check   exit 1 when that part is stale, write nothing
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures from benchmarks/results by docs/generate_figures.py: begin -->"
END = "<!-- figures: end -->"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the README, or check it; the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    fresh = renewed(page)
    if "--check" in arguments:
        if fresh == page:
            return 0
        print("README.md is stale: run python -m docs.generate_figures", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


def renewed(page: str) -> str:
    """The page with a fresh part between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("README.md has lost its markers")
    parts = [quickstart(), layer(), llama()]
    return f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}"


def load(name: str) -> dict[str, Any]:
    """The figures of one run."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def origin(figures: dict[str, Any]) -> str:
    """Where figures come from, as a line under their table."""
    o = figures["origin"]
    m = o["machine"]
    return (
        f"*`{o['command'].split(' --json')[0]}` on {m['cores']} cores of {m['processor']}, torch "
        f"{m['torch']}, commit `{o['commit']}`, {o['date']}.*\n"
    )


def quickstart() -> str:
    """Does it learn, and does it learn the same?"""
    f = load("quickstart")
    fall = 1 - f["private_loss"] / f["base_loss"]
    gap = f["private_loss"] / f["clear_loss"] - 1
    return f"""**It learns, and it learns the same.** Held-out loss of the quickstart (nats per \
token):

| base model | LoRA in clear | LoRA, private | private against base | private against clear |
| --- | --- | --- | --- | --- |
| {f["base_loss"]:.3f} | {f["clear_loss"]:.3f} | {f["private_loss"]:.3f} | \
{-fall:.1%} | {gap:+.2%} |

This model is tiny, so overheads show: its private steps took \
{f["private_s"] / f["clear_s"]:.1f} times as long as those in clear.
{origin(f)}"""


def layer() -> str:
    """One layer: the worker's and the owner's time against clear torch."""
    f = load("he_linear")
    rows = []
    for c in f["cases"]:
        rows.append(
            f"| {c['in']} → {c['out']} | {c['tokens']} | {c['worker_over_fp32']:.2f} | "
            f"{c['worker_over_bf16']:.2f} | {c['owner_over_fp32']:.2f} | "
            f"{c['owner_over_bf16']:.2f} | {c['relative_error']:.2%} | "
            f"{c['predicted_error']:.2%} |"
        )
    table = "\n".join(rows)
    return f"""**One frozen layer.** Time under encryption divided by the time of the whole clear \
layer in torch, in fp32 and in bf16 (your honest alternative is the faster of the two, bf16 on \
this machine); the error is against the same int8 weights:

| layer | tokens | worker / fp32 | worker / bf16 | owner / fp32 | owner / bf16 | error | predicted |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Traffic: {f["cases"][0]["bytes_up_per_value"]:.1f} bytes per value up, \
{f["cases"][0]["bytes_down_per_value"]:.1f} down. The owner's cost is per block of up to 256 \
tokens, so small micro-batches waste it.
{origin(f)}"""


def llama() -> str:
    """A whole training step of the 1B shape."""
    f = load("llama1b")
    traffic = (f["bytes_per_token_up"] + f["bytes_per_token_down"]) / 1e6
    return f"""**A whole training step of the Llama-3.2-1B shape**, {f["tokens_per_step"]} tokens, \
random weights, head local in both; clear is the same LoRA step in fp32 on the same int8 base:

| private / clear | private step | of it: owner's cipher | worker | clear step | \
traffic per token | preparation, once | peak memory, owner + worker |
| --- | --- | --- | --- | --- | --- | --- | --- |
| **{f["private_over_clear"]:.2f}** | {f["private_step_s"]:.1f} s | {f["owner_s"]:.1f} s | \
{f["worker_s"]:.1f} s | {f["clear_step_s"]:.1f} s | {traffic:.2f} MB | {f["prepare_s"]:.0f} s | \
{f["peak_rss_mb"] / 1000:.1f} GB |

The published peer reports 83 s per token for the same kind of step on a CPU of its own \
(its notebook; not measured here). Over a network, expect traffic to decide the speed.
{origin(f)}"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
