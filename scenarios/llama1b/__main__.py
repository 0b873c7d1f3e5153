"""Fine-tune a model of the Llama-3.2-1B shape privately, for real or simulated.

    python -m scenarios.llama1b                        simulated: an H200 behind a 1 Gb/s line
    python -m scenarios.llama1b --network home --lanes 8 --gpu l4
    python -m scenarios.llama1b --real-cpu --weights DIR_OR_HUB_ID --data DIR_OR_FILE
    python -m scenarios.llama1b --preview --weights DIR_OR_HUB_ID --data DIR_OR_FILE
    python -m scenarios.llama1b --real-cpu --steps 2 --tokens 256 --compare-clear --json F
    python -m scenarios.llama1b --real-gpu --steps 5 --tokens 2048 --sequence 512 --compare-clear

Without a flag nothing is computed: the protocol runs on a modelled GPU behind a modelled network,
and the run says how fast fine-tuning would be and what it would wait for, with a picture of one
step (runs/llama1b-sim/timeline.png) and a trace for ui.perfetto.dev. It takes seconds. What was
measured and what is only a data sheet's figure is printed with it.

With --real-cpu the owner's part (embeddings, attention, adapters, loss, optimiser) and the
worker's part (every frozen linear, forward and backward, on ciphertexts) run in this process,
with encoded bytes between them. Without --weights the model has the full 1B shape and seeded
random weights: good for measuring, useless for learning, and it says so. The first run prepares
the public set-up (int8 weights and hints, about 4.1 GB on disk); it is cached, and can be
interrupted.

With --real-gpu both parts run on this machine's first NVIDIA GPU (compute capability 8.0 or newer,
`pip install -e ".[gpu]"`), the owner's model in bf16, and ciphertexts stay in its memory.
On an H100 a private step of 2,048 tokens takes 0.37 s, 4.4 times the same step in clear bf16; no
other GPU has been measured. `python -m benchmarks.gpu` checks and measures all of it on yours.

Expected on two cores with AVX2 or better: preparation in under 4 minutes, a private step of 256
tokens in about the time of the same step in clear fp32, and about 3 MB of traffic per token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from backends.defaults import FLOATS
from backends.options import (
    ALL,
    LANES,
    LEARNING_RATE,
    RANK,
    SEED,
    SEQUENCE,
    STEPS,
    TOKENS,
    Modes,
    Parser,
    place,
)
from backends.places import output_directory, output_file
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.llama1b import world
from scenarios.options import (
    DP_OPTIONS,
    add_dp_options,
    add_loss_option,
    add_model_options,
    add_worker_options,
)
from scenarios.whatif.knobs import SettingError
from sim.device import ProfileError


def _active(args: argparse.Namespace) -> set[str]:
    """The modes that a command line asks for."""
    if args.preview:
        return {"real"}
    if not (args.real_cpu or args.real_gpu):
        return {"simulated"}
    found = {"real", "cpu" if args.real_cpu else "gpu"}
    if not args.compare_clear:
        found.add("training")
    return found | {"elsewhere"} if args.worker else found


MODES = Modes(
    {
        "simulated": "a simulated run (neither --real-cpu nor --real-gpu)",
        "real": "--real-cpu, --real-gpu and --preview",
        "cpu": "--real-cpu",
        "gpu": "--real-gpu",
        "training": "a real run without --compare-clear",
        "elsewhere": "the line to a --worker",
    },
    _active,
    {
        **dict.fromkeys(
            (
                "--real-cpu", "--real-gpu", "--steps", "--tokens", "--sequence", "--lanes",
                "--lm-head", "--seed", "--out", "--json", "--preview",
            ),
            ALL,
        ),
        **dict.fromkeys(
            (
                "--weights", "--preset", "--owner-tag", "--cache", "--data", "--loss-on", "--rank",
                "--learning-rate", "--least-remote", "--compare-clear", "--trace",
                "--clear-peer", "--worker",
            ),
            ("real",),
        ),
        **dict.fromkeys(("--checkpoint-every", "--fresh", *DP_OPTIONS), ("training",)),
        **dict.fromkeys(("--network", *world.OPTIONS), ("simulated",)),
        "--kernel": ("cpu",),
        "--host-frames": ("gpu",),
        "--tls": ("elsewhere",),
    },
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.llama1b", MODES)
    add = parser.add_argument
    add("--real-cpu", action="store_true", help="run for real on this machine's CPU")
    add("--real-gpu", action="store_true",
        help="run for real on one NVIDIA GPU, owner and worker")  # fmt: skip
    add("--host-frames", action="store_true",
        help="on a GPU: ciphertexts go through host memory, as to a worker elsewhere")  # fmt: skip
    add_model_options(parser)
    add("--data", type=place, metavar="FILE|DIR",
        help="private text: a file, or a folder and all below (docs/texts.md)")  # fmt: skip
    add("--preview", action="store_true",
        help="only show what would be read, and three samples")  # fmt: skip
    add_loss_option(parser)
    add("--steps", type=STEPS, help="optimiser steps (10; simulated: 2)")
    add("--tokens", type=TOKENS, default=256, help="tokens of one lane's micro-batch (256)")
    add("--sequence", type=SEQUENCE, default=256, help="tokens of a sequence (256)")
    add("--lanes", type=LANES, help="micro-batches of a step, all in flight (1; simulated: 4)")
    add("--rank", type=RANK, default=16, help="LoRA rank (16); alpha is twice that")
    add("--learning-rate", type=LEARNING_RATE, default=2e-4, help="peak learning rate (2e-4)")
    add("--seed", type=SEED, default=0, help="seed of adapters, data order and random weights")
    add("--compare-clear", action="store_true",
        help="take turns with the same training in clear, in fp32 or bf16, whichever is faster",
    )  # fmt: skip
    add_dp_options(parser)
    add("--checkpoint-every", type=STEPS, default=25, help="steps between checkpoints (25)")
    add("--out", type=output_directory,
        help="adapter and checkpoints (runs/llama1b); simulated: picture and trace "
        "(runs/llama1b-sim)")  # fmt: skip
    add("--fresh", action="store_true", help="start over instead of resuming")
    add("--trace", type=output_file, metavar="FILE",
        help="who did what when, for ui.perfetto.dev (simulated: always, in --out)")  # fmt: skip
    add("--clear-peer", choices=FLOATS, help=argparse.SUPPRESS)
    add_worker_options(parser)
    add_kernel_option(parser)
    record.add_json_option(parser)
    world.add_options(parser)
    args = parser.parse(argv)
    real = args.real_cpu or args.real_gpu or args.preview
    args.steps = args.steps if args.steps is not None else 10 if real else 2
    args.lanes = args.lanes if args.lanes is not None else 1 if real else 4
    args.out = args.out or Path("runs/llama1b" if real else "runs/llama1b-sim")
    if args.real_cpu and args.real_gpu:
        parser.error("--real-cpu or --real-gpu, not both")
    return args


def asked(argv: list[str]) -> argparse.Namespace:
    """The command line, and of a simulated run its `setting`.

    Raises SettingError, ProfileError.
    """
    args = parse(argv)
    if not (args.real_cpu or args.real_gpu or args.preview):
        args.setting = world.setting_from(args)
        output_directory(args.out)
    return args


def main() -> None:
    argv = sys.argv[1:]
    with clean_exit(SettingError, ProfileError):
        args = asked(argv)
    if args.preview or args.real_cpu or args.real_gpu:
        _really(args, argv)
        return
    from scenarios import simulated  # which takes seconds, as what a real run needs does

    with clean_exit(*simulated.MENDABLE):
        figures = simulated.run(args)
        simulated.print_report(figures)
        simulated.print_assumptions(figures)
        record.write(args.json, figures)


def _really(args: argparse.Namespace, argv: list[str]) -> None:
    from backends.net.owner import RemoteLinearError
    from scenarios.llama1b import run
    from scenarios.preparation import chosen_base
    from scenarios.session import one_run
    from scenarios.texts import preview

    with clean_exit(RemoteLinearError):
        if args.preview:
            preview(args, chosen_base(args))
        elif args.clear_peer:
            run.clear_peer(args)
        else:
            use_kernel(args.kernel)
            with one_run(args.out):
                real = run.Run(args)
                figures = real.run(argv)
            run.print_report(figures)
            record.write(args.json, figures)
            real.write_trace(figures)


if __name__ == "__main__":
    main()
