"""A few model types in every layout that transformers writes, and in some that others do."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.zoo.comparing import Outcome, compare, last_line
from benchmarks.zoo.configs import tiny_config
from benchmarks.zoo.shaking import shaken

TYPES = ("llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3_moe", "opt", "phi")
_SHARD = "20KB"


Write: TypeAlias = Callable[[PreTrainedModel, Path], None]
"""Saves a model to an empty directory; where the layout rounds, it rounds the model likewise."""


@dataclass(frozen=True)
class Layout:
    """How a model lies on the disk, and what must become of it.

    tied    what the config says of the head; None: what its class says
    wanted  "exact", "refused", or both where either is right
    says    what a refusal must mention (a regular expression)
    """

    write: Write
    tied: bool | None = None
    wanted: str = "exact"
    says: str = ""


def one_file(model: PreTrainedModel, place: Path) -> None:
    """As `save_pretrained` writes it."""
    model.save_pretrained(place)


def sharded(model: PreTrainedModel, place: Path) -> None:
    """In several files and an index."""
    model.save_pretrained(place, max_shard_size=_SHARD)


def rounded(dtype: torch.dtype) -> Write:
    """In shards of a half type, which the model is rounded to."""

    def write(model: PreTrainedModel, place: Path) -> None:
        _of_type(model, dtype).save_pretrained(place, max_shard_size=_SHARD)
        state = model.state_dict()
        with torch.no_grad():
            for tensor in state.values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(dtype))

    return write


def _of_type(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    other: Any = copy.deepcopy(model)
    return other.to(dtype)  # type: ignore[no-any-return]


def base_only(model: PreTrainedModel, place: Path) -> None:
    """As `AutoModel` saves it: names without the base model's prefix, no head."""
    base: Any = model.base_model
    base.save_pretrained(place)


def head_of_its_own(model: PreTrainedModel, place: Path) -> None:
    """An untied model whose config says that it is tied."""
    model.save_pretrained(place)
    edit_config(place, tie_word_embeddings=True)


def pickled(model: PreTrainedModel, place: Path) -> None:
    """As torch saves it."""
    model.config.save_pretrained(place)
    torch.save(model.state_dict(), place / "pytorch_model.bin")


def quantised(dtype: torch.dtype, scale: str, config: dict[str, Any] | None) -> Write:
    """Linears of a dtype with a scale beside each, as fp8 and int8 checkpoints have them.

    scale   the last part of its name; "SCB" is bitsandbytes': one a row, in units of 1/127
    config  the config's `quantization_config`, if any
    """

    def write(model: PreTrainedModel, place: Path) -> None:
        model.save_pretrained(place)
        stored = load_file(place / "model.safetensors")
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | Conv1D) or module is head:
                continue
            weight = stored.get(f"{name}.weight")
            if weight is None:  # stored under a name of its own
                continue
            if scale == "SCB":
                scales = weight.abs().amax(1)
                codes = (weight / scales[:, None] * 127).round()
                known = codes * scales[:, None] / 127
            else:
                scales = (weight.abs().max() / 400).reshape(1, 1)
                codes = (weight / scales).to(dtype)
                known = codes.float() * scales
            stored[f"{name}.weight"] = codes.to(dtype)
            stored[f"{name}.{scale}"] = scales
            with torch.no_grad():
                module.weight.copy_(known)
        save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            edit_config(place, quantization_config=config)

    return write


def edit_config(place: Path, **values: Any) -> None:
    """Other values in config.json; a None goes."""
    path = place / "config.json"
    facts = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True}
_CODES = r"(?i)quanti[sz]|fp8|float8|int8|scale"
_EITHER = "exact or refused"

LAYOUTS: dict[str, Layout] = {
    "one file": Layout(one_file),
    "sharded": Layout(sharded),
    "bf16": Layout(rounded(torch.bfloat16)),
    "fp16": Layout(rounded(torch.float16)),
    "tied": Layout(one_file, tied=True),
    "untied": Layout(one_file, tied=False),
    "untied, config says tied": Layout(head_of_its_own, tied=False),
    # A bias of the head is lost with the head.
    "base model only, tied": Layout(base_only, tied=True, wanted=_EITHER, says=r"(?i)head.bias"),
    "base model only, head lost": Layout(
        base_only, tied=False, wanted="refused", says=r"(?i)head|embed_out|missing|no tensor"
    ),
    "pickled": Layout(pickled, wanted="refused", says=r"(?i)pickle|safetensors"),
    "fp8": Layout(
        quantised(torch.float8_e4m3fn, "weight_scale_inv", FP8), wanted=_EITHER, says=_CODES
    ),
    "fp8, config silent": Layout(
        quantised(torch.float8_e4m3fn, "weight_scale_inv", None), wanted=_EITHER, says=_CODES
    ),
    "fp8, other scales": Layout(
        quantised(torch.float8_e4m3fn, "weight_scale", None), wanted=_EITHER, says=_CODES
    ),
    "int8": Layout(quantised(torch.int8, "SCB", INT8), wanted=_EITHER, says=_CODES),
    "int8, config silent": Layout(quantised(torch.int8, "SCB", None), wanted=_EITHER, says=_CODES),
}
NAMES = tuple(f"{model_type}: {layout}" for model_type in TYPES for layout in LAYOUTS)


def row(name: str, place: Path) -> dict[str, Any]:
    """What became of one type in one layout, and whether that was right."""
    model_type, _, layout_name = name.partition(": ")
    layout = LAYOUTS[layout_name]
    try:
        config = tiny_config(model_type)
        if layout.tied is not None:
            config.tie_word_embeddings = layout.tied
        model = shaken(config)
        layout.write(model, place)
    except Exception as error:
        outcome = Outcome("not built", last_line(error))
    else:
        outcome = compare(place, model, least_remote=0.0)
    expected = outcome.status in layout.wanted.split(" or ")
    if outcome.status == "refused":
        expected = expected and re.search(layout.says, outcome.why) is not None
    return {"wanted": layout.wanted, "expected": expected, **asdict(outcome)}
