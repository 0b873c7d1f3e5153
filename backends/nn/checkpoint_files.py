"""What a checkpoint's files are, as far as it can be known without reading the weights.

Every way in which they can be damaged, foreign or of another kind ends in one line here, before
anything reads them whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import quantization_config as quantisers

from backends.files import read_bounded
from backends.nn.sources import CheckpointError, first_line

_CONFIG_BYTES_MAX = 16 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
LFS = b"version https://git-lfs"
_CODES = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
"""Types of safetensors that weights have when they are quantised."""
_INTEGERS = {"I16", "I32", "I64", "U16", "U32", "U64", "BOOL"}
"""And those that codes may be packed in, where a matrix belongs."""
DEQUANTISED = {
    "fp8": quantisers.FineGrainedFP8Config,
    "mxfp4": quantisers.Mxfp4Config,
    "compressed-tensors": quantisers.CompressedTensorsConfig,
}
"""Ways of quantising that transformers undoes while it loads, on any machine."""
_GET_WHOLE = "give the checkpoint that it was quantised from (see its model card)"


def stated_config(directory: Path) -> dict[str, Any]:
    """What config.json says. Raises CheckpointError when it is not there or says nothing."""
    path = directory / "config.json"
    if not path.exists():
        if (directory / "adapter_config.json").exists():
            raise CheckpointError(
                f"{directory} holds an adapter, not a base model; give the base that its "
                "adapter_config.json names"
            )
        ggufs = sorted(directory.glob("*.gguf"))
        if ggufs:
            raise CheckpointError(f"{directory} holds GGUF files; give one of them: {ggufs[0]}")
        raise CheckpointError(
            f"{directory} holds no config.json; give a directory that `save_pretrained` or "
            "`huggingface-cli download` made"
        )
    try:
        stated = json.loads(read_bounded(path, _CONFIG_BYTES_MAX))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON ({first_line(error)}); download it again"
        ) from error
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type; it is no config of transformers")
    if stated["model_type"] not in CONFIG_MAPPING:
        own = " and brings code of its own, which is not run here" if "auto_map" in stated else ""
        raise CheckpointError(
            f"{path}: transformers does not know the model type {stated['model_type']!r}{own}"
        )
    return stated


def require_alone(directory: Path, stated: dict[str, Any]) -> None:
    """Raises CheckpointError for what transformers would load beside or in place of the weights."""
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter beside the model, which transformers would put on it; "
            "move adapter_config.json away for the base alone, or merge them (`merge_and_unload`)"
        )
    other = stated.get("transformers_weights")
    if other is not None:
        raise CheckpointError(
            f"{directory}: its config names other weights (transformers_weights {other!r}); give "
            "them the usual names, and take the entry out"
        )


def parsed_config(place: Path, read: Callable[[], Any]) -> PretrainedConfig:
    try:
        config = read()
    except Exception as error:  # of any model type's own code, fed with any file
        raise CheckpointError(f"{place}: its config cannot be used: {first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def require_causal_type(place: Path, config: PretrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{place}: {kind} is an encoder-decoder; only models that predict the next token of "
            "one text (causal language models) are fine-tuned here"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{place}: transformers has no causal language model of type {kind!r}; give a model "
            "that predicts the next token"
        )


def weight_files(directory: Path) -> list[Path]:
    """Its safetensors files, each whole as far as its header says."""
    index, single = directory / _INDEX, directory / _SINGLE
    if single.exists():
        files: dict[Path, set[str]] = {single: set()}
    elif index.exists():
        files = _indexed(index)
    else:
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        also = ""
        if others:
            also = (
                f"; {others[0]} may run code when it is read, so it is not: convert it once with "
                "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
            )
        raise CheckpointError(f"{directory} holds no {_SINGLE} (nor an index of shards){also}")
    for path, names in files.items():
        _require_whole(path, names)
    return sorted(files)


def _indexed(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = json.loads(read_bounded(index, _CONFIG_BYTES_MAX))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({first_line(error)}); download it again"
        ) from error
    files: dict[Path, set[str]] = {}
    for name, file in pairs:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names a shard outside its own directory: {file!r}")
        files.setdefault(index.parent / file, set()).add(name)
    missing = sorted(path.name for path in files if not path.exists())
    if missing:
        raise CheckpointError(
            f"{index.parent}: {', '.join(missing[:3])} named in the index is not there; the "
            "download is incomplete"
        )
    if not files:
        raise CheckpointError(f"{index} names no shard; download it again")
    return files


def _require_whole(path: Path, names: set[str]) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise CheckpointError(
                f"{path} is a git-LFS pointer, not the weights; run `git lfs pull`, or download it"
            )
    try:
        with safe_open(path, framework="pt") as shard:
            there = set(shard.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut ({first_line(error)}); download it again"
        ) from error
    lost = sorted(names - there)
    if lost:
        raise CheckpointError(
            f"{path} lacks {lost[0]!r}, which the index says is in it; download it again"
        )


def quantisation_of(directory: Path, stated: dict[str, Any]) -> str | None:
    """How a checkpoint is quantised, where that can be undone. Raises CheckpointError where not."""
    found = stated.get("quantization_config")
    for part in stated.values():
        if found is None and isinstance(part, dict):
            found = part.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or method not in DEQUANTISED:
        raise CheckpointError(
            f"{directory} is quantised ({method or 'in an unknown way'}), which is not undone "
            f"here; {_GET_WHOLE}"
        )
    return str(method)


def require_plain(directory: Path, files: list[Path]) -> None:
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in list(shard.keys()):
                found = shard.get_slice(name)
                kind, shape = found.get_dtype(), found.get_shape()
                mask = len(shape) == 4 and shape[:2] == [1, 1]  # GPT-Neo and Pythia keep theirs
                integers = kind in _INTEGERS and len(shape) == 2 and name.endswith("weight")
                if (kind in _CODES and not mask) or integers:
                    raise CheckpointError(
                        f"{directory}: {name} holds {kind}, so the checkpoint is quantised though "
                        f"its config does not say how; {_GET_WHOLE}"
                    )


def require_once(directory: Path, files: list[Path], model: PreTrainedModel) -> None:
    """Raises CheckpointError for a tensor of the model that the files hold twice, not the same.

    Under one name in two shards, or with the base model's prefix and without: which of them is
    loaded is chance.
    """
    here: dict[str, tuple[Path, str]] = {}
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in list(shard.keys()):
                meant = prefix + name if prefix + name in known and name not in known else name
                if meant.startswith(2 * prefix) and meant not in known:
                    meant = meant.removeprefix(prefix)
                other = here.setdefault(meant, (path, name))
                if other != (path, name) and not _same(other, (path, name)):
                    raise CheckpointError(
                        f"{directory}: {meant} is there twice, as {other[1]} in {other[0].name} "
                        f"and as {name} in {path.name}, and they differ; leave the wrong one out"
                    )


def _same(*places: tuple[Path, str]) -> bool:
    """Whether the tensors of two files, by name, are the same."""
    found = []
    for path, name in places:
        with safe_open(path, framework="pt") as shard:
            found.append(shard.get_tensor(name))
    return found[0].dtype == found[1].dtype and torch.equal(found[0], found[1])
