"""What `python -m scenarios.finetune` can be asked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from backends.defaults import HELD_OUT
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
    Number,
    Parser,
    Whole,
    place,
)
from backends.places import output_directory, output_file
from scenarios import record
from scenarios.cli import add_kernel_option
from scenarios.finetune.config import with_config
from scenarios.options import (
    DP_OPTIONS,
    add_dp_options,
    add_head_options,
    add_loss_option,
    add_preparation_options,
    add_worker_options,
    weights_text,
)

STEPS_DEFAULT = 100
_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
_NAMES_MOST = 4096  # characters


def _active(args: argparse.Namespace) -> set[str]:
    found = set() if args.train_on_all else {"split"}
    return found | {"elsewhere"} if args.worker else found


MODES = Modes(
    {
        "elsewhere": "a run with --worker",
        "split": "a run without --train-on-all",
    },
    _active,
    {
        "--tls": ("elsewhere",),
        **dict.fromkeys(("--held-out", "--evaluate-every", "--evaluate-on"), ("split",)),
        **dict.fromkeys(
            (
                "--model", "--weights", "--data", "--config", "--out", "--preview", "--dry-run",
                "--yes", "--fresh", "--epochs", "--steps", "--batch", "--micro-batch", "--lanes",
                "--sequence", "--learning-rate", "--seed", "--rank", "--alpha", "--targets",
                "--loss-on", "--train-on-all", "--sample", "--sample-tokens", "--lm-head",
                "--least-remote", "--preset", "--owner-tag", "--cache", "--checkpoint-every",
                "--trace", "--worker", "--gpu", "--kernel", "--json", *DP_OPTIONS,
            ),
            ALL,
        ),
    },
)  # fmt: skip


def _targets(text: str) -> tuple[str, ...]:
    """Names of modules, or the last parts of theirs."""
    if len(text) > _NAMES_MOST or not _NAMES.fullmatch(text):
        raise argparse.ArgumentTypeError("names of modules with commas between: q_proj,v_proj")
    return tuple(dict.fromkeys(text.split(",")))


def add_options(parser: Parser) -> None:
    """All of them."""
    add = parser.add_argument
    add("--model", "--weights", dest="weights", type=weights_text, metavar="DIR|FILE|ID",
        help="what to fine-tune: a checkpoint's directory, a GGUF file, or an id of the hub",
    )  # fmt: skip
    add("--data", type=place, metavar="FILE|DIR",
        help="private text or chats: a file, or a folder and all below (docs/texts.md)",
    )  # fmt: skip
    add("--config", type=place, metavar="FILE",
        help="YAML with `name: value` lines, named as these options; what is typed wins",
    )  # fmt: skip
    add("--out", type=output_directory, default="runs/finetune",
        help="adapter, report and checkpoints (runs/finetune)")  # fmt: skip
    add("--preview", action="store_true",
        help="only show what would be read, and three samples")  # fmt: skip
    add("--dry-run", action="store_true",
        help="only say what the run would take; with --worker the model is prepared and the line "
        "probed for it")  # fmt: skip
    add("--yes", action="store_true", help="do not ask on a terminal whether to start")
    add("--fresh", action="store_true", help="start over instead of resuming")
    _add_training(parser)
    _add_held_out(parser)
    add_dp_options(parser)
    add_head_options(parser)
    add_preparation_options(parser)
    add("--checkpoint-every", type=STEPS, default=25, help="steps between checkpoints (25)")
    add("--trace", type=output_file, metavar="FILE", help="who did what when, for ui.perfetto.dev")
    add("--gpu", action="store_true",
        help="compute on the first NVIDIA GPU, in bf16, instead of on this CPU")  # fmt: skip
    add_worker_options(parser)
    add_kernel_option(parser)
    record.add_json_option(parser)


def _add_training(parser: Parser) -> None:
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=STEPS, help=f"optimiser steps ({STEPS_DEFAULT})")
    length.add_argument(
        "--epochs", type=Number(0.001, 10_000),
        help="times through the data, instead of --steps: workers, who can count steps, then learn "
        "about how much text there is",
    )  # fmt: skip
    add("--batch", type=Whole(1, 4096), default=4, help="sequences of a step (4)")
    add("--micro-batch", type=Whole(1, 4096),
        help="sequences of one pass (as many as the lanes leave, and a worker takes)",
    )  # fmt: skip
    add("--lanes", type=LANES, default=1,
        help="passes in flight at once: they hide a line's latency (1)")  # fmt: skip
    add("--sequence", type=SEQUENCE, default=512, help="tokens of a sequence (512)")
    add("--learning-rate", type=LEARNING_RATE, default=2e-4, help="peak learning rate (2e-4)")
    add("--seed", type=SEED, default=0,
        help="seed of adapters and data order (0), never of secrets")  # fmt: skip
    add("--rank", type=RANK, default=16, help="LoRA rank (16)")
    add("--alpha", type=Whole(1, 1 << 16), help="LoRA alpha (twice the rank)")
    add("--targets", type=_targets, metavar="NAMES",
        help="modules to adapt, by the last parts of their names, as q_proj,v_proj (all linears "
        "that workers compute)")  # fmt: skip
    add_loss_option(parser)


def _add_held_out(parser: Parser) -> None:
    add = parser.add_argument
    add("--held-out", type=Number(0.001, 0.5), default=HELD_OUT, metavar="SHARE",
        help=f"of the documents, not trained on ({HELD_OUT:g})")  # fmt: skip
    add("--train-on-all", action="store_true", help="hold nothing out: no held-out loss")
    add("--evaluate-every", type=STEPS, default=25,
        help="steps between held-out losses, beside those at start and end (25)")  # fmt: skip
    add("--evaluate-on", type=Whole(1, 10_000), default=16,
        help="sequences of each held-out loss: so many passes' worth is asked of workers, whatever "
        "is held out (16)")  # fmt: skip
    add("--sample", action="append", default=[], metavar="TEXT",
        help="a prompt that base and tuned model complete for the report (several times; two "
        "beginnings of held-out documents without)")  # fmt: skip
    add("--sample-tokens", type=Whole(0, TOKENS.most), default=32,
        help="tokens of each completion; 0 for no samples (32)")  # fmt: skip


def parsed(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """A command line, with what its --config says. Ends the process when it cannot be.

    parser  an empty one, which gets all options
    """
    add_options(parser)
    args = parser.parse(with_config(words, parser))
    for name, value in (("--model", args.weights), ("--data", args.data)):
        if value is None:
            parser.error(f"{name} is needed, here or in the file of --config")
    wrong = _settle_passes(args)
    if wrong is not None:
        parser.error(wrong)
    if args.steps is None and args.epochs is None:
        args.steps = STEPS_DEFAULT
    args.alpha = args.alpha or 2 * args.rank
    return args


def _settle_passes(args: argparse.Namespace) -> str | None:
    """Give --micro-batch its default; what is wrong with it otherwise."""
    batch, lanes, most = args.batch, args.lanes, TOKENS.most // args.sequence
    if lanes > batch:
        return f"--lanes {lanes} is more than the {batch} sequences of --batch"
    if args.micro_batch is None:
        fitting = min(batch // lanes, most)
        args.micro_batch = max(m for m in range(1, fitting + 1) if batch % m == 0)
    micro_batch = args.micro_batch
    if batch % micro_batch:
        return f"--micro-batch {micro_batch} does not divide --batch {batch}"
    if micro_batch > most:
        return (
            f"--micro-batch {micro_batch} of {args.sequence} tokens is more than the "
            f"{TOKENS.most} tokens that a worker takes at once; {most} fit"
        )
    if batch // micro_batch < lanes:
        return (
            f"--lanes {lanes} is more than the {batch // micro_batch} passes of a step; give a "
            "smaller --micro-batch"
        )
    return None
