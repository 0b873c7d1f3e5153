"""Gradient checkpointing of a base that stays in evaluation mode.

transformers' layers recompute themselves only in training mode, which would bring the base's own
dropout back. Remote products are part of what is recomputed, so each goes up a second time, under
a new secret and with new noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_CACHES = ("past_key_values", "layer_past")
"""What a layer may be given to write keys and values to; twice would be once too often."""


def recompute_in_evaluation(model: nn.Module) -> None:
    """Let `gradient_checkpointing_enable` work although the layers are never told to train.

    Where no gradient is wanted nothing is recomputed.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _recomputed(layer, layer.forward)


def _recomputed(layer: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.gradient_checkpointing and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        kwargs |= {name: None for name in _CACHES if name in kwargs}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return layer._gradient_checkpointing_func(partial(inner, **kwargs), *args)

    return forward
