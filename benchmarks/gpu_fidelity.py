"""Does the simulator tell the truth of a GPU? A recorded training step against its simulated twin.

    python -m benchmarks.gpu_fidelity --figures benchmarks/results/gpu-h100.json --gpu h100 h200

Needs no GPU: the real side is what `python -m benchmarks.gpu --json FILE` recorded, one lane with
owner and worker on one device; the simulated side is the same step on that device's profile, or
on another's, to see how far off an assumption is. With one lane on one device nothing overlaps, so
both sides are sums of the same parts, set side by side:

    layers     the owner's own: attention, head, adapters, loss, optimiser; of the real ones, what
               is over before the lane waits for a remote linear
    cipher     encrypting, decrypting, checking
    products   the worker's
    rest       of the real lane's waiting: layers that the device had yet to end, hand-over between
               threads, a device without work
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

from backends.files import read_bounded
from backends.options import Parser, place
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.whatif.knobs import profile_of
from scenarios.whatif.setting import MENDABLE
from sim.device import DeviceProfile
from sim.hosts import Costs
from sim.models import MODELS
from sim.workload import Linear, Workload, trace_step
from sim.world import WorldConfig, simulate

_FIGURES_BYTES_MAX = 1 << 26
_NUMBERS = ("private_step_s", "remote_wait_s", "owner_s", "worker_s")
_LONGEST_S = 1e6
_TOKENS_MAX = 1 << 20


def recorded(path: Path) -> tuple[dict[str, Any], Any]:
    """(the training step, the origin) in a file of `benchmarks.gpu`.

    Raises OSError when it cannot be read, ValueError when it holds no such step.
    """
    try:
        figures = json.loads(read_bounded(path, _FIGURES_BYTES_MAX))
        if "step" not in figures:
            raise ValueError("there is none")
        step, origin = dict(figures["step"]), figures["origin"]
        numbers = [step[name] for name in _NUMBERS]
        tokens, _, _ = step["tokens_per_step"], step["lanes"], step["lm_head"]
        if not all(isinstance(n, int | float) and 0 < n < _LONGEST_S for n in numbers):
            raise ValueError(f"{', '.join(_NUMBERS)} are seconds above 0")
        if type(tokens) is not int or not 2 <= tokens <= _TOKENS_MAX:
            raise ValueError(f"tokens_per_step is a whole number from 2 to {_TOKENS_MAX}")
        sequence_of(step["arguments"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} holds no training step of benchmarks.gpu: {why}") from error
    return step, origin


def sequence_of(arguments: str) -> int:
    """The tokens of a sequence in the recorded step's command line."""
    words = arguments.split()
    return int(words[words.index("--sequence") + 1])


def real_parts(step: dict[str, Any]) -> dict[str, float]:
    """Seconds of a recorded step of one lane by part."""
    waited_s, cipher_s, products_s = (step[f"{x}_s"] for x in ("remote_wait", "owner", "worker"))
    return {
        "layers": step["private_step_s"] - waited_s,
        "cipher": cipher_s,
        "products": products_s,
        "rest": waited_s - cipher_s - products_s,
    }


def simulated_parts(workload: Workload, profile: DeviceProfile) -> dict[str, float]:
    """The same of a simulated step; the simulator knows of no rest."""
    costs = Costs(workload, 1, profile, profile)
    asked = [item.matrix for item in workload.lane if isinstance(item, Linear)]
    return {
        "layers": sum(c.seconds for c in costs.layers if c) + costs.update.seconds,
        "cipher": sum(costs.encrypt[m].seconds + costs.decrypt[m].seconds for m in asked),
        "products": sum(costs.multiply(m, workload.tokens).seconds for m in asked),
        "rest": 0.0,
    }


def launches(workload: Workload) -> float:
    """Of the owner's own layers in one step, the update's included."""
    parts = [p for item in workload.lane if not isinstance(item, Linear) for p in item.parts]
    return sum(part.launches for part in parts) + workload.update.launches


def compare(step: dict[str, Any], profile: DeviceProfile) -> dict[str, Any]:
    """The figures. `error` is signed: above 0, the simulator is too slow.

    local_launch_s_at_most  seconds of a launch of the owner's layers, if layers and rest were
                            launches and nothing else
    """
    if step["lanes"] != 1 or step["lm_head"] != "local":
        raise ValueError("the recorded step has several lanes or a remote head: parts overlap")
    workload = trace_step(
        MODELS["llama-3.2-1b"](), step["tokens_per_step"], sequence_of(step["arguments"]),
        preset="exact", dtype=torch.bfloat16,
    )  # fmt: skip
    world = WorldConfig(
        workload, profile, profile, in_process=True, steps=2, warmup=1, record=False
    )
    simulated_s = median(taken.duration_s for taken in simulate(world).steps)
    real = real_parts(step)
    count = launches(workload)
    return {
        "profile": profile.name,
        "kind": profile.origin.kind,
        "tokens": workload.tokens,
        "requests": len(workload.linears),
        "real_s": step["private_step_s"],
        "simulated_s": simulated_s,
        "error": simulated_s / step["private_step_s"] - 1,
        "real_parts_s": real,
        "simulated_parts_s": simulated_parts(workload, profile),
        "local_launches": count,
        "local_launch_s": profile.overhead_s["local"],
        "local_launch_s_at_most": (real["layers"] + real["rest"]) / count,
    }


def print_table(f: dict[str, Any]) -> None:
    """Both sides, part by part."""
    print(f"{f['profile']}, one step of {f['tokens']} tokens, {f['requests']} requests")
    print(f"{'':<10}{'real':>12}{'simulated':>12}")
    for name, seconds in f["real_parts_s"].items():
        print(f"{name:<10}{1e3 * seconds:>9.1f} ms{1e3 * f['simulated_parts_s'][name]:>9.1f} ms")
    print(f"{'step':<10}{1e3 * f['real_s']:>9.1f} ms{1e3 * f['simulated_s']:>9.1f} ms")
    print(f"error {f['error']:+.1%}")


def main() -> None:
    parser = Parser(__doc__, "benchmarks.gpu_fidelity")
    parser.add_argument("--figures", type=place, required=True, metavar="FILE",
        help="what `python -m benchmarks.gpu` wrote, the part `step` among it")  # fmt: skip
    parser.add_argument("--gpu", required=True, nargs="+", metavar="PROFILE",
        help="device profiles by name, or JSON files")  # fmt: skip
    record.add_json_option(parser)
    args = parser.parse()
    with clean_exit(*MENDABLE, OSError, ValueError):
        step, origin = recorded(args.figures)
        cases = [compare(step, profile_of(name)) for name in args.gpu]
    for case in cases:
        print_table(case)
    record.write(args.json, {"cases": cases, "measured": origin})


if __name__ == "__main__":
    main()
