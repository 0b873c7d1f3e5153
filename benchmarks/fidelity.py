"""Does the simulator tell the truth? Simulated against real step times on this machine.

    python -m benchmarks.fidelity --json benchmarks/results/fidelity.json
    python -m benchmarks.fidelity --network --json benchmarks/results/fidelity-network.json
    python -m benchmarks.fidelity --load --json benchmarks/results/fidelity-load.json

The real side trains through the in-process driver: the quickstart's model, and two layers of the
Llama-3.2-1B's width with random weights, with 1, 2 and 4 lanes of 64 and 256 tokens. The
simulated side knows the models' configs and a device profile, which is calibrated in the same run
from measurements of other models (see `sim.calibrate`). Calibration and real steps take turns,
round after round, so that a machine that changes speed changes both, and on both sides the faster
half of what nothing else disturbed counts; the plain median of all steps is recorded beside it.

Rounds go on until every case has enough steps during which nothing else ran, or the time is up.

With --load, 2 to 16 owners at once ask a worker of one core, with ciphertexts made before (two
cores; ten minutes). See `benchmarks/fidelity_load.py`.

With --network, owner and worker are two processes in network namespaces of their own, joined by a
line of 100 Mb/s or 1 Gb/s and a round trip of 1, 20 or 80 ms, over TLS (root; Linux with tun and a
C compiler; a quarter of an hour). See `benchmarks/fidelity_network.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PretrainedConfig

from backends.he.params import preset
from backends.nn.adapters import add_lora
from backends.nn.base import open_base
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import Base, RandomBase
from backends.nn.trainer import TrainConfig, Trainer
from backends.options import ALL, SECONDS, TIMES, Modes, Number, Parser, place
from benchmarks import fidelity_load, fidelity_network
from benchmarks.fidelity_network import NoLineError
from benchmarks.steps import Steps
from scenarios import record
from scenarios.cli import clean_exit, use_kernel
from scenarios.options import TINY_LLAMA, add_cache_option
from scenarios.preparation import prepared_for
from scenarios.session import private_session
from sim.calibration import Calibration, Samples, explanations, report
from sim.device import DeviceProfile, ProfileError
from sim.models import MODELS
from sim.workload import trace_step
from sim.world import WorldConfig, simulate

LANES = (1, 2, 4)
TOKENS = (64, 256)
RANK = 16
PRESET = "exact"
"""Of the cipher, in both worlds; the simulator is calibrated with it."""
ENOUGH = 5
"""Undisturbed steps of every case that end the rounds."""

MODES = Modes(
    {
        "here": "a run in this process (without --network)", "network": "--network",
        "load": "--load",
    },
    lambda args: ("network",) if args.network else ("load",) if args.load else ("here",),
    {
        "--minutes": ("here",), "--network": ("network", "here"), "--load": ("load", "here"),
        "--cache": ("here", "network"), "--json": ALL, "--profile": ("network", "load"),
        **dict.fromkeys(("--rounds", "--seconds", "--patience", "--congestion"), ("network",)),
    },
)  # fmt: skip


def narrowed(config: PretrainedConfig, layers: int, vocabulary: int) -> PretrainedConfig:
    """The same width, fewer layers and tokens: a stack that fits a benchmark."""
    stack = copy.deepcopy(config)
    stack.num_hidden_layers, stack.vocab_size = layers, vocabulary
    stack.bos_token_id = stack.eos_token_id = None
    return stack


def models() -> dict[str, Base]:
    """What is trained, by name."""
    stack = narrowed(MODELS["llama-3.2-1b"](), layers=2, vocabulary=4096)
    return {
        "quickstart": open_base(TINY_LLAMA),
        "1b-width": RandomBase(stack, 0),
    }


@dataclass
class Case:
    """One real training beside its simulated twin."""

    name: str
    config: PretrainedConfig
    lanes: int
    tokens: int
    steps: Steps
    samples: Samples = field(default_factory=Samples)

    def simulated_s(self, profile: DeviceProfile) -> float:
        """The step time the simulator predicts."""
        workload = trace_step(self.config, self.tokens, lora_rank=RANK, preset=PRESET)
        world = WorldConfig(
            workload, profile, profile, lanes=self.lanes, in_process=True, steps=2, warmup=1,
            record=False,
        )  # fmt: skip
        return median(step.duration_s for step in simulate(world).steps)


@contextmanager
def real_cases(cache: Path) -> Iterator[list[Case]]:
    """All trainings, connected and warmed up."""
    cases = []
    with ExitStack() as stack:
        for name, base in models().items():
            for lanes in LANES:
                config, skeleton = base.config, build_skeleton(base)
                prepared, _ = prepared_for(skeleton, preset(PRESET), cache)
                model = add_lora(skeleton.model, RANK, 2 * RANK, 0)
                stack.enter_context(private_session(skeleton, prepared, lanes))
                for tokens in TOKENS:
                    generator = torch.Generator().manual_seed(0)
                    text = torch.randint(config.vocab_size, (64, tokens), generator=generator)
                    training = TrainConfig(
                        steps=1_000_000, batch=lanes, micro_batch=1, learning_rate=1e-4
                    )
                    trainer = Trainer(
                        model, text, training, lanes, forget_lane=skeleton.remote.forget_lane
                    )
                    cases.append(Case(name, config, lanes, tokens, Steps(trainer)))
        yield cases


def compare(cases: list[Case], profile: DeviceProfile) -> dict[str, Any]:
    """The figures: every case, the median and the worst error."""
    rows = []
    for case in cases:
        real_s, simulated_s = case.samples.typical_s, case.simulated_s(profile)
        rows.append(
            {
                "name": case.name,
                "lanes": case.lanes,
                "tokens": case.tokens,
                "real_s": real_s,
                "simulated_s": simulated_s,
                "error": abs(simulated_s / real_s - 1),
                "real_median_s": median(seconds for seconds, _ in case.samples.times),
                "steps": len(case.samples.times),
                "steps_undisturbed": case.samples.undisturbed,
            }
        )
    errors = [row["error"] for row in rows]
    return {"cases": rows, "median_error": median(errors), "worst_error": max(errors)}


def print_table(figures: dict[str, Any]) -> None:
    """The cases as a table."""
    print(f"{'model':<12}{'lanes':>6}{'tokens':>8}{'real':>12}{'simulated':>12}{'error':>8}")
    for row in figures["cases"]:
        print(
            f"{row['name']:<12}{row['lanes']:>6}{row['tokens']:>8}{1e3 * row['real_s']:>9.0f} ms"
            f"{1e3 * row['simulated_s']:>9.0f} ms{row['simulated_s'] / row['real_s'] - 1:>+8.0%}"
        )
    print(f"median error {figures['median_error']:.1%}, worst {figures['worst_error']:.1%}")


def measure(cases: list[Case], calibration: Calibration, minutes: float) -> None:
    """Rounds of calibration and of one real step of every case."""
    start = time.perf_counter()
    while time.perf_counter() - start < 60 * minutes:
        calibration.round()
        for case in cases:
            case.samples.add(*calibration.timed(case.steps.take))
        if all(case.samples.undisturbed >= ENOUGH for case in cases):
            return


def main() -> None:
    parser = Parser(__doc__, "benchmarks.fidelity", MODES)
    parser.add_argument("--minutes", type=Number(0.01, 1440), default=6.0,
        help="time limit of the rounds (6)")  # fmt: skip
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--network", action="store_true", help="over real lines, see above")
    ways.add_argument("--load", action="store_true", help="a worker with many owners, see above")
    group = parser.add_argument_group("with --network")
    group.add_argument("--rounds", type=TIMES, default=1, help="visits to every line (1)")
    group.add_argument("--seconds", type=SECONDS, default=20.0,
        help="of steps a cell and visit (20)")  # fmt: skip
    group.add_argument("--patience", type=SECONDS, default=60.0,
        help="seconds that a cell waits for other processes to end (60)")  # fmt: skip
    group.add_argument("--congestion", default="cubic", metavar="NAME",
        help="TCP's congestion control at both ends (cubic, as most systems have)")  # fmt: skip
    parser.add_argument("--profile", type=place, metavar="FILE",
        help="with --network or --load: one core's profile, of an earlier `taskset -c 0 python -m "
        "sim.calibrate --out FILE`",
    )  # fmt: skip
    add_cache_option(parser)
    record.add_json_option(parser)
    args = parser.parse()
    if args.network:
        with clean_exit(NoLineError, ProfileError):
            use_kernel(None)
            fidelity_network.run(args)
        return
    if args.load:
        with clean_exit(NoLineError, ProfileError):
            fidelity_load.run(args)
        return
    with clean_exit():
        kernel = use_kernel(None)
    patience_s = 30 * args.minutes
    with real_cases(args.cache) as cases, Calibration(patience_s) as calibration:
        measure(cases, calibration, args.minutes)
    profile = calibration.profile("this-machine")
    explained = explanations(calibration.cases(), profile)
    report(profile, explained)
    figures = compare(cases, profile)
    print_table(figures)
    figures["disturbed"] = calibration.disturbed / calibration.measured
    print(f"other processes were busy during {figures['disturbed']:.0%} of the measurements")
    figures["kernel"] = kernel.name
    record.write(args.json, figures | {"calibration": explained, "profile": profile.facts()})


if __name__ == "__main__":
    main()
