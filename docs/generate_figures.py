"""Writes the pages' figures from benchmarks/results/*.json, so that none is typed by hand.

python -m docs.generate_figures           rewrite the parts between the markers
python -m docs.generate_figures --check   exit 1 when a part is stale, write nothing
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docs.pages import between, rewrite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures from benchmarks/results by docs/generate_figures.py: begin -->"
END = "<!-- figures: end -->"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or check them; the exit status."""
    return rewrite(pages(), renewed, "docs.generate_figures", arguments)


def pages() -> dict[Path, Sequence[Callable[[], str]]]:
    """The pages with figures, and what each shows."""
    return {
        ROOT / "README.md": (quickstart, layer, llama, simulated),
        ROOT / "docs" / "cipher.md": (noise,),
        ROOT / "docs" / "simulation.md": (
            fidelity,
            fidelity_network,
            speed,
            studies,
            chaos,
            planted,
        ),
    }


def renewed(path: Path, page: str) -> str:
    """A page with a fresh part between its markers."""
    return between(page, BEGIN, END, "\n".join(part() for part in pages()[path]))


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


KINDS = {"avx2": "AVX2 only", "avx512": "AVX-512 VNNI"}
"""Kinds of processor that have result files of their own, and what a reader calls them."""


def by_kind(name: str) -> dict[str, dict[str, Any]]:
    """The figures of one benchmark on every kind of processor that it has been run on."""
    found = {kind: RESULTS / f"{name}-{kind}.json" for kind in KINDS}
    return {kind: load(path.stem) for kind, path in found.items() if path.exists()}


def origins(runs: dict[str, dict[str, Any]]) -> str:
    """Where the figures of each kind come from."""
    lines = []
    for kind, f in runs.items():
        older = "" if "kernel" in f else " Before the kernels were rewritten; not measured since."
        lines.append(f"*{KINDS[kind]}:*{older} {origin(f)}")
    return "\n".join(lines)


def quickstart() -> str:
    """Does it learn, and does it learn the same?"""
    runs = by_kind("quickstart")
    rows = []
    for kind, f in runs.items():
        fall = 1 - f["private_loss"] / f["base_loss"]
        gap = f["private_loss"] / f["clear_loss"] - 1
        rows.append(
            f"| {KINDS[kind]} | {f['base_loss']:.3f} | {f['clear_loss']:.3f} | "
            f"{f['private_loss']:.3f} | {-fall:.1%} | {gap:+.2%} | "
            f"{f['private_s'] / f['clear_s']:.1f} | {minutes(f)} |"
        )
    table = "\n".join(rows)
    return f"""**It learns, and it learns the same.** Held-out loss of the quickstart (nats per \
token):

| two cores with | base model | LoRA in clear | LoRA, private | against base | against clear | \
private / clear time | all of it, installed |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

This model is tiny, so overheads show in its times.

{origins(runs)}"""


def minutes(f: dict[str, Any]) -> str:
    """A whole run's time, where the file has it."""
    return f"{f['total_s']:.0f} s" if "total_s" in f else ""


def against_clear(case: dict[str, Any], side: str) -> str:
    """The time of one side divided by the faster clear layer's, and what that computed in."""
    dtype = min(("fp32", "bf16"), key=lambda name: case[f"clear_{name}_ms"])
    return f"{case[f'{side}_over_{dtype}']:.2f} ({dtype})"


def layer() -> str:
    """One layer: the worker's and the owner's time against clear torch."""
    runs = by_kind("he_linear")
    cases = {(c["in"], c["out"], c["tokens"]): {} for f in runs.values() for c in f["cases"]}
    for kind, f in runs.items():
        for c in f["cases"]:
            cases[c["in"], c["out"], c["tokens"]][kind] = c
    rows = []
    for (inputs, outputs, tokens), found in cases.items():
        cells = [f"{inputs} → {outputs}", str(tokens)]
        for kind in runs:
            c = found.get(kind)
            cells += [against_clear(c, side) if c else "" for side in ("worker", "owner")]
        c = next(iter(found.values()))
        cells += [f"{c['relative_error']:.2%}", f"{c['predicted_error']:.2%}"]
        rows.append(f"| {' | '.join(cells)} |")
    head = ["layer", "tokens"]
    head += [f"{KINDS[kind]}: {side}" for kind in runs for side in ("worker", "owner")]
    head += ["error", "predicted"]
    table = "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *rows])
    some = next(iter(runs.values()))["cases"][0]
    return f"""**One frozen layer.** Time under encryption divided by the time of the whole clear \
layer in torch, in fp32 or bf16, whichever is faster on that machine (your honest alternative); \
the error is against the same int8 weights:

{table}

Traffic: {some["bytes_up_per_value"]:.1f} bytes per value up, \
{some["bytes_down_per_value"]:.1f} down. The owner's cost is per block of up to 256 \
tokens, so small micro-batches waste it. With one token all sides wait for memory, and clear \
reads four bytes a weight where the worker reads one.

{origins(runs)}
{generic()}"""


