"""How much noise may the cipher have? Fine-tuning in clear, with noise added to every product.

    python -m benchmarks.quality --json F --picture P.png           the quickstart's model and text
    python -m benchmarks.quality --model DIR --steps 12 --batch 1   any checkpoint, the same text
    python -m benchmarks.quality --quick                            that it runs, nothing more

Nothing is encrypted. The products that a worker would compute are computed in clear, for the same
groups of linears and in both directions, from weights rounded per output row, and to each goes
unbiased normal noise: its deviation is the stated share of that product's own root mean square,
token by token. So is the cipher's, for outputs of equal weight (`docs/cipher.md`).

Every run starts from the same adapters and sees the same text in the same order. `final_loss` is
the held-out loss as a private run would measure it, through the same noisy products;
`adapter_loss` is that of the same adapter on the same weights without noise. The reference is 8-bit
weights without noise; `gradient_norm_ratio` is the mean gradient norm over all steps against its.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoTokenizer

from backends.files import replacing
from backends.he.interface import Values
from backends.nn.adapters import add_lora
from backends.nn.base import open_base
from backends.nn.sane import require_rank
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import Base
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from backends.options import LEARNING_RATE, RANK, STEPS, TIMES, Number, Parser, Whole
from backends.places import output_file
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.options import TINY_LLAMA
from scenarios.quickstart.run import Private, private_text
from scenarios.session import train_with_bar

mpl.use("Agg")
from matplotlib import pyplot as plt

PERCENT = (0.3, 1.0, 3.0, 10.0, 30.0)
BITS = (8, 6, 5, 4)
ALLOWED = 0.5
"""Percent of the loss that private training may differ from clear."""


@dataclass(frozen=True)
class Case:
    """One way to compute the products.

    weight_bits     of the frozen weights, symmetric per output row; None leaves them as they are
    error_forward   deviation of the noise, as a share of each product's root mean square
    error_backward  the same of the products of gradients
    """

    name: str
    weight_bits: int | None = 8
    error_forward: float = 0.0
    error_backward: float = 0.0


CLEAR = Case("clear")


def cases(percents: Sequence[float], bits: Sequence[int]) -> list[Case]:
    """What is tried beside CLEAR."""
    found = [Case("weights as they are", None)]
    found += [Case(f"{b} bits", b) for b in bits if b != CLEAR.weight_bits]
    found += [Case(f"forward {p:g} %", error_forward=p / 100) for p in percents]
    found += [Case(f"backward {p:g} %", error_backward=p / 100) for p in percents]
    return [*found, Case("6 bits, 10 % + 10 %", 6, 0.1, 0.1)]


@dataclass(frozen=True)
class Training:
    """What all runs have in common; a step has `batch` sequences."""

    steps: int
    batch: int
    learning_rate: float
    rank: int


class NoisyProducts:
    """The products of a skeleton's groups in clear, with a case's noise.

    seed  of the noise
    """

    def __init__(self, skeleton: Skeleton, case: Case, seed: int) -> None:
        self.case = case
        self._weights = []
        for group in skeleton.groups:
            parts = [skeleton.load_weight(m).to(torch.float32) for m in group.members]
            self._weights.append(torch.cat([rounded(p, case.weight_bits) for p in parts]))
        self._generator = torch.Generator().manual_seed(seed)

    def linear(self, matrix: int, x: Values) -> torch.Tensor:
        """float32[T, K] -> float32[T, N], for `Remote.connected`."""
        group, backward = divmod(matrix, 2)
        weight = self._weights[group]
        y = torch.from_numpy(x) @ (weight if backward else weight.T)
        error = self.case.error_backward if backward else self.case.error_forward
        if error:
            deviation = error / sqrt(y.shape[1]) * y.norm(dim=1, keepdim=True)
            y.addcmul_(torch.empty_like(y).normal_(generator=self._generator), deviation)
        return y


def rounded(weight: torch.Tensor, bits: int | None) -> torch.Tensor:
    """float32[N, K], each row to the nearest of its 2^bits - 1 symmetric steps."""
    if bits is None:
        return weight
    largest = 2 ** (bits - 1) - 1
    step = (weight.abs().amax(dim=1, keepdim=True) / largest).clamp_(min=1e-30)
    return torch.round(weight / step) * step


def fine_tune(
    base: Base, text: Private, case: Case, training: Training, seed: int
) -> dict[str, Any]:
    """One run; its losses (nats per token) and mean gradient norm."""
    skeleton = build_skeleton(base)
    require_rank(skeleton.groups, training.rank)
    products = NoisyProducts(skeleton, case, seed)
    model = add_lora(skeleton.model, training.rank, 2 * training.rank, seed)
    config = TrainConfig(
        training.steps, training.batch, training.batch, training.learning_rate,
        warmup_steps=max(1, training.steps // 10), seed=seed,
    )  # fmt: skip
    trainer = Trainer(model, text.train, config, forget_lane=skeleton.remote.forget_lane)

    def loss() -> float:
        return evaluate(model, text.held_out, min(4, len(text.held_out)))

    with skeleton.remote.connected(products.linear):
        train_with_bar(trainer, case.name)
        final = loss()
        products.case = Case(case.name, case.weight_bits)
        quiet = loss() if case.error_forward else final
    return asdict(case) | {
        "seed": seed,
        "final_loss": final,
        "adapter_loss": quiet,
        "gradient_norm": fmean(trainer.gradient_norms),
    }


def measure(
    base: Base, text: Private, tried: Sequence[Case], training: Training, seeds: int
) -> dict[str, Any]:
    """All runs of all seeds, each beside that seed's run of CLEAR."""
    runs, clear = [], []
    for seed in range(seeds):
        reference = fine_tune(base, text, CLEAR, training, seed)
        clear.append(reference)
        runs.append(reference | {"gradient_norm_ratio": 1.0})
        for case in tried:
            run = fine_tune(base, text, case, training, seed)
            ratio = run["gradient_norm"] / reference["gradient_norm"]
            runs.append(run | {"gradient_norm_ratio": ratio})
            print(line(runs[-1], reference), flush=True)
    return {
        "training": asdict(training) | {"sequence": text.train.shape[1], "seeds": seeds},
        "held_out_sequences": len(text.held_out),
        "clear_loss": fmean(run["final_loss"] for run in clear),
        "clear_gradient_norm": fmean(run["gradient_norm"] for run in clear),
        "runs": runs,
    }


