"""What is known of one fine-tuning before any role is taken: model, text, training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backends.errors import UserError
from backends.hardware import Hardware, chosen
from backends.nn.base import Checkpoint
from backends.nn.checkpoint import require_same_run
from backends.nn.corpus import Corpus
from backends.nn.dp import DifferentialPrivacy
from backends.nn.sane import positions, require_positions, require_rank
from backends.nn.selfcheck import keeps_apart
from backends.nn.skeleton import Skeleton
from backends.nn.sources import Base
from backends.nn.tokenizer import HubTokenizer, end_of_text
from backends.nn.trainer import TrainConfig
from backends.options import STEPS
from scenarios.dp import dp_of, require_dp
from scenarios.estimate import Shape
from scenarios.finetune.held import PROMPT_TOKENS, SAMPLES, beginnings
from scenarios.generate.run import encoded, require_text
from scenarios.preparation import chosen_base, chosen_skeleton, settle_head
from scenarios.texts import Data, load_texts, to_do

CHECKPOINTS = "checkpoints"


class FinetuneError(UserError, ValueError):
    """The run that was asked for does not fit the model or the text; the text says why."""


@dataclass
class Setup:
    """What is known before any role is taken.

    linears   names of those that get adapters
    prompts   int64[1, S] of each sample
    shape     of a step
    """

    hardware: Hardware
    base: Base
    skeleton: Skeleton
    data: Data
    training: TrainConfig
    linears: list[str]
    prompts: list[torch.Tensor]
    tokenizer: HubTokenizer
    shape: Shape


def set_up(args: argparse.Namespace, here: bool) -> Setup:
    """Model, text and training, all looked at; says what it finds."""
    privacy = dp_of(args)
    hardware = chosen(args.gpu)
    base = chosen_base(args)
    assert isinstance(base, Checkpoint)
    tokens = args.micro_batch * args.sequence
    passes = args.batch // args.micro_batch

    def shape() -> Shape:
        remote_head = args.lm_head == "remote"
        return Shape(
            base.config, tokens, args.sequence, args.lanes, args.rank, args.preset, remote_head,
            passes,
        )  # fmt: skip

    settle_head(args, shape(), base, hardware, here)
    skeleton = chosen_skeleton(args, base, hardware.dtype)
    require_rank(skeleton.groups, args.rank)
    linears = chosen_linears(skeleton, args.targets)
    warning = require_positions(skeleton.model, args.sequence)
    if warning is not None:
        print(warning)
    apart = keeps_apart(skeleton.model, skeleton.remote, skeleton.groups)
    share = 0.0 if args.train_on_all else args.held_out
    settings = run_settings(args, linears, base)

    def fits(corpus: Corpus) -> None:
        train, held = corpus.parts()
        if share and not len(held):
            raise FinetuneError(
                "the text is too short to hold any of it out; give more of it, a shorter "
                "--sequence, or --train-on-all"
            )
        training = _training(args, len(train), privacy)
        require_dp(training, len(train))
        if not args.fresh:
            known = training.settings(len(train)) | settings
            require_same_run(args.out / CHECKPOINTS, known, train)

    data = load_texts(args, base, apart, share, fits)
    training = _training(args, len(data.train), privacy)
    print(to_do(training.steps, args.batch, args.sequence, len(data.train)))
    tokenizer = base.tokenizer()
    prompts = _prompts(args, data, tokenizer, skeleton)
    return Setup(
        hardware, base, skeleton, data, training, linears, prompts, tokenizer, shape()
    )  # fmt: skip


def run_settings(args: argparse.Namespace, linears: Sequence[str], base: Base) -> dict[str, Any]:
    """What two runs must agree on, beside their training, to be one."""
    return {
        "rank": args.rank, "alpha": args.alpha, "targets": sorted(linears), "base": base.identity(),
    }  # fmt: skip


def _training(
    args: argparse.Namespace, sequences: int, privacy: DifferentialPrivacy | None
) -> TrainConfig:
    steps = args.steps or _steps_of(args.epochs, sequences, args.batch)
    return TrainConfig(
        steps=steps, batch=args.batch, micro_batch=args.micro_batch,
        learning_rate=args.learning_rate, warmup_steps=max(1, min(20, steps // 10)),
        seed=args.seed, privacy=privacy,
    )  # fmt: skip


def chosen_linears(skeleton: Skeleton, targets: tuple[str, ...] | None) -> list[str]:
    """The linears to adapt. Raises FinetuneError for a name that none of them has."""
    if targets is None:
        return skeleton.adapted
    for target in targets:
        if not any(_is_called(name, target) for name in skeleton.adapted):
            ends = sorted({name.rpartition(".")[2] for name in skeleton.adapted})
            raise FinetuneError(
                f"--targets: no linear that workers compute is called {target[:40]!r}; there are "
                f"{', '.join(ends)}"
            )
    return [n for n in skeleton.adapted if any(_is_called(n, target) for target in targets)]


def _is_called(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _steps_of(epochs: float, sequences: int, batch: int) -> int:
    steps = math.ceil(epochs * sequences / batch)
    if steps > STEPS.most:
        raise FinetuneError(f"--epochs {epochs:g} are {steps:,} steps; at most {STEPS.most:,}")
    return steps


def _prompts(
    args: argparse.Namespace, data: Data, tokenizer: HubTokenizer, skeleton: Skeleton
) -> list[torch.Tensor]:
    """Raises PromptError or FinetuneError for samples that the model cannot complete."""
    if not args.sample_tokens:
        return []
    if args.sample:
        require_text(args.sample)
        return encoded(
            args.sample, tokenizer, skeleton.model, args.sample_tokens, "--sample-tokens"
        )  # fmt: skip
    size, known = min(PROMPT_TOKENS, args.sequence // 2), positions(skeleton.model)
    if known is not None and size + args.sample_tokens > known[0]:
        raise FinetuneError(
            f"this model takes {known[0]} tokens; give --sample-tokens {known[0] - size} or less"
        )
    if data.held_out is None:
        return []
    return beginnings(data.held_out, end_of_text(tokenizer), SAMPLES, size)
