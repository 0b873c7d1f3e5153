"""Writes the pages' figures from benchmarks/results/*.json, so that none is typed by hand.

python -m docs.generate_figures           rewrite the parts between the markers
python -m docs.generate_figures --check   exit 1 when a part is stale, write nothing
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import rows as gpu_rows
from docs import comparison_figures as comparison
from docs.pages import between, origin, rewrite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES, GPU_FIGURES, NOISE_FIGURES = "figures", "figures of a GPU", "figures of noise"
THIN_FIGURES, TRAINING_FIGURES = "figures of thin ciphertexts", "figures of training"
GEMMA_FIGURES = "figures of Gemma"
"""Names of a page's generated parts, in their markers."""


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or check them; the exit status."""
    return rewrite(pages(), renewed, "docs.generate_figures", arguments)


def pages() -> dict[Path, dict[str, Sequence[Callable[[], str]]]]:
    """The pages with figures, and what each generated part of them shows."""
    return {
        ROOT / "README.md": {
            GPU_FIGURES: (gpu_summary,),
            FIGURES: (quickstart, layer, llama, simulated),
        },
        ROOT / "docs" / "cipher.md": {FIGURES: (noise,)},
        ROOT / "docs" / "comparison.md": {
            FIGURES: (comparison.peers,),
            TRAINING_FIGURES: (comparison.training,),
            GEMMA_FIGURES: (comparison.gemma_training,),
        },
        ROOT / "docs" / "machines.md": {FIGURES: (comparison.machines,)},
        ROOT / "docs" / "design.md": {
            GPU_FIGURES: (gpu_table, gpu_step, gpu_owner),
            FIGURES: (transport, two_processes),
            THIN_FIGURES: (thin,),
            NOISE_FIGURES: (quality,),
        },
        ROOT / "docs" / "inputs.md": {FIGURES: (zoo, inputs)},
        ROOT / "docs" / "simulation.md": {
            FIGURES: (
                fidelity,
                fidelity_network,
                gpu_fidelity,
                speed,
                studies,
                worth,
                chaos,
                crashes,
                planted,
                mutants,
            )
        },
    }


def renewed(path: Path, page: str) -> str:
    """A page with fresh parts between their markers."""
    for name, parts in pages()[path].items():
        begin = f"<!-- {name} from benchmarks/results by docs/generate_figures.py: begin -->"
        end = f"<!-- {name}: end -->"
        page = between(page, begin, end, "\n".join(part() for part in parts))
    return page


def load(name: str) -> dict[str, Any]:
    """The figures of one run."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def transport() -> str:
    """Our line beside gRPC's."""
    f = load("transport")
    rows = [
        ("this project's, mutual TLS 1.3", ""),
        (f"gRPC (grpcio {f['grpc_version']}), mutual TLS 1.3", "grpc_"),
        ("this project's, plain text on loopback", "plain_"),
    ]
    lines = ["| frames of 1.5 MB up and 1.0 MB down | MB/s of payload | CPU seconds per GB |"]
    lines.append("| --- | --- | --- |")
    for name, prefix in rows:
        speed, cost = f[f"{prefix}goodput_mb_s"], f[f"{prefix}cpu_s_per_gb"]
        lines.append(f"| {name} | {speed:.0f} | {cost:.2f} |")
    busy = (
        f"Medians of {f['rounds']} rounds of {f['seconds']} s, in turn, CPU seconds of both sides "
        f"together. Other processes took {f['others_busy_cores']:.1f} of the cores meanwhile."
    )
    return "\n".join([*lines, "", busy, "", origin(f)])


