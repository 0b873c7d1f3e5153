"""Making one checkpoint of a base and an adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from backends.errors import UserError
from backends.files import replacing_directory
from backends.nn.adapters import base_name, load_adapter, stated_base
from backends.nn.base import Checkpoint, open_base
from backends.nn.checkpoint_files import weight_files
from backends.nn.sources import first_line
from backends.places import PlaceError, named, require_room
from scenarios.cli import one_line

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
TOKENIZER_FILES = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*",
)  # fmt: skip
"""What belongs to a tokenizer in a checkpoint's directory."""


class MergeError(UserError, ValueError):
    """These cannot be merged; the text says why and what to do."""


def merge(
    weights: str, adapter: Path, into: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a checkpoint of a base with its adapter to a new directory; returns figures.

    weights  a checkpoint's directory, or an id of the hub
    dtype    of the numbers; None takes the base's

    Raises CheckpointError and TokenizerError for the base, AdapterError for the adapter, MergeError
    when they do not belong together or the base is quantised, WriteError; nothing is there then.
    """
    base = open_base(weights)
    _require_plain(weights, base)
    base.tokenizer()
    _require_own(base, adapter, weights)
    less = "" if dtype is None or dtype.itemsize == 2 else ", or leave --dtype out"
    needed = _bytes_in(weight_files(base.directory), dtype)
    require_room(into, needed, "the merged model", f"choose another place with --into{less}")
    model = _loaded(base, dtype)
    wrapped = load_adapter(model, adapter)
    _require_untied(wrapped)
    merged: Any = wrapped.merge_and_unload()
    with replacing_directory(into) as aside:
        try:
            merged.save_pretrained(aside)
        except (ValueError, RuntimeError, SafetensorError) as error:
            raise MergeError(f"{into}: transformers cannot save it: {first_line(error)}") from error
        for pattern in TOKENIZER_FILES:
            for file in filter(Path.is_file, base.directory.glob(pattern)):
                shutil.copyfile(file, aside / file.name)
    return _figures(into) | {"adapter": str(adapter), "dtype": str(merged.dtype).split(".")[-1]}


def _require_plain(weights: str, base: Checkpoint) -> None:
    if named(weights).is_file() or getattr(base.config, "quantization_config", None):
        raise MergeError(
            f"{weights} is quantised: adding an adapter to rounded numbers would lose most of it; "
            "give the checkpoint in floating point that it was made from"
        )


def _require_own(base: Checkpoint, adapter: Path, weights: str) -> None:
    """Raises MergeError when the base that an adapter names is here, and another one.

    What cannot be known is said: a name is no proof of which files an adapter was trained on.
    """
    stated = stated_base(adapter)
    if stated is None:
        print("the adapter names no base; only names and shapes of its numbers were compared")
        return
    same = stated in (weights, base_name(weights))
    other = None if same else _here(stated)
    if other is None:
        print(one_line(
            f"the adapter says that its base is {stated}; merging it with "
            + ("that, as it is now" if same else weights)
            + ": of its files only names and shapes were compared"
        ))  # fmt: skip
    elif open_base(other).identity() != base.identity():
        raise MergeError(
            f"{adapter} was trained on {stated}, and {weights} is another model; give --model "
            f"{stated}"
        )


def _here(stated: str) -> Path | None:
    """Where a base lies on this machine: a directory, or what was downloaded of the hub's id."""
    try:
        if (named(stated) / "config.json").is_file():
            return named(stated)
        found = try_to_load_from_cache(stated, "config.json")
    except (OSError, ValueError, PlaceError):  # of another machine: no path here, or not ours
        return None
    return Path(found).parent if isinstance(found, str) else None


def _bytes_in(files: Sequence[Path], dtype: torch.dtype | None) -> int:
    """What these tensors take in this type; None is their own."""
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found = file.get_slice(name)
                own = _ITEM_BYTES.get(found.get_dtype(), 4)
                total += math.prod(found.get_shape()) * (own if dtype is None else dtype.itemsize)
    return total


def _loaded(base: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=dtype or "auto", use_safetensors=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # of transformers and of any model's code, fed with any file
        raise MergeError(
            f"{base.directory}: transformers cannot load it: {first_line(error)}"
        ) from error
    return model


def _require_untied(wrapped: PeftModel) -> None:
    """Merging into a tensor that is used twice would change the other use, too."""
    tied = {id(p) for p in _tied(wrapped)}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and id(module.get_base_layer().weight) in tied:
            raise MergeError(
                f"the adapter changes {name.removeprefix('base_model.model.')}, whose weights are "
                "the embeddings, too; it cannot be merged, load it with peft"
            )


def _tied(wrapped: PeftModel) -> list[torch.Tensor]:
    seen: dict[int, str] = {}
    found = []
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            found.append(parameter)
        seen[id(parameter)] = name
    return found


def _figures(into: Path) -> dict[str, Any]:
    tensors, size = 0, 0
    for path in into.glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            tensors += len(file.keys())
    files = sorted(path.name for path in into.iterdir())
    return {"into": str(into), "tensors": tensors, "bytes": size, "files": files}
