"""Random models in which nothing is at its neutral value, so that nothing left out goes unseen."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


def shaken(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model of a config, float32, in evaluation mode; the same every time."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    shake(model)
    return model.eval()  # type: ignore[no-any-return]


def shake(model: nn.Module, seed: int = 0) -> None:
    """New matrices, and norms, biases and persistent buffers moved from where they were, in place.

    Linear outputs keep about the size of their inputs. What only looks like a weight (decays,
    time constants, tables) is moved by a few per cent, so that it stays in its domain.
    """
    seen: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen and parameter.is_floating_point():
                    seen.add(id(parameter))
                    _shake_parameter(module, parameter, noise(f"{path}.{name}", parameter, seed))
            for name, buffer in module.named_buffers(recurse=False):
                if name in module._non_persistent_buffers_set or not buffer.is_floating_point():
                    continue
                # Some are variances or scales: they stay positive.
                change = noise(f"{path}.{name}", buffer, seed)
                buffer.mul_(torch.exp(0.2 * change)).add_(0.05 * change.abs())


def noise(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal float32 values of a tensor's shape, by its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(like.shape, generator=generator)


def _shake_parameter(module: nn.Module, parameter: nn.Parameter, change: torch.Tensor) -> None:
    if isinstance(module, nn.Embedding):
        parameter.copy_(0.5 * change)
        if module.padding_idx is not None:
            parameter[module.padding_idx] = 0
    elif isinstance(module, nn.Linear | Conv1D) and parameter.dim() == 2:
        inputs = parameter.shape[0 if isinstance(module, Conv1D) else 1]
        parameter.copy_(0.8 * inputs**-0.5 * change)
    elif parameter.dim() == 3 and min(parameter.shape[1:]) > 4:  # a stack of experts
        parameter.copy_(0.8 * max(parameter.shape[1:]) ** -0.5 * change)
    else:
        parameter.mul_(1 + 0.1 * change).add_(0.05 * change)
