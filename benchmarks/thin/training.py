"""The same fine-tuning privately and in clear, from the same adapters on the same int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer

from backends.he.params import Parameters
from backends.he.store import PreparedModel
from backends.nn.adapters import add_lora, trainable
from backends.nn.base import open_base
from backends.nn.local import localise
from backends.nn.sane import require_rank
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import Base
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from benchmarks.thin.chats import sequences
from benchmarks.thin.wraps import counted
from scenarios.options import TINY_LLAMA
from scenarios.preparation import prepared_for
from scenarios.quickstart.run import private_text
from scenarios.session import train_with_bar

RANK = 16
_HELD_OUT = 32
_GEMMA_SEQUENCE, _GEMMA_HELD_OUT = 512, 6
_GEMMA_RATE = 5e-4
_CHAT_SEQUENCE = 256


@dataclass(frozen=True)
class Task:
    """What is trained, on int64[n, S], and what is held out.

    batch  sequences of a step, in one pass
    """

    model: str
    base: Base
    train: torch.Tensor
    held_out: torch.Tensor
    steps: int
    batch: int
    learning_rate: float


def quickstart_task(steps: int) -> Task:
    """As `scenarios.quickstart` trains: steps of 4 x 256 tokens of source code."""
    text = private_text(AutoTokenizer.from_pretrained(TINY_LLAMA), _HELD_OUT)
    return Task("quickstart", open_base(TINY_LLAMA), text.train, text.held_out, steps, 4, 4e-3)


def documentation(tokenizer: Any, sequence: int) -> torch.Tensor:
    """int64[n, sequence] of Python's own documentation, in an order of its own, seeded."""
    names = sorted(topics)
    ids = [token for name in names for token in tokenizer(topics[name]).input_ids]
    packed = torch.tensor(ids[: len(ids) // sequence * sequence]).reshape(-1, sequence)
    return packed[torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))]


def gemma_task(directory: Path, steps: int) -> Task:
    """Steps of one sequence of 512 tokens."""
    text = documentation(AutoTokenizer.from_pretrained(directory), _GEMMA_SEQUENCE)
    held_out, train = text[:_GEMMA_HELD_OUT], text[_GEMMA_HELD_OUT:]
    return Task("gemma", open_base(str(directory)), train, held_out, steps, 1, _GEMMA_RATE)


def chat_task(directory: Path, steps: int) -> Task:
    """Steps of two sequences of 256 tokens; the loss is that of the answers."""
    base = open_base(str(directory))
    train, held_out = sequences(base, _CHAT_SEQUENCE)
    return Task("gemma-chat", base, train, held_out[:_HELD_OUT], steps, 2, _GEMMA_RATE)


def run(task: Task, seed: int, parameters: Parameters, cache: Path) -> dict[str, Any]:
    """One private run and one in clear; losses in nats a token, and what wrapped.

    private_loss is measured through the cipher, adapter_loss is the same adapter's without.
    """
    config = TrainConfig(
        task.steps, task.batch, task.batch, task.learning_rate,
        warmup_steps=max(1, task.steps // 10), seed=seed,
    )  # fmt: skip
    skeleton = build_skeleton(task.base)
    require_rank(skeleton.groups, RANK)
    prepared, _ = prepared_for(skeleton, parameters, cache)
    model = add_lora(skeleton.model, RANK, 2 * RANK, seed)
    trainer = Trainer(model, task.train, config, forget_lane=skeleton.remote.forget_lane)
    with counted(skeleton, prepared) as owner:
        train_with_bar(trainer, f"{task.model} {seed}, private")
        private_loss = evaluate(model, task.held_out, task.batch)
        found = owner.figures()
    norms = trainer.gradient_norms
    adapter = [p.detach().clone() for p in trainable(model).values()]
    del model, trainer, skeleton
    clear, clear_norms = _in_clear(task, seed, config, prepared, adapter)
    return {
        "model": task.model,
        "seed": seed,
        "steps": task.steps,
        "tokens_per_step": task.batch * task.train.shape[1],
        "private_loss": private_loss,
        **clear,
        "gradient_norm_ratio": fmean(norms) / fmean(clear_norms),
        **found,
    }


def _in_clear(
    task: Task, seed: int, config: TrainConfig, prepared: PreparedModel,
    adapter: Sequence[torch.Tensor],
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """Held-out losses without the cipher, of the model before any training, with the adapter that
    was trained privately, and with the one that is trained here; and the gradients' norms."""
    skeleton = build_skeleton(task.base)
    localise(skeleton, prepared)
    model = add_lora(skeleton.model, RANK, 2 * RANK, seed)
    losses = {"base_loss": evaluate(model, task.held_out, task.batch)}
    parameters = list(trainable(model).values())
    fresh = [p.detach().clone() for p in parameters]
    _put(parameters, adapter)
    losses["adapter_loss"] = evaluate(model, task.held_out, task.batch)
    _put(parameters, fresh)
    trainer = Trainer(model, task.train, config)
    train_with_bar(trainer, f"{task.model} {seed}, clear")
    losses["clear_loss"] = evaluate(model, task.held_out, task.batch)
    return losses, trainer.gradient_norms


@torch.no_grad()
def _put(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def line(run: dict[str, Any]) -> str:
    """A run for a person."""
    gap, own = (run[key] / run["clear_loss"] - 1 for key in ("private_loss", "adapter_loss"))
    return (
        f"{run['model']} seed {run['seed']}: held-out loss {run['private_loss']:.4f} private, "
        f"{run['clear_loss']:.4f} clear ({gap:+.2%}; its adapter without the cipher {own:+.2%}; "
        f"before training {run['base_loss']:.4f}); "
        f"gradient norm x {run['gradient_norm_ratio']:.3f}; {run['wraps']} of "
        f"{run['results']:,} results wrapped, {run['wraps_repaired']} repaired, "
        f"{run['wraps_unseen']} unseen; error of a product {run['median_error']:.1%}"
    )


def missing(runs: Sequence[dict[str, Any]], model: str, steps: int, seeds: int) -> list[int]:
    """Seeds that no run has yet."""
    known = {run["seed"] for run in runs if (run["model"], run["steps"]) == (model, steps)}
    return [seed for seed in range(seeds) if seed not in known]