def generic() -> str:
    """The kernel of last resort, where it has been measured."""
    path = RESULTS / "he_linear-generic.json"
    if not path.exists():
        return ""
    f = load(path.stem)
    c = f["cases"][0]
    return f"""A processor with none of these instructions takes the generic kernel: worker / \
clear {against_clear(c, "worker")} for {c["in"]} → {c["out"]}, {c["tokens"]} tokens.
{origin(f)}"""


def llama() -> str:
    """A whole training step of the 1B shape."""
    runs, prepared = by_kind("llama1b"), by_kind("prepare")
    rows = []
    for kind, f in runs.items():
        traffic = (f["bytes_per_token_up"] + f["bytes_per_token_down"]) / 1e6
        rows.append(
            f"| {KINDS[kind]} | **{f['private_over_clear']:.2f}** | "
            f"{f.get('clear_dtype', 'fp32; bf16 not compared')} | {f['private_step_s']:.1f} s | "
            f"{f['owner_s']:.1f} s | {f['worker_s']:.1f} s | {f['clear_step_s']:.1f} s | "
            f"{traffic:.2f} MB | {preparation(prepared.get(kind, f))} | "
            f"{f['peak_rss_mb'] / 1000:.1f} GB |"
        )
    table = "\n".join(rows)
    tokens = next(iter(runs.values()))["tokens_per_step"]
    return f"""**A whole training step of the Llama-3.2-1B shape**, {tokens} tokens, \
random weights, head local in both; clear is the same LoRA step on the same int8 base:

| two cores with | private / clear | clear in | private step | of it: owner's cipher | worker | \
clear step | traffic per token | preparation, once | peak memory, owner + worker |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

The published peer reports 83 s per token for the same kind of step on a CPU of its own \
(its notebook; not measured here). Over a network, expect traffic to decide the speed.

{origins(runs)}
Preparation: {origins(prepared)}"""


def preparation(f: dict[str, Any]) -> str:
    """How long a public set-up takes, and its verification where that was measured."""
    verified = f", verified in {f['verify_s']:.0f} s" if f.get("verify_s") else ""
    return f"{f['prepare_s']:.0f} s{verified}"


def simulated() -> str:
    """The simulator in one table."""
    f, s, c, p = load("fidelity"), load("sim_speed"), load("chaos"), load("planted")
    home, owners = load("whatif-home-office"), load("whatif-h200-owners")
    found = sum(d["found"] for d in p["planted"])
    faults = sum(c["faults_injected"].values())
    return f"""**The simulator** ([docs/simulation.md](docs/simulation.md) has the whole tables):

| | |
| --- | --- |
| simulated against real step time, {len(f["cases"])} cases on this machine | median error \
**{f["median_error"]:.1%}**, worst {f["worst_error"]:.1%} |
| one simulated step of the 1B, 4 lanes | {s["step_s"]:.3f} s |
| {home["configurations"]} what-if settings of the 1B | {home["elapsed_s"]:.0f} s |
| home office, 100 Mb/s | {home["headline"]} |
| one H200, many owners | {owners["headline"]} |
| trainings under drawn faults ({faults:,} faults injected) | {c["seeds"]:,}, \
**{c["violations"]} violations**, {c["elapsed_s"] / 60:.1f} min |
| planted defects found | {found} of {len(p["planted"])}, median \
{p["median_seeds"]:.0f} seeds |

GPU figures in it come from data sheets and assumptions; it says so wherever it shows them.
{origin(f)}"""


