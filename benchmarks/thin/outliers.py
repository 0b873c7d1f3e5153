"""Adapters' gradients where eight channels of all activations are 300 times the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from backends.he.params import preset
from backends.nn.adapters import add_lora, trainable
from backends.nn.local import localise
from backends.nn.losses import token_losses
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import HeldBase
from benchmarks.thin.wraps import counted
from scenarios.options import TINY_LLAMA
from scenarios.preparation import prepared_for

FACTOR, CHANNELS = 300.0, 8
WARM_UP = 3
"""Passes over other text before the one that counts: a matrix's first request has a gain of 1."""
_FED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def quickstart_model() -> PreTrainedModel:
    """The quickstart's, from its files."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    return model


@torch.no_grad()
def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """The same function: norms' gains FACTOR times in some channels, and what they feed less."""
    width = model.config.hidden_size
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:CHANNELS]
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter[channels] *= FACTOR
        elif any(part in name for part in _FED):
            parameter[:, channels] /= FACTOR
    return model


def measure(
    made: Callable[[], PreTrainedModel], text: torch.Tensor, names: tuple[str, ...], cache: Path,
    rank: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """||private - clear|| / ||clear|| of all adapters' gradients, on the same int8 weights.

    made   a fresh model each time
    text   int64[n, B, S]: the last batch counts
    names  of presets
    """
    found: dict[str, Any] = {
        "factor": FACTOR, "channels": CHANNELS, "warm_up": len(text) - 1,
    }  # fmt: skip
    for name in names:
        skeleton = build_skeleton(HeldBase(with_outliers(made())))
        prepared, _ = prepared_for(skeleton, preset(name), cache)
        with counted(skeleton, prepared) as owner:
            adapted = _adapted(skeleton.model, rank)
            for batch in text:
                private = _gradients(adapted, batch)
            told = owner.figures()
        same = build_skeleton(HeldBase(with_outliers(made())))
        localise(same, prepared)
        clear = _gradients(_adapted(same.model, rank), text[-1])
        found[name] = ((private - clear).norm() / clear.norm()).item()
        found[f"{name}_products"] = told
    return found


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    """With adapters as after some training: none of their matrices is zero."""
    adapted = add_lora(model, rank, 2 * rank, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3, generator=generator)
    return adapted


def _gradients(adapted: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """All in one vector."""
    loss = token_losses(adapted, batch) / batch.numel()
    with torch.autograd.set_multithreading_enabled(False):
        found = torch.autograd.grad(loss, list(trainable(adapted).values()))
    return torch.cat([each.reshape(-1) for each in found])
