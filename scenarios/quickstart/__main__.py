"""Fine-tune a small Llama privately on a codebase it has never seen, and see that it learned.

    python -m scenarios.quickstart            (what `make quickstart` runs)

Plays both roles in this process: the *owner* has the private text, here the source of the
algorithms in the installed `networkx` package; the *worker* has the public weights of a small
Llama that comes with this repository and sees only ciphertexts. The same fine-tuning is then run
in clear beside it, from the same seed, on the same int8 base weights.

Expected result, in under four minutes on two cores: the held-out loss falls by more than 20 %,
private and clear agree within 0.5 %, and runs/quickstart/report.html shows it all.
Interrupt it whenever you like: the same command goes on with the step after the last one saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from backends.defaults import SCHEMES
from backends.options import LEARNING_RATE, RANK, SEED, STEPS, Parser, Whole
from backends.places import output_directory, output_file
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.options import add_preparation_options, add_worker_options, modes_with_workers

MODES = modes_with_workers(
    (
        "--steps", "--lanes", "--learning-rate", "--rank", "--seed", "--held-out", "--preset",
        "--owner-tag", "--cache", "--out", "--fresh", "--trace", "--worker", "--kernel",
        "--json", "--scheme",
    )
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.quickstart", MODES)
    add = parser.add_argument
    add("--steps", type=STEPS, default=120, help="optimiser steps of 4 x 256 tokens (120)")
    add("--lanes", type=Whole(1, 4), default=1, choices=(1, 2, 4),
        help="micro-batches in flight (1)")  # fmt: skip
    add("--learning-rate", type=LEARNING_RATE, default=4e-3, help="peak learning rate (4e-3)")
    add("--rank", type=RANK, default=16, help="LoRA rank (16); alpha is twice that")
    add("--seed", type=SEED, default=0,
        help="seed of adapters and data order (0), never of secrets")  # fmt: skip
    add("--held-out", type=Whole(1, 10_000), default=32,
        help="held-out sequences of 256 tokens (32)")  # fmt: skip
    add_preparation_options(parser)
    add("--out", type=output_directory, default="runs/quickstart",
        help="report, adapter, checkpoints")  # fmt: skip
    add("--fresh", action="store_true", help="start over instead of resuming")
    add("--trace", type=output_file, metavar="FILE",
        help="write who did what when in the private run, for ui.perfetto.dev")  # fmt: skip
    add("--scheme", default=SCHEMES[0], choices=SCHEMES,
        help="cipher: this project's own (mlwe), or OpenFHE's to compare with, which takes minutes "
        "a step; see docs/extend.md")  # fmt: skip
    add_worker_options(parser)
    add_kernel_option(parser)
    record.add_json_option(parser)
    return parser.parse(arguments)


def main() -> None:
    args = parse()
    from scenarios.quickstart.run import Quickstart  # these take seconds to load
    from scenarios.session import one_run

    with clean_exit():
        use_kernel(args.kernel)
        with one_run(args.out):
            run = Quickstart(args)
            figures = run.run()
        record.write(args.json, figures)
        run.write_trace()


if __name__ == "__main__":
    main()
