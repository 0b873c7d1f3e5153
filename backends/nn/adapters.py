"""LoRA through `peft`: add adapters, save them so that plain `peft` loads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn

from backends.errors import UserError
from backends.files import read_bounded, replacing_directory
from backends.nn.remote import RemoteLinear
from backends.options import RANK
from backends.places import named

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""By these names `peft` finds an adapter in a directory."""

_CONFIG_BYTES_MAX = 1 << 20


def _rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= RANK.most


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def _texts(value: object) -> bool:
    several = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return value is None or isinstance(value, str) or several


def _layers(value: object) -> bool:
    several = isinstance(value, list) and all(type(v) is int for v in value)
    return value is None or type(value) is int or several


_TAKEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, f"no whole number from 1 to {RANK.most}"),
    "lora_alpha": (_number, "no finite number"),
    "target_modules": (_texts, "neither a name nor a list of names"),
    "exclude_modules": (_texts, "neither a name nor a list of names"),
    "layers_to_transform": (_layers, "neither a whole number nor a list of them"),
    "layers_pattern": (_texts, "neither a name nor a list of names"),
    "rank_pattern": (
        lambda value: isinstance(value, dict) and all(map(_rank, value.values())),
        f"no object of whole numbers from 1 to {RANK.most}",
    ),
    "alpha_pattern": (
        lambda value: isinstance(value, dict) and all(map(_number, value.values())),
        "no object of finite numbers",
    ),
    "use_rslora": (lambda value: isinstance(value, bool), "neither true nor false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "neither true nor false"),
    "task_type": (lambda value: value is None or isinstance(value, str), "no name"),
}
"""What of an adapter's config says how it computes; when it is right, and what it is if not."""
_IGNORED = frozenset(
    {
        "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout",
    }
)  # fmt: skip
"""What says nothing about an adapter that is trained and computes."""

_ADAPTER = "default"
_ADAPTER_IN_NAME = re.compile(rf"\.{_ADAPTER}(?=(\.\w+)?$)")


class AdapterError(UserError, RuntimeError):
    """An adapter cannot be made or written; the text says why and what to do."""


def base_name(weights: str) -> str:
    """How an adapter names its base: the whole path of what is here, or the hub's id as it is."""
    place = named(weights)
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


def load_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """A model with the LoRA adapter of a directory, in evaluation mode, to compute with.

    The files are those of `save_adapter`, or of `peft` for any plain LoRA. Nothing is unpickled,
    and nothing that the config names is imported.

    Raises AdapterError when they cannot be read, or are not for this model.
    """
    config = _read_config(directory)
    try:
        if not (directory / WEIGHTS_FILE).is_file():  # a pipe would be waited for
            raise OSError("no such file")
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            wrapped = _wrapped(model, config, directory, shapes)
            own = {stored_name(n): p for n, p in wrapped.named_parameters() if "lora_" in n}
            for name, parameter in own.items():
                parameter.data.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise AdapterError(f"{directory / WEIGHTS_FILE} cannot be read: {why}") from error
    broken = next((n for n, p in own.items() if not p.isfinite().all()), None)
    if broken is not None:
        raise AdapterError(f"{directory}: {broken} has numbers that are not finite; train it again")
    return wrapped.eval()


def stated_base(directory: Path) -> str | None:
    """What an adapter's config says that it belongs to; None where it says nothing.

    Raises AdapterError when it is the config of no LoRA.
    """
    _read_config(directory)
    facts = json.loads(read_bounded(directory / CONFIG_FILE, _CONFIG_BYTES_MAX))
    named = facts.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _wrapped(
    model: nn.Module, config: LoraConfig, directory: Path, shapes: dict[str, tuple[int, ...]]
) -> PeftModel:
    """The model with an adapter whose numbers have these shapes in its file."""
    ranks = {config.r, *config.rank_pattern.values()}
    there = {shape[0] for name, shape in shapes.items() if "lora_A" in name and shape}
    if shapes and not there & ranks:  # before anything of a wrong rank takes memory
        raise AdapterError(
            f"{directory}: an adapter of another model: of rank {sorted(ranks)} by its config, "
            f"and {sorted(there)[:8]} by its numbers"
        )
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:
        said = " ".join(str(error).split())[:300]
        raise AdapterError(f"{directory}: not for this model: {said}") from error
    assert isinstance(wrapped, PeftModel)
    wanted = {stored_name(n): tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    _require_shapes(directory, shapes, wanted)
    return wrapped


def _read_config(directory: Path) -> LoraConfig:
    """Raises AdapterError when it is none of a plain LoRA."""
    path = directory / CONFIG_FILE
    try:
        facts = json.loads(read_bounded(path, _CONFIG_BYTES_MAX))
        if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
            raise ValueError("it is no LoRA")
        usual = LoraConfig().to_dict()
        strange = sorted(
            str(name)
            for name in facts.keys() - _IGNORED - {*_TAKEN}
            if facts[name]
            and facts[name] != usual.get(name)
            # Others (PiSSA, OLoRA, LoftQ) change the base's weights, too.
            and not (name == "init_lora_weights" and facts[name] in ("gaussian", "orthogonal"))
        )
        if strange:
            raise ValueError(f"it uses {', '.join(strange)[:200]}, which does not work here")
        for name, (right, otherwise) in _TAKEN.items():
            if name in facts and not right(facts[name]):
                raise ValueError(f"{name} is {otherwise}")
        return LoraConfig(**{name: facts[name] for name in _TAKEN if name in facts})
    except OSError as error:
        raise AdapterError(
            f"{path}: {error.strerror or error}; name the directory of an adapter, as a run's "
            "`adapter`"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not the config of a LoRA that works here: {error}"
        ) from error


def _require_shapes(
    directory: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raises AdapterError unless the names and sizes in a file are those of the model."""
    for name in sorted(found.keys() | wanted.keys()):
        there, here = found.get(name), wanted.get(name)
        if there != here:
            raise AdapterError(
                f"{directory}: an adapter of another model: {name} is {_size(there)} there and "
                f"{_size(here)} in this one; give the --weights that it was trained on"
            )


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
