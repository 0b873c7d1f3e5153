"""Checkpoints, read by transformers: a directory, a GGUF file, or a model of the hub.

Names, renames, tied weights, types, dequantisation, buffers, shards, conversions: all by
`from_pretrained`. It is told that the linears that go remote live on the disk, so that it leaves
them where they are (or, where it has to convert them, in a temporary folder), and says where.
The model is never in memory whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import tempfile
import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as reports
from transformers.utils import quantization_config as quantisers

from backends.files import read_bounded
from backends.nn.sources import Base, CheckpointError, Loaded, first_line

_CONFIG_BYTES_MAX = 16 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LFS = b"version https://git-lfs"
_GGUF = b"GGUF"
_CODES = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
"""Types of safetensors that weights have when they are quantised."""
_DEQUANTISED = {
    "fp8": quantisers.FineGrainedFP8Config,
    "mxfp4": quantisers.Mxfp4Config,
    "compressed-tensors": quantisers.CompressedTensorsConfig,
}
"""Ways of quantising that transformers undoes while it loads, on any machine."""
_GET_WHOLE = "give the checkpoint that it was quantised from (see its model card)"


def open_base(place: str | Path) -> Checkpoint:
    """A checkpoint's directory, a GGUF file, or the id of a model of the hub, which is downloaded.

    Everything that can be known without reading the weights is checked. Raises CheckpointError.
    """
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            return _directory(path)
        if path.is_file():
            return _file(path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{place}: {getattr(error, 'strerror', None) or error}") from error
    return _directory(_download(str(place)))


def _file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start.startswith(_GGUF):
        raise CheckpointError(
            f"{path} is a file, and no GGUF; give the directory that holds config.json and the "
            "weights"
        )
    config = _parsed(path, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    _require_causal_type(path, config)
    return Checkpoint(path.parent, config, [path], gguf=path.name)


def _directory(directory: Path) -> Checkpoint:
    stated = _stated_config(directory)
    config = _parsed(directory, lambda: AutoConfig.from_pretrained(directory))
    _require_causal_type(directory, config)
    files = _weight_files(directory)
    quantisation = _quantisation(directory, stated)
    if quantisation is None:
        _require_plain(directory, files)
    return Checkpoint(directory, config, files, quantisation)


def _stated_config(directory: Path) -> dict[str, Any]:
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


def _parsed(place: Path, read: Any) -> PretrainedConfig:
    try:
        config = read()
    except Exception as error:  # of any model type's own code, fed with any file
        raise CheckpointError(f"{place}: its config cannot be used: {first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _require_causal_type(place: Path, config: PretrainedConfig) -> None:
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


def _weight_files(directory: Path) -> list[Path]:
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
        if file.read(len(_LFS)) == _LFS:
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


def _quantisation(directory: Path, stated: dict[str, Any]) -> str | None:
    """How a checkpoint is quantised, where that can be undone. Raises CheckpointError where not."""
    found = stated.get("quantization_config")
    for part in stated.values():
        if found is None and isinstance(part, dict):
            found = part.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in _DEQUANTISED:
        raise CheckpointError(
            f"{directory} is quantised ({method or 'in an unknown way'}), which is not undone "
            f"here; {_GET_WHOLE}"
        )
    return str(method)


def _require_plain(directory: Path, files: list[Path]) -> None:
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in list(shard.keys()):
                kind = shard.get_slice(name).get_dtype()
                if kind in _CODES:
                    raise CheckpointError(
                        f"{directory}: {name} holds {kind}, so the checkpoint is quantised though "
                        f"its config does not say how; {_GET_WHOLE}"
                    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{hub_id}: no such directory or file")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a directory here nor a model the hub gave "
            f"({type(error).__name__}); check the spelling, the connection, and your access"
        ) from error


class Checkpoint(Base):
    """Files that transformers reads.

    directory     of config and tokenizer
    files         that hold the weights
    quantisation  to undo while loading, of `_DEQUANTISED`
    gguf          the name of the GGUF file that it is
    """

    def __init__(
        self, directory: Path, config: PretrainedConfig, files: list[Path],
        quantisation: str | None = None, gguf: str | None = None,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.config = config
        self._files = files
        self._quantisation = quantisation
        self._gguf = gguf

    def tokenizer(self) -> Any:
        """Its tokenizer, which cuts no text. Raises CheckpointError when it has none."""
        try:
            with _quiet():
                found = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True,
                    **({"gguf_file": self._gguf} if self._gguf else {}),
                )  # fmt: skip
        except Exception as error:  # of any tokenizer's own code, fed with any file
            raise CheckpointError(
                f"{self.directory}: no usable tokenizer ({first_line(error)}); put the files "
                "tokenizer.json and tokenizer_config.json of the model there"
            ) from error
        found.model_max_length = sys.maxsize  # texts are cut into sequences afterwards
        return found

    def identity(self) -> str:
        """Of the files' bytes."""
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in self._files)
        name = self._files[0] if self._gguf else self.directory
        undone = f", {self._quantisation} undone" if self._quantisation else ""
        return f"checkpoint {name} ({size / 1e9:.2f} GB{undone})"

    def load(self, dtype: torch.dtype, remote: Collection[str]) -> Loaded:
        """Raises CheckpointError when the files are not what the config says."""
        model, info, scratch = self._dispatched(dtype, remote)
        notes = self._notes(model, info)
        read = _reader(model, remote)
        remove_hook_from_module(model, recurse=True)
        model.__dict__.pop("hf_device_map", None)
        # What had to be converted is in a folder that goes when nobody can read it any more.
        weakref.finalize(read, scratch.cleanup)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta and name.rpartition(".")[0] not in remote:
                raise CheckpointError(f"{self.directory}: no values for {name!r} were found")
        return Loaded(model, read, notes)

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """By a model of its own, its linears streamed from the disk."""
        outline = self.outline(dtype)
        linears = [n for n, m in outline.named_modules() if type(m) is nn.Linear]
        model, _, scratch = self._dispatched(dtype, linears)
        with scratch, torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            return logits.float()

    def _dispatched(
        self, dtype: torch.dtype, remote: Collection[str]
    ) -> tuple[PreTrainedModel, dict[str, Any], tempfile.TemporaryDirectory[str]]:
        """The model, able to compute, with the weights of `remote` on the disk."""
        more: dict[str, Any] = {}
        if self._gguf is not None:
            more = {
                "gguf_file": self._gguf,
                "quantization_config": quantisers.GgufConfig(dequantize=True),
            }
        elif self._quantisation is not None:
            more["quantization_config"] = _DEQUANTISED[self._quantisation](dequantize=True)
        scratch = tempfile.TemporaryDirectory(prefix="private-lora-")
        try:
            with _quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.directory, config=None if self._gguf else self.config, dtype=dtype,
                    device_map=_places(self.outline(dtype), remote), offload_folder=scratch.name,
                    output_loading_info=True, use_safetensors=True, local_files_only=True, **more,
                )  # fmt: skip
        except CheckpointError:
            raise
        except Exception as error:  # of transformers and of any model's code, fed with any file
            scratch.cleanup()
            raise CheckpointError(
                f"{self.directory}: transformers cannot load it: {first_line(error)}"
            ) from error
        model, info = loaded
        return model, info, scratch

    def _notes(self, model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
        """Raises CheckpointError for weights that are missing, and for layers left out."""
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.directory}: no tensor {missing[0]!r} in the checkpoint"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
                + "; its config is of another model, or the download is incomplete"
            )
        unused = sorted(info["unexpected_keys"])
        forms = {_form(name) for name in model.state_dict()}
        cut = [name for name in unused if _form(name) in forms]
        if cut:
            raise CheckpointError(
                f"{self.directory}: the files hold {cut[0]!r} (and {len(cut) - 1} more), for which "
                "the config has no layer: with it the model would be cut short; get the config "
                "that belongs to the files"
            )
        if unused:
            shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            return (f"not used: {len(unused)} tensors of the checkpoint ({shown})",)
        return ()


