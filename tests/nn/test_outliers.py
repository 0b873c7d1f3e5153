"""Outlier channels: activations of a few channels far above the rest, as trained models have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from backends.he import preparation
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.net.inprocess import in_process
from backends.nn.adapters import add_lora, trainable
from backends.nn.local import localise
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import token_losses
from tests.nn.conftest import LLAMA, tokens

FACTOR = 300.0
CHANNELS = (1, 5, 12, 17, 22, 30, 41, 46)


class Outliers(RandomBase):
    """The tiny Llama with a norm's gain FACTOR times in CHANNELS, and what it feeds as much less:
    the same function."""

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        value = super().get(name, shape)
        if name.endswith("layernorm.weight"):
            value[list(CHANNELS)] *= FACTOR
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            value[:, list(CHANNELS)] /= FACTOR
        return value


BASE = Outliers(LLAMA, 0, deviation=0.1)


def prepared(directory: Path) -> PreparedModel:
    """By the preset in which nothing can wrap."""
    skeleton = build_skeleton(BASE)
    return prepare(
        directory, skeleton.groups, skeleton.load_weight, preset("exact"),
        lambda label, done: None,
    )  # fmt: skip


def gradients(model: nn.Module) -> torch.Tensor:
    """Of new adapters, all in one vector."""
    adapted = add_lora(model, 8, 16, seed=0)
    parameters = trainable(adapted)
    for name, parameter in parameters.items():
        if "lora_B" in name:  # zero at first, and A's gradients with it
            nn.init.normal_(parameter, std=1e-4)
    loss = token_losses(adapted, tokens(4, 32))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(parameters.values()))])


@contextmanager
def private(model: PreparedModel) -> Iterator[Skeleton]:
    """The owner's model, its products under encryption."""
    skeleton, parameters = build_skeleton(BASE), model.parameters
    assert parameters is not None
    owner = MlweOwner(parameters, model.public_matrix())
    model.guard(owner)
    with (
        in_process(model, owner, [MlweWorker()]) as (client, _),
        skeleton.remote.connected(client.linear),
    ):
        yield skeleton


def off(model: PreparedModel) -> tuple[float, float]:
    """How far the private adapters' gradients are from clear's: of the same quantised weights, and
    of the model's own."""
    with private(model) as skeleton:
        found = gradients(skeleton.model)
    same, own = build_skeleton(BASE), BASE.outline(torch.float32)
    localise(same, model)
    state = {name: BASE.get(name, p.shape) for name, p in own.named_parameters()}
    own.load_state_dict(state, strict=False, assign=True)
    own.tie_weights()
    own.requires_grad_(False)
    answers = [gradients(clear) for clear in (same.model, own)]
    return tuple(((found - g).norm() / g.norm()).item() for g in answers)  # type: ignore[return-value]


def test_outliers_cost_the_gradients_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight channels at 300 times: without factors the adapters' gradients are far off."""
    cipher, all_of_it = off(prepared(tmp_path / "evened"))
    assert cipher < 0.015
    assert all_of_it < 0.05
    monkeypatch.setattr(
        preparation, "channel_scales", lambda w, d: np.ones(w[0].shape[1], np.float32)
    )
    worse_cipher, worse = off(prepared(tmp_path / "as-they-are"))
    assert worse_cipher > 3 * cipher
    assert worse > 0.2
