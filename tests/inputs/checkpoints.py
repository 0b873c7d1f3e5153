"""Small checkpoints, as people have them: whole in many layouts, of other kinds, and damaged.

Every maker writes into an empty directory and returns what a person would name, with the model it
should be where there is one.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from backends.nn.adapters import add_lora
from benchmarks.zoo.configs import tiny_config
from benchmarks.zoo.layouts import Write, edit_config, one_file
from benchmarks.zoo.shaking import shaken
from tests.inputs.gguf import write_gguf

WEIGHTS, INDEX, GGUF = "model.safetensors", "model.safetensors.index.json", "lfm2.gguf"
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4f2ac5fdb8a5b1c60d1e9a3d1a2e1a1a6c8f5e0d9b3c2a1f0e9d8c7b6a5f4e3d\n"
    b"size 2471645608\n"
)


@dataclass(frozen=True)
class Brought:
    """path: what is named; truth: the model in clear that it must be, in evaluation mode."""

    path: Path
    truth: PreTrainedModel | None = None


Maker: TypeAlias = Callable[[Path], Brought]
Damage: TypeAlias = Callable[[Path], None]


def tiny(model_type: str, **values: Any) -> PreTrainedModel:
    """A shaken random model of a type's tiny config, with these values in it."""
    config = tiny_config(model_type)
    for name, value in values.items():
        setattr(config, name, value)
    return shaken(config)


# --- whole ---------------------------------------------------------------------------------------


def saved(write: Write = one_file, model_type: str = "llama", **values: Any) -> Maker:
    """A model in a layout, and what it is."""

    def make(place: Path) -> Brought:
        model = tiny(model_type, **values)
        write(model, place)
        return Brought(place, model)

    return make


def gguf(*damages: Damage) -> Maker:
    """A GGUF file, an LFM2 in float32 as llama.cpp writes it, to which these are done in turn."""

    def make(place: Path) -> Brought:
        model = tiny("lfm2", block_auto_adjust_ff_dim=False)
        write_gguf(place / GGUF, *_lfm2_parts(model))
        for damage in damages:
            damage(place)
        return Brought(place / GGUF, model)

    return make


def _lfm2_parts(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config: Any = model.config
    facts: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0
            for kind in config.layer_types
        ],
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "shortconv.l_cache": config.conv_L_cache,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    metadata = {"general.architecture": "lfm2"} | {f"lfm2.{k}": v for k, v in facts.items()}
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(config.vocab_size)]
    names = {
        "model.embed_tokens.": "token_embd.", "model.embedding_norm.": "token_embd_norm.",
        "model.layers.": "blk.", ".operator_norm.": ".attn_norm.",
        ".self_attn.q_proj.": ".attn_q.", ".self_attn.k_proj.": ".attn_k.",
        ".self_attn.v_proj.": ".attn_v.", ".self_attn.out_proj.": ".attn_output.",
        ".self_attn.q_layernorm.": ".attn_q_norm.", ".self_attn.k_layernorm.": ".attn_k_norm.",
        ".feed_forward.w1.": ".ffn_gate.", ".feed_forward.w3.": ".ffn_up.",
        ".feed_forward.w2.": ".ffn_down.", ".conv.in_proj.": ".shortconv.in_proj.",
        ".conv.out_proj.": ".shortconv.out_proj.", ".conv.conv.": ".shortconv.conv.",
    }  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.squeeze(1) if tensor.dim() == 3 else tensor
    return metadata, tensors


# --- other kinds ---------------------------------------------------------------------------------


def other_kind(kind: PretrainedConfig) -> Maker:
    """A model of a config that is no causal language model, as `AutoModel` saves it."""

    def make(place: Path) -> Brought:
        torch.manual_seed(0)
        AutoModel.from_config(kind).save_pretrained(place)  # type: ignore[no-untyped-call]
        return Brought(place)

    return make


def adapter(place: Path) -> Brought:
    """What `peft` saves, given for a base model."""
    add_lora(tiny("llama"), rank=2, alpha=4, seed=0).save_pretrained(place)
    return Brought(place)


