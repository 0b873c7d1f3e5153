"""Training side by side: in clear, in clear as others quantise for encryption, and privately.

    python -m benchmarks.training --json F --picture P.png   the quickstart, 20 minutes
    python -m benchmarks.training --model DIR --steps 40     any checkpoint, on the same text
    python -m benchmarks.training --quick                    that it runs, nothing more

Every run starts from the same adapters and sees the same text in the same order.

clear fp32             the base's weights as they are
clear int8             weights of 8 bits per output row: the base that private runs train on
clear int8, int8 act.  its products' inputs rounded to 8 bits per token too, forward and backward:
                       what a scheme of integers computes (Frery et al. 2025)
private NAME           on ciphertexts, under each preset of the cipher

`final_loss` is held out, in nats per token. `gradient_norm_ratio` is the mean gradient norm over
all steps against that of `clear int8`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoTokenizer

from backends.door import place_of, prepared_at
from backends.files import replacing
from backends.he.interface import Values
from backends.he.params import PRESETS, preset
from backends.nn.adapters import add_lora
from backends.nn.base import open_base
from backends.nn.sane import require_rank
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import Base
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from backends.options import LEARNING_RATE, RANK, STEPS, Parser, Whole
from backends.places import output_file
from backends.session import HERE, opened
from benchmarks.quality import Case, NoisyProducts, Training, rounded
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.options import TINY_LLAMA, add_cache_option
from scenarios.quickstart.run import Private, private_text
from scenarios.session import train_with_bar

mpl.use("Agg")
from matplotlib import pyplot as plt

FP32, INT8, ACTIVATIONS = "clear fp32", "clear int8", "clear int8, int8 act."
SEED = 0


class RoundedProducts(NoisyProducts):
    """Products of 8-bit weights with inputs that are rounded to 8 bits per token."""

    def linear(self, matrix: int, x: Values) -> torch.Tensor:
        """float32[T, K] -> float32[T, N], for `Remote.connected`."""
        return super().linear(matrix, rounded(torch.from_numpy(x), 8).numpy())


@contextmanager
def in_clear(skeleton: Skeleton, name: str) -> Iterator[None]:
    """The skeleton's products are computed here, as one of the clear runs does."""
    case = Case(name, None if name == FP32 else 8)
    kind = RoundedProducts if name == ACTIVATIONS else NoisyProducts
    with skeleton.remote.connected(kind(skeleton, case, SEED).linear):
        yield


@contextmanager
def on_ciphertexts(base: Base, skeleton: Skeleton, name: str, cache: Path) -> Iterator[None]:
    """The skeleton's products are a worker's, in this process, under a preset."""
    parameters = preset(name)
    place = place_of(base, skeleton.groups, parameters, cache, b"")
    with opened(skeleton, prepared_at(place, skeleton, parameters), workers=HERE):
        yield


def fine_tune(
    skeleton: Skeleton, products: AbstractContextManager[None], text: Private, training: Training,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    """One run: its losses and gradient norms, step by step, and the held-out loss at its end."""
    require_rank(skeleton.groups, training.rank)
    model = add_lora(skeleton.model, training.rank, 2 * training.rank, SEED)
    config = TrainConfig(
        training.steps, training.batch, training.batch, training.learning_rate,
        warmup_steps=max(1, training.steps // 10), seed=SEED,
    )  # fmt: skip
    with products:
        trainer = Trainer(model, text.train, config, forget_lane=skeleton.remote.forget_lane)
        losses = train_with_bar(trainer, name)
        final = evaluate(model, text.held_out, min(4, len(text.held_out)))
    norms = trainer.progress.gradient_norms
    return {
        "name": name,
        "final_loss": final,
        "losses": losses,
        "gradient_norms": norms,
        "seconds": sum(trainer.step_seconds),
    }


def measure(
    base: Base, text: Private, training: Training, presets: Sequence[str], cache: Path
) -> dict[str, Any]:
    """All runs, one after the other."""
    runs: list[dict[str, Any]] = []
    for name in (INT8, FP32, ACTIVATIONS, *(f"private {each}" for each in presets)):
        skeleton = build_skeleton(base)
        private = name.removeprefix("private ")
        products = (
            in_clear(skeleton, name) if private == name
            else on_ciphertexts(base, skeleton, private, cache)
        )  # fmt: skip
        runs.append(fine_tune(skeleton, products, text, training, name))
        norm = fmean(runs[0]["gradient_norms"])
        runs[-1]["gradient_norm_ratio"] = fmean(runs[-1]["gradient_norms"]) / norm
        print(line(runs[-1], runs[0]), flush=True)
    return {
        "training": asdict(training) | {"sequence": text.train.shape[1], "seed": SEED},
        "held_out_sequences": len(text.held_out),
        "runs": runs,
    }


def line(run: dict[str, Any], clear: dict[str, Any]) -> str:
    """One run against clear."""
    gap = run["final_loss"] / clear["final_loss"] - 1
    return (
        f"{run['name']:<22} held-out loss {run['final_loss']:.4f} ({gap:+.2%} against {INT8}), "
        f"gradient norm x {run['gradient_norm_ratio']:.3f}, {run['seconds']:.0f} s"
    )


def draw(path: Path, figures: dict[str, Any], title: str) -> None:
    """One PNG: losses on the left, gradient norms against clear's on the right, step by step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    clear = figures["runs"][0]
    colours = plt.get_cmap("tab10")
    for index, run in enumerate(figures["runs"]):
        private = run["name"].startswith("private")
        style: dict[str, Any] = {
            "color": colours(index), "linewidth": 1.6 if private else 1.1,
            "linestyle": "-" if private else "--",
        }  # fmt: skip
        steps = range(1, len(run["losses"]) + 1)
        left.plot(steps, run["losses"], label=f"{run['name']}: {run['final_loss']:.4f}", **style)
        pairs = zip(run["gradient_norms"], clear["gradient_norms"], strict=True)
        right.plot(steps, [own / its for own, its in pairs], **style)
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats per token")
    left.legend(frameon=False, title="held-out loss at the end")
    right.axhspan(0.98, 1.02, color="#2c9c69", alpha=0.12, linewidth=0, label="0.98 to 1.02")
    right.set_xlabel("step")
    right.set_ylabel(f"gradient norm / that of {INT8} at the same step")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def headline(figures: dict[str, Any]) -> str:
    """How far private runs are from clear."""
    clear = figures["runs"][0]
    private = [run for run in figures["runs"] if run["name"].startswith("private")]
    gaps = [100 * abs(run["final_loss"] / clear["final_loss"] - 1) for run in private]
    norms = [run["gradient_norm_ratio"] for run in private]
    return (
        f"{figures['model']}, {figures['training']['steps']} steps: private runs end within "
        f"{max(gaps):.2f} % of clear, gradient norms {min(norms):.3f} to {max(norms):.3f} of its"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.training")
    add = parser.add_argument
    add("--model", default=str(TINY_LLAMA), metavar="DIR",
        help="a checkpoint's directory or hub id (the quickstart's model)")  # fmt: skip
    add("--steps", type=STEPS, default=120, help="optimiser steps of a run (120)")
    add("--batch", type=Whole(1, 256), default=4, help="sequences of 256 tokens a step (4)")
    add("--learning-rate", type=LEARNING_RATE, default=4e-3, help="peak learning rate (4e-3)")
    add("--rank", type=RANK, default=16, help="LoRA rank (16); alpha is twice that")
    add("--held-out", type=Whole(1, 10_000), default=32,
        help="held-out sequences of 256 tokens (32)")  # fmt: skip
    add("--preset", nargs="+", choices=sorted(PRESETS), default=list(PRESETS),
        help="of the cipher (all)")  # fmt: skip
    add("--picture", type=output_file, metavar="PNG", help="draw the curves")
    add("--quick", action="store_true", help="two steps of one preset")
    add_cache_option(parser)
    add_kernel_option(parser)
    record.add_json_option(parser)
    args = parser.parse(arguments)
    if args.quick:
        args.steps, args.batch, args.held_out, args.preset = 2, 1, 1, ["thin"]
    return args


def main() -> None:
    args = parse()
    start = time.perf_counter()
    with clean_exit():
        kernel = use_kernel(args.kernel)
        base = open_base(args.model)
        text = private_text(AutoTokenizer.from_pretrained(base.directory), args.held_out)
        training = Training(args.steps, args.batch, args.learning_rate, args.rank)
        figures = measure(base, text, training, args.preset, args.cache)
        figures |= {"model": Path(args.model).name, "kernel": kernel.name}
        figures["elapsed_s"] = round(time.perf_counter() - start, 1)
        told = headline(figures)
        print(told)
        record.write(args.json, figures)  # first: a picture can be drawn again, this cannot
        if args.picture is not None:
            draw(args.picture, figures, told)


if __name__ == "__main__":
    main()