def noise() -> str:
    """The error of a result against its law."""
    f = load("noise")
    rows = []
    for c in f["cases"]:
        cells = [c["case"], f"{c['samples']:,}", f"{c['deviation']:.1f}"]
        cells += [f"{c['variance']['measured']:.5f} ± {c['variance']['standard_error']:.5f}"]
        fourth = c["fourth_moment"]
        cells += [f"{fourth['measured']:.4f} ({fourth['predicted']:.4f})"]
        for sigma in (3, 4, 5):
            beyond = c[f"beyond_{sigma}_sigma"]
            cells.append(f"{beyond['measured']:,} ({beyond['predicted']:,.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    return f"""| matrix | results | sigma | variance / sigma², ± standard error | fourth moment \
(predicted) | beyond 3 sigma (predicted) | 4 sigma | 5 sigma |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Of all figures (mean, variance, fourth moment, counts beyond 1 to 5 sigma, and the mean of every \
output) the farthest from the law is {f["largest_score"]:.1f} standard errors away.

{origin(f)}"""


def fidelity() -> str:
    """Simulated against real, case by case."""
    f = load("fidelity")
    rows = "\n".join(
        f"| {c['name']} | {c['lanes']} | {c['tokens']} | {c['real_s']:.3f} | "
        f"{c['simulated_s']:.3f} | {c['simulated_s'] / c['real_s'] - 1:+.1%} |"
        for c in f["cases"]
    )
    return f"""### Simulated against real

Step times through the in-process driver, and of the simulator on a profile calibrated in the same
run from other models. Median error **{f["median_error"]:.1%}**, worst {f["worst_error"]:.1%}.

| model | lanes | tokens a lane | real, s | simulated, s | error |
| --- | --- | --- | --- | --- | --- |
{rows}

{origin(f)}"""


def fidelity_network() -> str:
    """Simulated against real over a real line; how far other processes spoiled it."""
    if not (RESULTS / "fidelity-network.json").exists():
        return """### Simulated against real, over a line

Not measured yet: `python -m benchmarks.fidelity --network`, as root.
"""
    f = load("fidelity-network")
    rows = "\n".join(
        f"| {c['bits_per_s'] / 1e6:,.0f} Mb/s | {1e3 * c['rtt_s']:.0f} ms | {c['lanes']} | "
        f"{c['measured_s']:.2f} | {c['predicted_s']:.2f} | {c['error']:+.1%} | "
        f"{c['estimate']['error']:+.1%} | {c['busy_elsewhere']:.1f} |"
        for c in f["cells"]
    )
    busy = max(c["busy_elsewhere"] for c in f["cells"])
    spoiled = (
        "**Other processes kept the cores busy meanwhile, more or less of them in every cell and "
        "in the calibration: these errors are theirs as much as the simulator's.** "
        if busy > 0.3
        else ""
    )
    return f"""### Simulated against real, over a line

Owner and worker with a core each, over TLS, joined by a shaped line; steps of a model of two
layers, 23 MB up and 17 MB down a lane. Median error **{f["median_error"]:.1%}** (wanted: at most \
{f["bars"]["median_error"]:.0%}), 90th percentile {f["p90_error"]:.1%}, worst \
{f["worst_error"]:.1%} (at most {f["bars"]["worst_error"]:.0%}), bias {f["bias"]:+.1%}. {spoiled}The
estimate is what a run prints before its first step, from a probe of its line: median error \
{f["estimates"]["median_error"]:.1%}, worst {f["estimates"]["worst_error"]:.1%}.

| line | round trip | lanes | real, s | simulated, s | error | estimate's | cores busy elsewhere |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

{origin(f)}"""


def speed() -> str:
    """How fast it simulates."""
    s = load("sim_speed")
    return f"""### Speed

One step of the 1B with 4 lanes: **{s["step_s"]:.3f} s**, {s["events"]:,} events, \
{s["events_per_s"]:,.0f} a second. Tracing a model, once: {s["trace_s"]:.1f} s.
{origin(s)}"""


def studies() -> str:
    """The answers of the ready-made studies."""
    lines = ["### The ready-made studies\n", "| study | question | answer |", "| --- | --- | --- |"]
    for name in ("home-office", "h200-owners", "lanes-or-bandwidth", "70b-two-sites"):
        s = load(f"whatif-{name}")
        lines.append(f"| {name} | {s['question']} | {s['headline']} |")
    s = load("whatif-home-office")
    lines.append(f"\nOn a modelled owner and GPU: {'; '.join(s['profiles'])}.")
    lines.append(f"{s['configurations']} settings of the first study took {s['elapsed_s']:.0f} s.")
    return "\n".join(lines) + "\n" + origin(s)


def chaos() -> str:
    """Trainings under faults."""
    c = load("chaos")
    faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(c["faults_injected"].items()))
    return f"""### Chaos

{c["seeds"]:,} trainings, **{c["violations"]} violations**, {c["elapsed_s"] / 60:.1f} minutes. \
Faults injected: {faults}.
{origin(c)}"""


def planted() -> str:
    """What each planted defect took to be found."""
    p = load("planted")
    rows = "\n".join(
        f"| {d['name']} | {d['what']} | {d['seeds_to_detect'] or 'test'} | {d['how']} |"
        for d in p["planted"]
    )
    return f"""### Planted defects

Each is planted alone in a copy of the source; chaos runs until it finds something, or the named
test must fail.

| defect | what it breaks | seeds until found | what was seen |
| --- | --- | --- | --- |
{rows}

{origin(p)}"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
