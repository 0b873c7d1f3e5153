"""Checkpoints, read by transformers: a directory, a GGUF file, or a model of the hub.

Names, renames, tied weights, types, dequantisation, buffers, shards, conversions: all by
`from_pretrained`. It is told that the linears that go remote live on the disk, so that it leaves
them where they are (or, where it has to convert them, in a temporary folder), and says where.
The model is never in memory whole.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, offload_weight
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as reports
from transformers.utils import quantization_config as quantisers

from backends.files import digest_of
from backends.nn.checkpoint_files import (
    DEQUANTISED,
    parsed_config,
    quantisation_of,
    require_alone,
    require_causal_type,
    require_once,
    require_plain,
    stated_config,
    weight_files,
)
from backends.nn.sources import Base, CheckpointError, Loaded, first_line, probe_tokens
from backends.nn.tables import map_input_table, table_place
from backends.nn.tokenizer import HubTokenizer, load_tokenizer
from backends.places import PlaceError, named

_GGUF = b"GGUF"


def open_base(place: str | Path) -> Checkpoint:
    """A checkpoint's directory, a GGUF file, or the id of a model of the hub, which is downloaded.

    Everything that can be known without reading the weights is checked. Raises CheckpointError.
    """
    try:
        path = named(place)
        if path.is_dir():
            return _directory(path)
        if path.is_file():
            return _file(path)
    except PlaceError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{place}: {getattr(error, 'strerror', None) or error}") from error
    return _directory(_download(str(place)))


def _file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(len(_GGUF))
    if not start.startswith(_GGUF):
        raise CheckpointError(
            f"{path} is a file, and no GGUF; give the directory that holds config.json and the "
            "weights"
        )
    config = parsed_config(
        path, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    )
    require_causal_type(path, config)
    require_alone(path.parent, {})
    return Checkpoint(path.parent, config, [path], gguf=path.name)


def base_config(directory: Path) -> PretrainedConfig:
    """What the config.json of a directory says; nothing else need be there.

    Raises CheckpointError.
    """
    return _config(directory, stated_config(directory))


def _config(directory: Path, stated: dict[str, Any]) -> PretrainedConfig:
    require_alone(directory, stated)
    config = parsed_config(
        directory, lambda: AutoConfig.from_pretrained(directory, trust_remote_code=False)
    )
    require_causal_type(directory, config)
    return config


def _directory(directory: Path) -> Checkpoint:
    stated = stated_config(directory)
    config = _config(directory, stated)
    files = weight_files(directory)
    quantisation = quantisation_of(directory, stated)
    if quantisation is None:
        require_plain(directory, files)
    return Checkpoint(directory, config, files, quantisation)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if hub_id.count("/") > 1 or hub_id.startswith((".", "/", "~")):
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
    quantisation  to undo while loading, of `DEQUANTISED`
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
        self._place = files[0] if gguf else directory
        self._before: torch.Tensor | None = None
        self._identity: str | None = None

    def tokenizer(self) -> HubTokenizer:
        """Its tokenizer. Raises TokenizerError when there is none, or an empty one."""
        with _quiet():
            return load_tokenizer(self.directory, self._gguf)

    def identity(self) -> str:
        """Of the files' bytes, read once; what the config says is part of the model."""
        if self._identity is None:
            config = [] if self._gguf else [self.directory / "config.json"]
            self._identity = digest_of([*config, *self._files])
        return self._identity

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in self._files)
        undone = f", {self._quantisation} undone" if self._quantisation else ""
        return f"checkpoint {self._place} ({size / 1e9:.2f} GB{undone})"

    def load(
        self, dtype: torch.dtype, remote: Collection[str], tables: Path | None = None
    ) -> Loaded:
        """Raises CheckpointError when the files are not what the config says."""
        model, info, scratch = self._dispatched(dtype, remote)
        notes = self._notes(model, info)
        if self._gguf is None:
            require_once(self.directory, self._files, model)
        if self._gguf is not None:
            self._before = _answer(model, probe_tokens(self.config))
        if tables is not None:
            files = [] if self._gguf else self._files
            map_input_table(model, remote, files, table_place(tables, self.identity(), dtype))
        read = _reader(model, remote, scratch.name)
        self._require_shapes(model, read, remote)
        remove_hook_from_module(model, recurse=True)
        model.__dict__.pop("hf_device_map", None)
        # What had to be converted is in a folder that goes when nobody can read it any more.
        weakref.finalize(read, scratch.cleanup)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta and name.rpartition(".")[0] not in remote:
                raise CheckpointError(f"{self._place}: no values for {name!r} were found")
        return Loaded(model, read, notes)

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """By a model of its own, its linears streamed from the disk; a GGUF, as it was loaded."""
        if self._gguf is not None:
            return self._before
        outline = self.outline(dtype)
        linears = [n for n, m in outline.named_modules() if type(m) is nn.Linear]
        model, _, scratch = self._dispatched(dtype, linears)
        with scratch:
            return _answer(model, tokens)

    def _dispatched(
        self, dtype: torch.dtype, remote: Collection[str]
    ) -> tuple[PreTrainedModel, dict[str, Any], tempfile.TemporaryDirectory[str]]:
        """The model, able to compute, with the weights of `remote` on the disk."""
        scratch = tempfile.TemporaryDirectory(prefix="private-lora-")
        more: dict[str, Any] = {}
        if self._gguf is not None:  # which transformers can only load whole
            more["gguf_file"] = self._gguf
            more["quantization_config"] = quantisers.GgufConfig(dequantize=True)
        else:
            more["device_map"] = _places(self.outline(dtype), remote)
            more["offload_folder"] = scratch.name
        if self._quantisation is not None:
            more["quantization_config"] = DEQUANTISED[self._quantisation](dequantize=True)
        try:
            with _quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.directory, config=self.config, dtype=dtype, output_loading_info=True,
                    use_safetensors=True, local_files_only=True, trust_remote_code=False,
                    ignore_mismatched_sizes=True, **more,  # they are told of, and refused
                )  # fmt: skip
        except CheckpointError:
            raise
        except Exception as error:  # of transformers and of any model's code, fed with any file
            scratch.cleanup()
            raise CheckpointError(
                f"{self._place}: transformers cannot load it: {first_line(error)}"
            ) from error
        model, info = loaded
        return model, info, scratch

    def _require_shapes(
        self, model: PreTrainedModel, read: _Reader, remote: Collection[str]
    ) -> None:
        """transformers compares the shapes of what it loads, but not of what it leaves on disk."""
        for name in remote:
            stated = model.get_parameter(f"{name}.weight").shape
            found = read.shape(name)
            if found != stated:
                raise self._of_other_shape(f"{name}.weight", found, stated)

    def _of_other_shape(
        self, name: str, found: Sequence[int], stated: Sequence[int]
    ) -> CheckpointError:
        return CheckpointError(
            f"{self._place}: {name} is {list(found)}, the config says {list(stated)}; one of them "
            "is of another model"
        )

    def _notes(self, model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
        """Raises CheckpointError for weights that are missing, and for layers left out."""
        missing = sorted(info["missing_keys"])
        if info["mismatched_keys"]:
            name, found, stated = min(info["mismatched_keys"])
            raise self._of_other_shape(name, found, stated)
        if missing:
            raise CheckpointError(
                f"{self._place}: no tensor {missing[0]!r} in the checkpoint"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
                + "; its config is of another model, or the download is incomplete"
            )
        unused = sorted(info["unexpected_keys"])
        forms = {_form(name) for name in model.state_dict()}
        prefix = f"{model.base_model_prefix}."  # which files of the base model alone leave out
        cut = [name for name in unused if {_form(name), _form(prefix + name)} & forms]
        if cut:
            raise CheckpointError(
                f"{self._place}: the files hold {cut[0]!r} (and {len(cut) - 1} more), for which "
                "the config has no layer: with it the model would be cut short; get the config "
                "that belongs to the files"
            )
        if unused:
            shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            return (f"not used: {len(unused)} tensors of the checkpoint ({shown})",)
        return ()


def _answer(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _form(name: str) -> str:
    """A tensor's name without the numbers of layers."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "#", name)


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
    """Weights of remote linears: in the checkpoint, spilled, or (tied ones) in memory."""

    def __init__(self) -> None:
        self.stores: list[Mapping[str, torch.Tensor]] = []

    def __call__(self, module: str) -> torch.Tensor:
        name = f"{module}.weight"
        return next(store for store in self.stores if name in store)[name]

    def shape(self, module: str) -> torch.Size:
        """Of a weight; only the header of a file that transformers did not have to convert."""
        name = f"{module}.weight"
        for store in self.stores:
            entry = store.index.get(name) if isinstance(store, OffloadedWeightsLoader) else None
            if entry and "safetensors_file" in entry:
                with safe_open(entry["safetensors_file"], framework="pt") as file:
                    return torch.Size(file.get_slice(entry["weight_name"]).get_shape())
        return self(module).shape


def _reader(model: PreTrainedModel, remote: Collection[str], scratch: str) -> _Reader:
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    read = _Reader()
    held: dict[str, torch.Tensor] = {}
    spilled: dict[str, Any] = {}
    for name in remote:
        module: Any = model.get_submodule(name)
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            read.stores = [weights.dataset]
            if module.bias is not None:
                bias = weights.dataset[f"{name}.bias"]
                module.bias = nn.Parameter(bias, requires_grad=False)
        elif f"{name}.weight" in tied:
            held[f"{name}.weight"] = module.weight.detach()
        else:
            offload_weight(module.weight.detach(), f"{name}.weight", scratch, spilled)
    spill = OffloadedWeightsLoader(save_folder=scratch, index=spilled)
    read.stores += [held, spill]
    return read


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
