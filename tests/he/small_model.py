"""A small prepared model to tamper with, and what one who tampers would do to hide it.

Shares no code with `manifest.py` and `verification.py`: digests are spelled out here again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.he.manifest import GroupSpec
from backends.he.params import Parameters, preset
from backends.he.preparation import prepare
from backends.he.public import public_seed
from backends.he.store import PreparedModel
from backends.he.verification import Progress, Trust

GROUPS = [GroupSpec("a.q+k", ("a.q", "a.k"), 24, (24, 8)), GroupSpec("a.o", ("a.o",), 32, (21,))]
SHAPES = {"a.q": (24, 24), "a.k": (8, 24), "a.o": (21, 32)}
STANDARD = preset("exact")
TAG = b"an owner"


def weight_of(module: str) -> torch.Tensor:
    """The floating weight of one module."""
    generator = torch.Generator().manual_seed(sum(map(ord, module)))
    return torch.randn(SHAPES[module], generator=generator)


def quiet(label: str, done: int) -> None:
    """No progress."""


def small(
    directory: Path,
    parameters: Parameters | None = STANDARD,
    tag: bytes = TAG,
    trust: Trust | None = None,
    progress: Progress = quiet,
) -> PreparedModel:
    """The small model, prepared or found."""
    return prepare(
        directory, GROUPS, weight_of, parameters, progress, owner_tag=tag, trust=trust
    )  # fmt: skip


def manifest_of(directory: Path) -> dict[str, Any]:
    """What the manifest holds."""
    return json.loads((directory / "manifest.json").read_text())


def put_manifest(directory: Path, record: Any) -> None:
    """Write a manifest, whatever it is."""
    (directory / "manifest.json").write_text(json.dumps(record))


def covered_up(record: Any) -> Any:
    """A manifest with every digest in it made to fit the rest, as far as there is a rest."""
    record = copy.deepcopy(record)
    try:
        entries = record["groups"]
        facts = [
            [e["spec"], *(e["arrays"][kind]["sha256"] for kind in ("weight", "scale", "channels"))]
            for e in entries
        ]
        text = json.dumps(facts, sort_keys=True)
        record["model_digest"] = hashlib.sha256(text.encode()).hexdigest()
        if record["parameters"]:
            parameters = Parameters(**record["parameters"])
            tag, digest = bytes.fromhex(record["owner_tag"]), bytes.fromhex(record["model_digest"])
            record["seed"] = public_seed(digest, parameters, tag).hex()
    except (KeyError, TypeError, ValueError, IndexError):
        pass  # nothing to derive it from
    if isinstance(record, dict):
        rest = {key: value for key, value in record.items() if key != "setup_digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        record["setup_digest"] = hashlib.sha256(text.encode()).hexdigest()
    return record


def rewritten(directory: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    """Put other elements into a file, and its digest and all others into the manifest."""
    np.save(directory / name, array)
    index, kind = int(Path(name).name[1:5]), Path(name).name.split(".")[1]
    record = manifest_of(directory)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    record["groups"][index]["arrays"][kind]["sha256"] = digest
    put_manifest(directory, covered_up(record))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document: objects, lists and what they hold."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        document = document[key]
    return document


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    document = copy.deepcopy(document)
    at(document, path[:-1])[path[-1]] = value
    return document
