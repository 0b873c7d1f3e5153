"""Everything there is to know of the CUDA backend on this machine's GPU, in one command.

    python -m benchmarks.gpu --json benchmarks/results/gpu-h200.json

First the correctness suite (tests/cuda) runs on the device, then every shape of Llama-3.2-1B is
compared with the CPU bit for bit, then speeds are measured, both sides of every ratio in one run,
and a table sets them against what was asked for. With --profile FILE it also writes the device
profile that the simulator runs on. The figures are written after every part, so that a run that
is cut short keeps what it had. Takes about ten minutes; --parts runs some of it.

Nothing of this has run on a GPU yet: there are no figures in the repository.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backends.he.cuda.device import Gpu, find_gpu
from backends.he.params import PRESETS, Parameters, preset
from backends.machine import commit
from benchmarks.gpu import owner, whole, worker
from benchmarks.gpu.profile import profile
from benchmarks.gpu.timing import Scale, device_ms, full
from scenarios import record
from scenarios.cli import clean_exit

Figures = dict[str, Any]
PARTS = (
    "suite", "identical", "ceilings", "layers", "throughput", "launch", "owner", "preparing",
    "step", "peer",
)  # fmt: skip
_OF_A_PROFILE = ("ceilings", "layers", "throughput", "launch", "owner")


def launch(gpu: Gpu, parameters: Parameters, scale: Scale) -> Figures:
    """Seconds of the smallest things: one torch kernel, and a product of one token."""
    small = torch.zeros(32, device=gpu.device)
    matrix = scale.matrices[0]
    cipher = worker.CudaWorker(parameters, gpu)
    loaded = cipher.load(worker.random_weight(matrix.inputs, matrix.outputs), True)
    request = worker.random_request(gpu, 1, matrix.inputs, parameters)
    cipher.multiply(request, 1, loaded)
    return {
        "local_s": device_ms(gpu, lambda: small.add_(1), 100) / 1e3,
        "multiply_s": device_ms(gpu, lambda: cipher.multiply(request, 1, loaded), 100) / 1e3,
    }


def rings(gpu: Gpu, parameters: Parameters, scale: Scale) -> list[Figures]:
    """The owner's work at several token counts; the last one is the one that is judged."""
    counts = sorted({1, min(256, scale.tokens), scale.tokens})
    return [owner.ring_work(gpu, parameters, replace(scale, tokens=n)) for n in counts]


def run_part(name: str, gpu: Gpu, parameters: Parameters, scale: Scale, figures: Figures) -> Any:
    """One of PARTS; `figures` holds what earlier ones found."""
    match name:
        case "suite":
            return whole.suite()
        case "identical":
            return worker.identical(gpu, parameters, scale)
        case "ceilings":
            return worker.ceilings(gpu, scale)
        case "layers":
            known = figures.get("ceilings") or worker.ceilings(gpu, scale)
            return worker.layers(gpu, parameters, scale, known["int8_ops_per_s"])
        case "throughput":
            return worker.throughput(gpu, parameters, scale)
        case "launch":
            return launch(gpu, parameters, scale)
        case "owner":
            return rings(gpu, parameters, scale)
        case "preparing":
            return whole.preparing(gpu, parameters, scale)
        case "step":
            sequence = str(min(scale.tokens, 512))
            tokens = str(scale.tokens)
            return whole.step(["--steps", "5", "--tokens", tokens, "--sequence", sequence])
        case _:
            return whole.peer(2048, 2048)