def _form(name: str) -> str:
    """A tensor's name without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".#.", name)


def _places(model: PreTrainedModel, remote: Collection[str]) -> dict[str, str]:
    """A device map: linears that go remote on the disk, every other tensor in memory.

    Where there are modules within a module its own tensors are named, not the module: it would take
    theirs along.
    """
    tied = model.all_tied_weights_keys
    ends = set(tied) | set(tied.values())
    disk = {name for name in remote if f"{name}.weight" not in ends}
    places = dict.fromkeys(sorted(disk), "disk")
    for name, _ in [*model.named_parameters(remove_duplicate=False),
                    *model.named_buffers(remove_duplicate=False)]:  # fmt: skip
        module = name.rpartition(".")[0]
        if module not in disk:
            leaf = not any(model.get_submodule(module).children())
            places[module if leaf and module else name] = "cpu"
    return places


class _Reader:
    """Weights of remote linears, on the disk or in memory."""

    def __init__(self, stored: Any, held: dict[str, torch.Tensor]) -> None:
        self._stored = stored
        self._held = held

    def __call__(self, module: str) -> torch.Tensor:
        held = self._held.get(module)
        if held is not None:
            return held
        tensor: torch.Tensor = self._stored[f"{module}.weight"]
        return tensor


def _reader(model: PreTrainedModel, remote: Collection[str]) -> _Reader:
    held: dict[str, torch.Tensor] = {}
    stored = None
    for name in remote:
        module: Any = model.get_submodule(name)
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None:
            held[name] = module.weight.detach()
            continue
        stored = weights.dataset
        if module.bias is not None and module.bias.is_meta:
            bias = stored[f"{name}.bias"]
            module.bias = nn.Parameter(bias, requires_grad=False)
    return _Reader(stored, held)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without reports and bars of transformers: what they say is said here, in a line."""
    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate.big_modeling")
    before = accelerate.level
    reports.set_verbosity(logging.ERROR)
    reports.disable_progress_bar()  # type: ignore[no-untyped-call]
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()  # type: ignore[no-untyped-call]
        accelerate.setLevel(before)