def two_processes() -> str:
    """A step with its worker in another process, beside one process and clear."""
    f = load("two-processes")
    return f"""A step of the 1B's shape, {f["lanes"]} lanes, {f["tokens_per_step"]} tokens \
in all, on {f["cores"]} cores that both sides share; clear is the same LoRA step in fp32, in one \
batch:

| | wanted | measured |
| --- | --- | --- |
| step in two processes over TLS / in one | at most 1.25 | **{f["step_ratio"]:.2f}** |
| owner's CPU seconds a token / clear's | at most 0.6 | **{f["owner_cpu_ratio"]:.2f}** |
| owner's own peak memory / clear's | at most 0.5 | **{f["owner_rss_ratio"]:.2f}** |

The owner took {f["owner_cpu_ms_per_token"]:.0f} ms of a processor a token, clear \
{f["clear_cpu_ms_per_token"]:.0f}; {f["owner_own_mb"] / 1000:.1f} GB of memory of its own, clear \
{f["clear_own_mb"] / 1000:.1f}. The language-model head stays with the owner, and four lanes of 64 \
tokens multiply it four times. What is mapped from files, as hints are, is not counted. One round \
of each kind, the first step of the private ones left out.

{origin(f)}"""


def thin() -> str:
    """What thin ciphertexts cost and save."""
    f, gemma, owner = load("thin-avx2"), load("thin-gemma"), load("thin-owner")
    head = load("thin-head")
    total = f["bytes_per_token_up"] + f["bytes_per_token_down"]
    lines = [
        f"Llama-3.2-1B, head local: **{total / 1e6:.2f} MB a token**, "
        f"{f['bytes_per_token_up'] / 1e6:.2f} up and {f['bytes_per_token_down'] / 1e6:.2f} down.",
        "",
        "| private fine-tuning under thin, and clear on the same weights | held-out loss, clear "
        "| private | difference | gradient norm | results | wrapped | repaired | used unseen |",
        "| --- " * 9 + "|",
    ]
    for run in [*f["runs"], *gemma["runs"]]:
        off = run["private_loss"] / run["clear_loss"] - 1
        lines.append(
            f"| {run['model']}, {run['steps']} steps of {run['tokens_per_step']} tokens, seed "
            f"{run['seed']} | {run['clear_loss']:.4f} | {run['private_loss']:.4f} | {off:+.2%} "
            f"| {run['gradient_norm_ratio']:.3f} | {run['results']:,} | {run['wraps']:,} "
            f"| {run['wraps_repaired']:,} | {run['wraps_unseen']:,} |"
        )
    lines += [
        "",
        " ".join(
            [
                "Every product of these runs was computed in clear beside, to count.",
                _outliers(f["outliers"]),
                _head(head["head"]),
                _thin_owner(owner["owner"]),
            ]
        ),
        "",
        origin(f),
        f"Head: {origin(head)}",
        f"Owner: {origin(owner)}",
        f"Gemma 3 270M (opened from a GGUF file, for checking only): {origin(gemma)}",
    ]
    return "\n".join(lines)


def _outliers(f: dict[str, Any]) -> str:
    return (
        f"Adapters' gradients of the quickstart's model with {f['channels']} channels at "
        f"{f['factor']:.0f} times the rest are {f['thin']:.0%} off under `thin`, "
        f"{f['exact']:.2%} under `exact`."
    )


def _head(f: dict[str, Any]) -> str:
    parts = [
        f"{name} {each['gradient_error']:.2%} (logits {each['logits_error']:.2%})"
        for name, each in f.items()
    ]
    return f"A remote head's input gradient is off by: {', '.join(parts)}."


def _thin_owner(f: dict[str, Any]) -> str:
    return (
        f"With the head remote the owner's process takes {f['owner_cpu_ratio']:.2f} of the "
        f"processor seconds of the same step in clear, and {f['owner_rss_ratio']:.2f} of its "
        "memory, what is mapped from files not counted."
    )


QUALITY = ("quality-quickstart", "quality-gemma")
"""What `benchmarks.quality` is run on."""


def quality() -> str:
    """How much noise fine-tuning stands, model by model."""
    there = [name for name in QUALITY if (RESULTS / f"{name}.json").exists()]
    return "\n".join(quality_of(load(name)) for name in there)


