"""What training clients save: adapters as plain `peft` loads them, with the optimiser beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from backends.errors import UserError
from backends.files import end_replacing, read_bounded, replacing_directory
from backends.nn.adapters import WEIGHTS_FILE
from scenarios.endpoint.fields import RequestError
from scenarios.endpoint.learner import Weights
from scenarios.endpoint.requests import Lora, StatePath

_OPTIMIZER_FILE = "optimizer.safetensors"
_ABOUT_FILE = "state.json"
_ABOUT_BYTES_MAX = 1 << 16


class StateError(UserError, ValueError):
    """What was saved cannot be used; the text says why."""


@dataclass(frozen=True)
class Kept:
    """An adapter that was saved, in memory or on disk.

    moments  the optimiser's; empty where they were not saved
    workers  whose answers it rests on
    """

    lora: Lora
    weights: Weights
    moments: Weights
    workers: frozenset[str]


class Known(Protocol):
    """What a session knows of its workers."""

    @property
    def served(self) -> frozenset[str]:
        """Those of whom an answer was used."""
        ...

    @property
    def caught(self) -> Mapping[str, str]:
        """Those that gave wrong answers, once or ever."""
        ...


class States:
    """A directory of them.

    base   identity of the base that all belong to
    rank   of adapters, at most
    known  the session that they are trained in
    """

    def __init__(self, directory: Path, base: str, rank: int, known: Known) -> None:
        self._directory, self._base, self._rank, self._known = directory, base, rank, known
        for place in directory.glob("*/*/"):  # whose overwriting a crash has cut short
            end_replacing(place)

    @property
    def served(self) -> frozenset[str]:
        """Workers that what is trained here may rest on."""
        return self._known.served

    def require_trusted(self, workers: frozenset[str], what: object = "what was loaded") -> None:
        """Raises StateError when one of these, on whom it rests, was caught."""
        liars = workers & self._known.caught.keys()
        if liars:
            raise StateError(
                f"{what} rests on {sorted(liars)[0]}, which gave wrong answers; begin again from "
                "what does not"
            )

    def place(self, path: StatePath) -> Path:
        """Where it lies: names are letters, digits, '.', '_' and '-', and never begin with '.'."""
        return self._directory / path.run.replace(":", "-") / path.kind / path.name

    def save(self, path: StatePath, kept: Kept, config: LoraConfig, overwrite: bool) -> None:
        """Whole or not at all. Raises RequestError for a name that is taken, WriteError."""
        place = self.place(path)
        if place.exists() and not overwrite:
            raise RequestError(f"{path} is there already; choose another name, or overwrite=True")
        config.inference_mode = True
        about = {
            "version": 1, "base": self._base, **asdict(kept.lora), "workers": sorted(kept.workers),
        }  # fmt: skip
        with replacing_directory(place) as aside:
            config.save_pretrained(str(aside))
            save_file(kept.weights, aside / WEIGHTS_FILE)
            if kept.moments:
                save_file(kept.moments, aside / _OPTIMIZER_FILE)
            (aside / _ABOUT_FILE).write_text(json.dumps(about, indent=2))

    def about(self, path: StatePath) -> tuple[Lora, frozenset[str]]:
        """What a saved adapter is like, and which workers it rests on.

        Raises RequestError where none is; StateError for one of another base, or one that rests on
        a worker that was caught.
        """
        place = self.place(path)
        if not place.is_dir():
            raise RequestError(f"{path} was not saved here, or was deleted", 404)
        try:
            held: Any = json.loads(read_bounded(place / _ABOUT_FILE, _ABOUT_BYTES_MAX))
            if held["version"] != 1 or type(held["rank"]) is not int:
                raise ValueError("another version")
            parts = [held[name] for name in ("attention", "mlp", "unembed")]
            if not 1 <= held["rank"] <= self._rank or {type(part) for part in parts} != {bool}:
                raise ValueError("what it says cannot be")
            base, workers = held["base"], frozenset(held["workers"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(f"{place} is damaged; load another state") from error
        if base != self._base:
            raise StateError(f"{place} belongs to another base model; start the endpoint with that")
        self.require_trusted(workers, place)
        return Lora(held["rank"], *parts), workers

    def load(
        self, path: StatePath, shapes: dict[str, tuple[int, ...]], optimizer: bool = False
    ) -> Kept:
        """Tensors of these names and shapes. Raises StateError when that is not what is there."""
        (lora, workers), place = self.about(path), self.place(path)
        weights = _tensors(place / WEIGHTS_FILE, shapes)
        moments: Weights = {}
        if optimizer and (place / _OPTIMIZER_FILE).exists():
            wanted = {
                f"{key}/{name}": shape if key != "step" else ()
                for name, shape in shapes.items()
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
            moments = _tensors(place / _OPTIMIZER_FILE, wanted)
        return Kept(lora, weights, moments, workers)


def _tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """float32 tensors, all finite, of these names and shapes and no others."""
    try:
        if not path.is_file():
            raise OSError("no such file")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            if names != shapes.keys() or any(
                tuple(part.get_shape()) != shapes[name] or part.get_dtype() != "F32"
                for name, part in slices.items()
            ):
                raise ValueError("it holds other tensors")
            found = {name: file.get_tensor(name) for name in sorted(names)}
    except (OSError, ValueError, SafetensorError) as error:
        raise StateError(f"{path} cannot be used: {error}; load another state") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise StateError(f"{path} holds numbers that are not finite; load another state")
    return found