def rows(f: Figures) -> list[tuple[str, str, str, str]]:
    """(measure, bar, aim, got) of every part that ran."""
    table = []

    def row(measure: str, bar: str, aim: str, got: str) -> None:
        table.append((measure, bar, aim, got))

    if "suite" in f:
        row("correctness suite on the device", "passes", "", f["suite"]["summary"])
    if "identical" in f:
        found = f["identical"]
        same = found["compared"] - len(found["different"])
        row("worker results, GPU vs CPU", "bit-identical", "", f"{same} of {found['compared']}")
    for layer in f.get("layers", []):
        name = f"{layer['in']} -> {layer['out']}, {layer['tokens']} tokens"
        row(f"HE linear / clear bf16, {name}", "<= 2.2", "<= 1.6", f"{layer['he_over_bf16']:.2f}")
        row(f"of the int8 ceiling, {name}", ">= 55%", ">= 80%", f"{layer['of_int8_ceiling']:.0%}")
    if "throughput" in f:
        row("worker, all linears of a step", ">= 30,000 tokens/s", ">= 60,000",
            f"{f['throughput']['tokens_per_s']:,.0f}")  # fmt: skip
    if "owner" in f:
        row("owner's ring work per token", "<= 40 us", "<= 15 us",
            f"{f['owner'][-1]['ring_us_per_token']:.1f} us")  # fmt: skip
        row("the same with the check of answers", "report", "",
            f"{f['owner'][-1]['checked_us_per_token']:.1f} us")  # fmt: skip
    if "preparing" in f:
        row("hints + quantisation", "<= 20 s", "<= 5 s", f"{f['preparing']['seconds']:.1f} s")
    if "step" in f:
        row("private step / clear bf16 step", "<= 6", "<= 3",
            f"{f['step']['private_over_clear']:.2f}")  # fmt: skip
    if "peer" in f:
        ours = [x for x in f.get("layers", []) if (x["in"], x["out"]) == (2048, 2048)]
        theirs = f["peer"].get("seconds_per_token")
        got = f["peer"].get("skipped", "")
        if theirs and ours:
            got = f"{theirs / (ours[0]['fused_ms'] / 1e3 / ours[0]['tokens']):,.0f} times"
        row("published peer's time per token / ours, 2048 -> 2048", "report", ">= 10,000", got)
    return table


def print_table(f: Figures) -> None:
    """What was measured against what was asked for."""
    print(f"\n{f['gpu']}")
    for measure, bar, aim, got in rows(f):
        print(f"{measure:<52} {bar:>20} {aim:>12} {got:>16}")
    for name, error in f["failed"].items():
        print(f"\n{name} failed:\n{error}")


def measure(
    gpu: Gpu,
    parameters: Parameters,
    scale: Scale,
    wanted: Sequence[str],
    save: Callable[[Figures], None],
    known: Figures | None = None,
) -> Figures:
    """Run the wanted parts, in order; one that fails is recorded, and the others run.

    known  figures of other parts, from an earlier run of the same commit
    """
    figures: Figures = {"gpu": gpu.name, "preset": parameters.name, "failed": {}, "seconds": {}}
    figures |= known or {}
    for name in wanted:
        print(f"{name} ...", flush=True)
        start_s = time.perf_counter()
        figures["failed"].pop(name, None)
        try:
            figures[name] = run_part(name, gpu, parameters, scale, figures)
        except Exception:  # a part that fails must not take the others' figures with it
            figures.pop(name, None)
            figures["failed"][name] = traceback.format_exc(limit=-4)
        figures["seconds"][name] = round(time.perf_counter() - start_s, 1)
        if gpu.device.type == "cuda":
            torch.cuda.empty_cache()
        save(figures)
    return figures


def known_figures(path: Path | None, gpu: Gpu, parameters: Parameters) -> Figures:
    """What FILE holds of the same commit, GPU and preset; nothing when it is of another."""
    if path is None or not path.exists():
        return {}
    found: Figures = json.loads(path.read_text())
    origin = found.pop("origin", {})
    same = (found.get("gpu"), found.get("preset")) == (gpu.name, parameters.name)
    return found if same and origin.get("commit") == commit() else {}


def all_well(f: Figures) -> bool:
    """Whether nothing failed, and nothing computed was wrong."""
    right = f.get("suite", {}).get("passed", True) and not f.get("identical", {}).get("different")
    return right and not f["failed"]


def write_profile(path: Path, gpu: Gpu, figures: Figures, parameters: Parameters) -> None:
    """The simulator's profile of this GPU. Exits when a part that it needs is missing."""
    missing = [name for name in _OF_A_PROFILE if name not in figures]
    if missing:
        sys.exit(f"error: a device profile needs the parts {', '.join(missing)} as well")
    where = f"{gpu.name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    made = profile(path.stem, where, figures, parameters, full())
    made.save(path)
    print(f"device profile written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", default="standard", choices=sorted(PRESETS))
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"run only some of {', '.join(PARTS)}; what FILE holds of the others is kept when it "
        "is of the same commit",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a device profile")
    record.add_json_option(parser)
    args = parser.parse_args()
    with clean_exit():
        gpu = find_gpu()
        parameters = preset(args.preset)
        wanted = [name for name in PARTS if name in args.parts]
        known = known_figures(args.json, gpu, parameters)
        figures = measure(
            gpu, parameters, full(), wanted,
            lambda f: record.write(args.json, f, quiet=True), known,
        )  # fmt: skip
        print_table(figures)
        record.write(args.json, figures)
        if args.profile:
            write_profile(args.profile, gpu, figures, parameters)
    sys.exit(0 if all_well(figures) else 1)


if __name__ == "__main__":
    main()