def quality_of(f: dict[str, Any]) -> str:
    """One model's runs, each against clear of the same seed."""
    clear = {run["seed"]: run["final_loss"] for run in f["runs"] if run["name"] == "clear"}
    lines = ["| products | held-out loss | its adapter without noise | gradient norm |"]
    lines.append("| --- | --- | --- | --- |")
    for run in f["runs"]:
        if run["name"] == "clear":
            continue
        noisy, quiet = (run[key] / clear[run["seed"]] - 1 for key in ("final_loss", "adapter_loss"))
        norm = run["gradient_norm_ratio"]
        lines.append(f"| {run['name']} | {noisy:+.2%} | {quiet:+.2%} | {norm:.3f} |")
    t = f["training"]
    head = (
        f"{f['model']}, {t['steps']} steps of {t['batch'] * t['sequence']} tokens; in clear, with "
        f"8-bit weights, it ends at {f['clear_loss']:.4f} on {f['held_out_sequences']} held-out "
        "sequences. Against that:"
    )
    return "\n".join([head, "", *lines, "", origin(f)])


KINDS = {"avx2": "AVX2 only", "avx512": "AVX-512 VNNI", "avxvnni": "AVX-VNNI"}
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
{matrix_units(runs)}{told(runs)}
{origins(runs)}
{generic()}"""


def matrix_units(runs: dict[str, dict[str, Any]]) -> str:
    """What clear bf16 gains where a processor has instructions for it that no kernel here uses."""
    those = {kind: f for kind, f in runs.items() if "amx_bf16" in f.get("cpu_flags", ())}
    if not those:
        return ""
    ranges = []
    for kind, f in those.items():
        ratios = [c["worker_over_fp32"] for c in f["cases"] if c["tokens"] > 1]
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f} ({KINDS[kind]})")
    return f"""
The processor of {" and ".join(KINDS[kind] for kind in those)} has a matrix unit for bf16 (AMX). \
The clear layer runs on it, and no kernel here does: against fp32 the worker takes \
{" and ".join(ranges)} of the clear time with 64 tokens or more.
"""


def told(runs: dict[str, dict[str, Any]]) -> str:
    """Which kernel was measured on a processor that has a faster one."""
    if "avx512_vnni" not in runs.get("avxvnni", {}).get("cpu_flags", ()):
        return ""
    return "The kernel for AVX-VNNI was told to run there: that processor takes AVX-512 VNNI.\n"


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


def gpu_run() -> dict[str, Any]:
    """What `benchmarks.gpu` found on the one GPU that has been measured, the tests among it."""
    return load("gpu-h100") | {"suite": load("gpu-h100-suite")["suite"]}


def between_both(values: Sequence[float], form: str) -> str:
    """The least and the largest, as text."""
    return f"{format(min(values), form)} to {format(max(values), form)}"


def gpu_summary() -> str:
    """A GPU in few lines."""
    f = gpu_run()
    s, layers, same = f["step"], f["layers"], f["identical"]
    real = load("fidelity-h100")["cases"][0]["real_parts_s"]
    ratios = between_both([x["he_over_bf16"] for x in layers], ".2f")
    shares = between_both([100 * x["of_int8_ceiling"] for x in layers], ".0f")
    ring = f["owner"][-1]
    counts = f["suite"]["summary"].split(" in ")[0].split(", ")
    tests = ", ".join(count for count in counts if "deselected" not in count)
    return f"""Measured on one {f["gpu"]}, owner and worker on it, {s["tokens_per_step"]:,} tokens \
a step, random weights; clear is the same LoRA step on the same int8 base:

| | |
| --- | --- |
| private / clear {s["clear_dtype"]}, a training step | **{s["private_over_clear"]:.2f}** (the aim \
is 3): {s["private_step_s"]:.3f} s against {s["clear_step_s"]:.3f} s |
| speed | {s["tokens_per_s"]:,.0f} tokens/s |
| of the private step | own layers {real["layers"]:.3f} s, owner's cipher {real["cipher"]:.3f} s, \
worker {real["products"]:.3f} s, other waiting {real["rest"]:.3f} s |
| last loss, private / clear | {s["losses"][-1]:.4f} / {s["clear_losses"][-1]:.4f} |
| one frozen layer / clear bf16, {layers[0]["tokens"]:,} tokens | {ratios} (aim: 1.6) |
| of what the int8 tensor cores do alone | {shares} % (aim: 80 %) |
| the worker alone, all linears of a step | {f["throughput"]["tokens_per_s"]:,.0f} tokens/s |
| owner's cipher | {ring["ring_us_per_token"]:.1f} us a token (aim: 15), with the check of answers \
{ring["checked_us_per_token"]:.1f} |
| preparing the 1B | {f["preparing"]["seconds"]:.1f} s |
| worker's answers equal to the CPU's | {same["compared"] - len(same["different"])} of \
{same["compared"]} |
| tests on the device | {tests} |

