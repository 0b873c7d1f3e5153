"""LoRA through `peft`: add adapters, save them so that plain `peft` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from backends.files import replacing_directory


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int, dropout: float = 0.0) -> PeftModel:
    """Wrap every linear but the head with a LoRA adapter, initialised from `seed`.

    Raises ValueError for dropout: lanes share one generator, so a run could not be repeated.
    """
    if dropout:
        raise ValueError("LoRA dropout is not reproducible with lanes; leave it at 0")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, whole or not at all.

    base_model  directory or hub id of the base weights, as `peft` records it
    """
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base_model
    with replacing_directory(directory) as aside:
        model.save_pretrained(str(aside), save_embedding_layers=False)
