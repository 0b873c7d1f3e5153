"""Options of differential privacy, and what is said of it (docs/dp.md)."""

from __future__ import annotations

import argparse
from typing import Any

from backends.he.params import preset
from backends.nn.dp import (
    CLIP,
    LEAST_DELTA,
    DifferentialPrivacy,
    DpError,
    expected,
    noise_for,
    require_accountant,
)
from backends.nn.trainer import TrainConfig, Trainer
from backends.options import Number

DP_OPTIONS = ("--dp-epsilon", "--dp-delta", "--dp-clip")


def add_dp_options(parser: argparse.ArgumentParser) -> None:
    """`DP_OPTIONS`, for `dp_of`."""
    parser.add_argument(
        "--dp-epsilon", type=Number(1e-3, 1e3), metavar="E",
        help="differential privacy: clip each sequence's gradient and add noise, so that the "
        "adapter tells little of any one of them, within this budget for all steps; takes "
        "--preset exact (docs/dp.md)",
    )  # fmt: skip
    parser.add_argument(
        "--dp-delta", type=Number(LEAST_DELTA, 0.1), metavar="D",
        help=f"its delta, from {LEAST_DELTA:g}, below 1/n for n sequences (n^-1.1)",
    )  # fmt: skip
    parser.add_argument(
        "--dp-clip", type=Number(1e-9, 1e9), metavar="C",
        help=f"what the gradient of a sequence's mean loss may weigh at most ({CLIP})",
    )  # fmt: skip


def dp_of(args: argparse.Namespace) -> DifferentialPrivacy | None:
    """What `add_dp_options` gave, before anything long begins; None without --dp-epsilon.

    Raises DpError for options that promise nothing, ciphertexts that would break the promise, or
    without an accountant.
    """
    if args.dp_epsilon is None:
        if args.dp_delta is not None or args.dp_clip is not None:
            raise DpError("--dp-delta and --dp-clip do nothing without --dp-epsilon; give it too")
        return None
    if preset(args.preset).thin:
        raise DpError(
            f"--dp-epsilon does not go with --preset {args.preset}, which learns the scale of "
            "results from all sequences, so that one has a part in another's gradient; give "
            "--preset exact"
        )
    require_accountant()
    clip = CLIP if args.dp_clip is None else args.dp_clip
    return DifferentialPrivacy(args.dp_epsilon, args.dp_delta, clip)


def require_dp(training: TrainConfig, sequences: int) -> None:
    """Before anything is prepared: raise DpError where so many sequences cannot have it."""
    if training.privacy is not None:
        noise_for(sequences, training.batch, training.steps, training.privacy)


def dp_figures(trainer: Trainer) -> dict[str, Any]:
    """For a run's figures: what was spent, and how. Empty without differential privacy."""
    dp, spent = trainer.dp, trainer.spent()
    if dp is None or spent is None:
        return {}
    epsilon, delta = spent
    return {
        "dp_epsilon": epsilon, "dp_delta": delta, "dp_clip": dp.privacy.clip,
        "dp_noise": dp.noise,
    }  # fmt: skip


def dp_plan(trainer: Trainer) -> str:
    """A line for before a training with differential privacy."""
    dp, config = trainer.dp, trainer.config
    assert dp is not None
    return (
        f"differential privacy: epsilon {dp.spent(config.steps):.3g}, delta "
        f"{dp.delta:.2g} for any one sequence after {config.steps} steps; noise of "
        f"{dp.noise:.3g} clip norms on each step's sum, {dp.noise / expected(config.batch):.2g} "
        "on its mean, in every direction"
    )


def dp_line(figures: dict[str, Any]) -> str:
    """A line of a report, of figures with those of `dp_figures`."""
    return (
        f"differential privacy   epsilon {figures['dp_epsilon']:.3g}, delta "
        f"{figures['dp_delta']:.2g}, per sequence, of the adapter alone"
    )