{origin(f)}"""


def judged(wanted: str, got: str) -> bool:
    """Whether a figure is within a bar or an aim, both as `benchmarks.gpu` prints them."""
    bound, value = (
        float(re.search(r"[\d.]+", text.replace(",", ""))[0])  # type: ignore[index]
        for text in (wanted, got)
    )
    return value <= bound if wanted.startswith("<=") else value >= bound


def gpu_table() -> str:
    """Every figure against what was asked for."""
    f = gpu_run()
    lines = []
    for measure, bar, aim, got in gpu_rows(f):
        missed = " **missed**" if aim and not judged(aim, got) else ""
        missed = " **missed, and the bar**" if "=" in bar and not judged(bar, got) else missed
        lines.append(f"| {measure.replace('->', '→')} | {bar} | {aim} | {got}{missed} |")
    table = "\n".join(lines)
    low = f["ceiling"]["median_int8_ops_per_s"] / 1e12
    return f"""| measure | must be | aim | measured on one {f["gpu"]} |
| --- | --- | --- | --- |
{table}

{origin(f)}
The tests: `{load("gpu-h100-suite")["origin"]["command"]}` on the same machine and commit. The \
ceiling is the fastest round's; the median is {low:,.0f} TOP/s.
"""


def gpu_step() -> str:
    """Where a private step's time goes."""
    f = load("fidelity-h100")
    case, s = f["cases"][0], load("gpu-h100")["step"]
    parts, requests = case["real_parts_s"], case["requests"]
    words = {
        "layers": "owner's own layers, until it waits",
        "cipher": "owner's cipher, device time",
        "products": "worker's products, device time",
        "rest": "the rest of the waiting",
    }
    rows = "\n".join(
        f"| {words[name]} | {1e3 * parts[name]:.0f} ms | {parts[name] / case['real_s']:.0%} | "
        f"{1e3 * parts[name] / requests:.2f} ms |"
        for name in words
    )
    pairs = [a / b for a, b in zip(s["private_steps_s"], s["clear_steps_s"], strict=True)]
    return f"""**A private step**, {case["tokens"]:,} tokens in {requests} requests, \
{1e3 * case["real_s"]:.0f} ms; the whole clear step takes {1e3 * s["clear_step_s"]:.0f} ms:

| part | time | share | a request |
| --- | --- | --- | --- |
{rows}

The rest is what the device had yet to do of the owner's layers when it began to wait, the \
hand-over between threads, and a device without work; the file does not part them. Cipher and \
products alone are {(parts["cipher"] + parts["products"]) / s["clear_step_s"]:.1f} clear steps. \
Figures are medians of {len(pairs)} steps, the first of which compiles \
({s["private_steps_s"][0]:.1f} s); the steps after it took {between_both(pairs[1:], ".2f")} times \
their clear twins.
"""


def gpu_owner() -> str:
    """The owner's cipher by tokens of a request."""
    works = load("gpu-h100")["owner"]
    rows = []
    for w in works:
        cells = [f"{w['tokens']:,}"]
        for what in ("encrypt", "decrypt", "decrypt_checked"):
            ms = [m[f"{what}_ms"] for m in w["matrices"]]
            cells.append(between_both(ms, ".2f"))
        cells += [f"{w[f'{what}_us_per_token'] * w['tokens'] / 1e3:.0f} ms" for what in (
            "ring", "checked")]  # fmt: skip
        cells += [f"{w[f'{what}_us_per_token']:,.1f}" for what in ("ring", "checked")]
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    one, many = works[0], works[-1]

    def share(what: str) -> str:
        key = f"{what}_us_per_token"
        return f"{one[key] * one['tokens'] / (many[key] * many['tokens']):.0%}"

    return f"""**The owner's cipher**, one request of each of the model's eight matrices (least to \
most), and all linears of a step; ring work is encrypting and decrypting, checked the same with \
the check of answers:

| tokens of a request | encrypt, ms | decrypt, ms | decrypt and check, ms | ring, a step | \
checked, a step | ring, us a token | checked, us a token |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

A request of a single token takes {share("ring")} of the ring work, and {share("checked")} of the \
checked, of one of {many["tokens"]:,}: what a call costs whatever is in it, the host's part \
included, is most of it. Without the check only the widest matrices (8,192 and 16,384 values a \
token) cost more than that.
"""