def line(run: dict[str, Any], reference: dict[str, Any]) -> str:
    """One run against clear."""
    gap, own = (run[key] / reference["final_loss"] - 1 for key in ("final_loss", "adapter_loss"))
    return (
        f"{run['name']:<22} seed {run['seed']}: held-out loss {run['final_loss']:.4f} "
        f"({gap:+.2%} against clear; its adapter without noise {own:+.2%}), "
        f"gradient norm x {run['gradient_norm_ratio']:.3f}"
    )


def gap_percent(figures: dict[str, Any], case: Case, key: str = "final_loss") -> float:
    """A case's held-out loss above clear's of the same seed, in percent, the mean of all seeds."""
    clear = {r["seed"]: r["final_loss"] for r in figures["runs"] if r["name"] == CLEAR.name}
    own = [r for r in figures["runs"] if r["name"] == case.name]
    return fmean(100 * (run[key] / clear[run["seed"]] - 1) for run in own)


def draw(path: Path, figures: dict[str, Any], tried: Sequence[Case], title: str) -> None:
    """One PNG: the loss against noise on the left, against bits of the weights on the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5), width_ratios=(1.8, 1), layout="constrained"
    )
    for kind, colour in (("forward", "#1f6fb4"), ("backward", "#e0701e")):
        own = [c for c in tried if c.name.startswith(f"{kind} ")]
        errors = [100 * (c.error_forward + c.error_backward) for c in own]
        gaps = [gap_percent(figures, c) for c in own]
        left.plot(errors, gaps, "o-", color=colour, linewidth=2.4, label=f"noise {kind}")
        if kind == "forward":
            quiet = [gap_percent(figures, c, "adapter_loss") for c in own]
            left.plot(errors, quiet, "--", color=colour, label="the same adapters without noise")
    for case in (c for c in tried if c.error_forward and c.error_backward):
        left.plot(100 * case.error_forward, gap_percent(figures, case), "D", color="#2c9c69",
            markersize=9, label="6-bit weights, both directions")  # fmt: skip
    ticks = {100 * (c.error_forward or c.error_backward) for c in tried} - {0.0}
    left.set_xscale("log")
    left.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    left.minorticks_off()
    left.set_xlabel("noise of every product, % of the product")
    left.set_ylabel("held-out loss above clear's, %")
    weights = [Case("clear"), *(c for c in tried if not (c.error_forward or c.error_backward))]
    weights.sort(key=lambda c: -(c.weight_bits or 99))
    names = [f"{c.weight_bits}" if c.weight_bits else "as\nthey are" for c in weights]
    bars = right.bar(names, [gap_percent(figures, c) for c in weights], color="#9aa5b1")
    right.bar_label(bars, fmt="%+.2f", padding=3)
    right.set_xlabel("bits of the frozen weights, no noise")
    right.margins(y=0.15)
    for axis in (left, right):
        axis.axhspan(-ALLOWED, ALLOWED, color="#2c9c69", alpha=0.12, linewidth=0,
            label=f"within {ALLOWED:g} %")  # fmt: skip
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def headline(figures: dict[str, Any], tried: Sequence[Case]) -> str:
    """The largest noise tried that stays within ALLOWED, each direction alone."""
    told = []
    for kind in ("forward", "backward"):
        good = 0.0
        for case in (c for c in tried if c.name.startswith(f"{kind} ")):
            if abs(gap_percent(figures, case)) > ALLOWED:
                break
            good = 100 * (case.error_forward + case.error_backward)
        told.append(f"{good:g} % {kind}")
    model = f"{figures['model']}, {figures['training']['steps']} steps"
    return f"{model}: noise costs less than {ALLOWED:g} % of the loss up to {' or '.join(told)}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.quality")
    add = parser.add_argument
    add("--model", default=str(TINY_LLAMA), metavar="DIR",
        help="a checkpoint's directory or hub id (the quickstart's model)")  # fmt: skip
    add("--steps", type=STEPS, default=60, help="optimiser steps of a run (60)")
    add("--batch", type=Whole(1, 256), default=4, help="sequences of 256 tokens a step (4)")
    add("--learning-rate", type=LEARNING_RATE, default=4e-3, help="peak learning rate (4e-3)")
    add("--rank", type=RANK, default=16, help="LoRA rank (16); alpha is twice that")
    add("--held-out", type=Whole(1, 10_000), default=32,
        help="held-out sequences of 256 tokens (32)")  # fmt: skip
    add("--noise", type=Number(1e-6, 1000), nargs="+", default=list(PERCENT), metavar="PERCENT",
        help="what is tried, forward and backward separately (0.3 1 3 10 30)")  # fmt: skip
    add("--bits", type=Whole(2, 8), nargs="+", default=list(BITS),
        help="of weights that are tried without noise (8 6 5 4)")  # fmt: skip
    add("--seeds", type=TIMES, default=1, help="runs of each, with other adapters and order (1)")
    add("--picture", type=output_file, metavar="PNG", help="draw the losses")
    add("--quick", action="store_true", help="two steps of very few cases")
    record.add_json_option(parser)
    args = parser.parse(arguments)
    args.noise = sorted(set(args.noise))
    if args.quick:
        args.steps, args.batch, args.held_out, args.noise, args.bits = 2, 1, 1, [10.0], [6]
    return args


def main() -> None:
    args = parse()
    start = time.perf_counter()
    with clean_exit():
        base = open_base(args.model)
        tokenizer = AutoTokenizer.from_pretrained(base.directory)
        training = Training(args.steps, args.batch, args.learning_rate, args.rank)
        tried = cases(args.noise, args.bits)
        figures = measure(base, private_text(tokenizer, args.held_out), tried, training, args.seeds)
        figures |= {"model": Path(args.model).name}
        told = headline(figures, tried)
        print(told)
        if args.picture is not None:
            draw(args.picture, figures, tried, told)
    figures["elapsed_s"] = round(time.perf_counter() - start, 1)
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
