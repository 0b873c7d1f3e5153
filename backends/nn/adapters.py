"""LoRA through `peft`: add adapters, save them so that plain `peft` loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from backends.errors import UserError
from backends.files import replacing_directory
from backends.nn.remote import RemoteLinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""By these names `peft` finds an adapter in a directory."""

_ADAPTER = "default"
_ADAPTER_IN_NAME = re.compile(rf"\.{_ADAPTER}(?=(\.\w+)?$)")


class AdapterError(UserError, RuntimeError):
    """An adapter cannot be made or written; the text says why and what to do."""


def base_name(weights: str) -> str:
    """How an adapter names its base: the whole path of what is here, or the hub's id as it is."""
    place = Path(weights)
    return str(place.resolve()) if place.exists() else weights


def add_lora(
    model: nn.Module, rank: int, alpha: int, seed: int, dropout: float = 0.0,
    base_model: str | None = None, linears: Collection[str] | None = None,
) -> PeftModel:  # fmt: skip
    """Wrap linears with a LoRA adapter, initialised from `seed`.

    base_model  what the adapter says it belongs to (`base_name`)
    linears     names of those to adapt; None takes the remote ones, or, of a model without any,
                all of it, but never the head

    Raises ValueError for dropout: lanes share one generator, so a run could not be repeated;
    AdapterError for a model that `peft` cannot adapt.
    """
    if dropout:
        raise ValueError("LoRA dropout is not reproducible with lanes; leave it at 0")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=_targets(model, linears), task_type="CAUSAL_LM"
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise AdapterError(f"peft cannot adapt this {type(model).__name__}: {said}") from error
    assert isinstance(wrapped, PeftModel)
    config.base_model_name_or_path = base_model
    return wrapped


def _targets(model: nn.Module, linears: Collection[str] | None) -> list[str] | str:
    """For `peft`: the last parts of the names where they are those of no other module."""
    names = {
        name for name, m in model.named_modules() if isinstance(m, RemoteLinear) and not m.is_head
    }
    if linears is not None:
        names = set(linears)
    if not names:
        return "all-linear"
    leaves = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if matched == names else names)


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    """Numbers in an adapter of linears with these (inputs, outputs)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def stored_name(name: str) -> str:
    """What `peft` calls a trainable parameter in an adapter's file."""
    return _ADAPTER_IN_NAME.sub("", name)


def config_text(model: nn.Module) -> bytes | None:
    """The adapter_config.json of a model with an adapter; None for one without."""
    if not isinstance(model, PeftModel):
        return None
    config = copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.dumps(facts, indent=2, sort_keys=True).encode()


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, whole or not at all.

    base_model  what it says it belongs to (`base_name`)

    Raises AdapterError when it cannot be written; what was there before is whole then.
    """
    config: Any = model.peft_config[_ADAPTER]
    config.base_model_name_or_path = base_model
    try:
        with replacing_directory(directory) as aside:
            model.save_pretrained(str(aside), save_embedding_layers=False)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise AdapterError(
            f"the adapter cannot be written to {directory} ({why}); what was trained is in the "
            "checkpoints: make room, and the same command writes it without training again"
        ) from error