def gpu_fidelity() -> str:
    """A recorded step of a GPU against its simulated twin."""
    f = load("fidelity-h100")
    own, other = f["cases"]
    real = own["real_parts_s"]
    words = {
        "layers": "owner's own layers", "cipher": "owner's cipher",
        "products": "worker's products", "rest": "the rest of the waiting",
    }  # fmt: skip
    rows = [
        [word, real[name], own["simulated_parts_s"][name], other["simulated_parts_s"][name]]
        for name, word in words.items()
    ]
    rows.append(["**step**", own["real_s"], own["simulated_s"], other["simulated_s"]])
    table = "\n".join(f"| {word} | {' | '.join(f'{x:.3f}' for x in xs)} |" for word, *xs in rows)
    known = own["simulated_parts_s"]["cipher"] + own["simulated_parts_s"]["products"]
    left = (known + real["layers"]) / (own["real_s"] - real["rest"]) - 1
    cipher = other["simulated_parts_s"]["cipher"] / real["cipher"] - 1
    return f"""### A GPU, simulated against real

One step of the 1B with {own["tokens"]:,} tokens in one lane, owner and worker on one H100, in \
seconds: measured, on a profile measured on such a machine an hour later (`h100`), and on the \
H200's data sheet and assumptions (`h200`: the same multiprocessors, faster memory).

| part | measured | simulated, `h100` | simulated, `h200` |
| --- | --- | --- | --- |
{table}
| error | | **{own["error"]:+.1%}** | **{other["error"]:+.1%}** |

Neither is good, and for one reason: hand-over between threads, and a device without work, which \
the simulator does not know on a GPU. They are the rest of the waiting, {real["rest"]:.3f} s of \
the measured step; without it the `h100` figures would be {left:+.0%} off, with the layers as \
measured. `h200` is quicker still, because by its assumptions the owner's cipher takes \
{-cipher:.0%} less than it did on the H100. So what data sheets say of an owner on a GPU is too \
good. In the studies below the owner is a CPU behind a network, and the GPU a small part of the \
time.

{origin(f)}"""


def simulated() -> str:
    """The simulator in one table."""
    f, s, c, p = load("fidelity"), load("sim_speed"), load("chaos"), load("planted")
    home, owners = load("whatif-home-office"), load("whatif-h200-owners")
    found = sum(d["found"] for d in p["planted"])
    signed = f"{load('fidelity-h100')['cases'][0]['error']:+.1%}"
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

GPU figures in it come from data sheets and assumptions, as no H200 has been measured; it says so \
wherever it shows them. The one measured GPU profile, `h100`, misses the step measured beside \
it by {signed}.
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


def worth() -> str:
    """Private against clear on the owner's own machine."""
    s = load("whatif-worth-it")
    rows = []
    for case in s["worth"]:
        even = case["break_even_bps"]
        verdict = {
            "only": "any line: clear does not fit",
            "always": "every line tried",
            "never": "**not here**",
            "from": f"from {0 if even is None else even / 1e6:,.0f} Mb/s on",
        }[case["verdict"]]
        needs = f"{case['clear_memory_gb']:.3g} of {case['memory_gb']:.3g}"
        clear, private = (
            f"{case[of]:,.0f}" if case[of] >= 100 else f"{case[of]:.3g}"
            for of in ("clear_tokens_per_s", "private_most")
        )
        clear = "-" if case["verdict"] == "only" else clear
        cells = [case["owner_device"], case["model"], needs, clear, private, verdict]
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    most = s["worth"][0]["private_most_bps"] / 1e9
    return f"""### Is private worth it?

Private fine-tuning against the same in clear on the owner's own machine. Assumed {s["assumed"]}.

| owner | model | GB needed in clear | clear, tokens/s | private over {most:g} Gb/s, tokens/s | \
private is faster |
| --- | --- | --- | --- | --- | --- |
{table}

![Private over clear, by model and line](pictures/worth-it.png)

{origin(s)}"""