# --- damaged -------------------------------------------------------------------------------------


def damaged(*damages: Damage, model_type: str = "llama", shard: str = "5GB") -> Maker:
    """A checkpoint to which these are done in turn; its path is the directory's."""

    def make(place: Path) -> Brought:
        model, files = _whole(model_type, shard)
        for name, content in files.items():
            (place / name).write_bytes(content)
        for damage in damages:
            damage(place)
        return Brought(place, copy.deepcopy(model))

    return make


@cache
def _whole(model_type: str, shard: str) -> tuple[PreTrainedModel, dict[str, bytes]]:
    """A model, and the files it is saved as."""
    model = tiny(model_type)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, max_shard_size=shard)
        return model, {path.name: path.read_bytes() for path in Path(place).iterdir()}


def named(name: str, make: Maker) -> Maker:
    """The same, but a person names another path, from the directory."""

    def make_and_name(place: Path) -> Brought:
        make(place)
        return Brought(place / name)

    return make_and_name


def nothing(place: Path) -> Brought:
    """An empty directory."""
    return Brought(place)


def config(**values: Any) -> Damage:
    """Other values in config.json; a None goes."""
    return lambda place: edit_config(place, **values)


def write(name: str, content: bytes) -> Damage:
    """Other content in a file, or a new file."""

    def change(place: Path) -> None:
        (place / name).write_bytes(content)

    return change


def cut(name: str, keep: float | int) -> Damage:
    """The first part of a file: a share of it, or so many bytes."""

    def change(place: Path) -> None:
        content = (place / name).read_bytes()
        size = keep if isinstance(keep, int) else int(len(content) * keep)
        (place / name).write_bytes(content[:size])

    return change


def without(*names: str) -> Damage:
    """Files gone; a name may be a pattern."""

    def change(place: Path) -> None:
        for name in names:
            for path in list(place.glob(name)):
                path.unlink()

    return change


def into_subfolder(place: Path) -> None:
    """Everything one folder further down, as trainers lay out their checkpoints."""
    below = place / "checkpoint-100"
    files = list(place.iterdir())
    below.mkdir()
    for file in files:
        shutil.move(file, below)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Another tensor of that name, or None for none."""

    def apply(place: Path) -> None:
        path = place / WEIGHTS
        if not path.exists():
            path = place / json.loads((place / INDEX).read_text())["weight_map"][name]
        stored = load_file(path)
        changed = change(stored.pop(name))
        if changed is not None:
            stored[name] = changed.contiguous()
        save_file(stored, path, metadata={"format": "pt"})

    return apply


def twice(name: str, other: str) -> Damage:
    """A tensor under another name too, there with other values."""
    return more(other, lambda stored: 2 * stored[name])


def more(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Damage:
    """One tensor more."""

    def apply(place: Path) -> None:
        stored = load_file(place / WEIGHTS)
        stored[name] = make(stored)
        save_file(stored, place / WEIGHTS, metadata={"format": "pt"})

    return apply


def in_two_shards(name: str) -> Damage:
    """A tensor in a shard that is not the one of the index too, with other values."""

    def apply(place: Path) -> None:
        where = json.loads((place / INDEX).read_text())["weight_map"]
        other = place / next(file for file in where.values() if file != where[name])
        stored = load_file(other) | {name: 2 * load_file(place / where[name])[name]}
        save_file(stored, other, metadata={"format": "pt"})

    return apply


def beside(make: Maker) -> Damage:
    """What this makes, in the same directory; the model's own files stay."""

    def apply(place: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch))
            shutil.copytree(scratch, place, dirs_exist_ok=True)

    return apply


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor with this as its second element."""

    def change(old: torch.Tensor) -> torch.Tensor:
        new = old.clone()
        new.view(-1)[1] = value
        return new

    return change


def weight_map(change: Callable[[dict[str, str]], Any]) -> Damage:
    """Another `weight_map` in the index of shards."""

    def apply(place: Path) -> None:
        path = place / INDEX
        index = json.loads(path.read_text())
        index["weight_map"] = change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply
