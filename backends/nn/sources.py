"""Where a model's public weights come from: a Hugging Face checkpoint, or a seed.

Tensors are read one at a time, so a checkpoint is never in memory twice (or once).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import safe_open

from backends.errors import UserError


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, incomplete or not what its config says."""


class WeightSource(ABC):
    """Named tensors of one model."""

    @abstractmethod
    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor called `name`, in its stored dtype. Raises CheckpointError without it."""

    @abstractmethod
    def identity(self) -> str:
        """Hex digest that changes when any weight may have changed."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people: where the weights are from."""


class RandomSource(WeightSource):
    """Seeded random weights of the right shapes, for systems work without a checkpoint."""

    def __init__(self, seed: int, deviation: float = 0.02) -> None:
        self._seed = seed
        self._deviation = deviation

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        if "norm" in name or name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        text = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
        out = torch.empty(shape)
        return out.normal_(0.0, self._deviation, generator=generator)

    def identity(self) -> str:
        return hashlib.sha256(f"random:{self._seed}:{self._deviation}".encode()).hexdigest()

    def describe(self) -> str:
        return f"random weights from seed {self._seed} (no checkpoint was given)"


class SafetensorsSource(WeightSource):
    """A checkpoint directory as `transformers` saves it: one .safetensors file or an index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = self._locate(directory)
        self._dtypes_seen: set[torch.dtype] = set()

    @staticmethod
    def _locate(directory: Path) -> dict[str, Path]:
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.exists():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = {name: directory / file for name, file in names.items()}
            missing = sorted({file.name for file in files.values() if not file.exists()})
            if missing:
                raise CheckpointError(
                    f"{directory}: {', '.join(missing)} named in the index is not there; the "
                    "download is incomplete"
                )
            return files
        if single.exists():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        raise CheckpointError(
            f"{directory} holds no model.safetensors (nor an index of shards); give a directory "
            "that `save_pretrained` or `huggingface-cli download` made"
        )

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        stored = name
        if stored not in self._files:
            # Some hub checkpoints leave out the base model's prefix ("transformer.", "model.").
            stored = name.partition(".")[2]
        if stored not in self._files:
            raise CheckpointError(f"{self._directory}: no tensor {name!r} in the checkpoint")
        with safe_open(self._files[stored], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._directory}: {name!r} is {list(tensor.shape)}, the config says "
                f"{list(shape)}"
            )
        return tensor

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(set(self._files.values())):
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in set(self._files.values()))
        return f"checkpoint {self._directory} ({size / 1e9:.2f} GB)"


def source_for(weights: str | None, seed: int) -> tuple[WeightSource, Path | None]:
    """(source, directory of config and tokenizer) for `--weights`: a directory or a hub id.

    None gives random weights and no directory. Raises CheckpointError with what to do.
    """
    if weights is None:
        return RandomSource(seed), None
    directory = Path(weights)
    if not directory.is_dir():
        directory = _download(weights)
    return SafetensorsSource(directory), directory


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a directory here nor a model the hub gave "
            f"({type(error).__name__}); check the spelling, the connection, and your access"
        ) from error