def chaos() -> str:
    """Trainings under faults."""
    c = load("chaos")
    faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(c["faults_injected"].items()))
    return f"""### Chaos

{c["seeds"]:,} trainings, **{c["violations"]} violations**, {c["elapsed_s"] / 60:.1f} minutes. \
Faults injected: {faults}.
{origin(c)}"""


def crashes() -> str:
    """Real processes, really killed."""
    k, q = load("chaos-processes"), load("chaos-quickstart")
    killed = ", ".join(f"{kind} {count}" for kind, count in sorted(k["killed"].items()))
    cuts, trainings = sum(k["cuts"].values()), sum(k["trainings"].values())
    farthest = k["distances_in_undisturbed_distances"][-1]
    read = f"{k['requests_read']:,}"
    one_step = k["last_step_moves"] / k["undisturbed_distance"]
    happened = ", ".join(d["what"] for d in q["disturbances"])
    return f"""### Processes that die

{k["kills"]} kills ({killed}), {cuts} cuts of the line and {k["disk_full"]} full disks in \
{trainings} trainings of {k["steps_each"]} steps, {k["seconds"] / k["kills"]:.1f} s a kill on a \
machine that others used too: **{k["lost_steps"]} steps lost, {k["doubled_steps"]} done twice, \
{k["reused_secrets"]} secrets used twice** in {read} requests read. In units of the \
largest distance of two undisturbed adapters, the disturbed ones end at most {farthest:.1f} from \
the middle of those; one step moves an adapter by {one_step:.0f}.
{origin(k)}
The quickstart, {q["steps"]} steps, its worker in another process over TLS. Undisturbed, two runs \
end {q["adapter_distance_undisturbed"]:.1%} of their way apart, with held-out losses \
{" and ".join(f"{loss:.4f}" for loss in q["held_out_loss_undisturbed"])}; one disturbed by \
{happened} ends {q["adapter_distance_disturbed"]:.1%} from them (**{q["ratio"]:.2f} times** that), \
with {q["held_out_loss_disturbed"]:.4f}.
{origin(q)}"""


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


def mutants() -> str:
    """What the protocol's tests notice of changes that nobody planted."""
    m = load("mutants")
    return f"""### Mutants

Of {m["mutants"]} drawn from {m["possible"]:,} possible small changes of `protocol/`, \
{m["killed"]} are killed by its tests, {m["equivalent"]} change nothing that is promised, \
**{m["survived"]} survive**.
{origin(m)}"""


def zoo() -> str:
    """Every type of model, and layouts."""
    z, y = load("zoo"), load("zoo-layouts")
    return f"""## Tried on every type

Of the {z["cases"]} types of causal language models that transformers {z["transformers"]} knows, \
built tiny and random, **{z["exact"]} give the same logits and adapter gradients** as in clear \
(relative 2e-5, without rounding and cipher; {z["exact_but_mostly_local"]} of them are mixtures of \
experts and the like, which a run refuses unless `--least-remote` says otherwise), {z["refused"]} \
are refused in a line, {z["wrong"]} differ, {z["traceback"]} end in a traceback; {z["not_built"]} \
cannot be built here.
{origin(z)}
Of {y["cases"]} layouts of a few types, as transformers writes them and worse, \
{y["cases"] - y["unexpected"]} are read or refused as they should be.
{origin(y)}"""


def inputs() -> str:
    """The fuzzer of options and files."""
    f = load("inputs")
    return f"""Of {f["cases"]:,} command lines drawn from all options and a pool of files, \
{f["tracebacks"]} ended in a traceback, {f["unsaid"]} failed without a line that says why, \
{f["hangs"]} hung, {f["silent"]} took what can never be right.
{origin(f)}"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
