"""What `benchmarks.load` is made of: a small model, certificates, and each owner's recordings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import OwnerMatrix, WorkerMatrix
from backends.he.manifest import GroupSpec
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from scenarios.certs import Authority

PRESET = "exact"
"""Whose products are near the clear ones from the first on, so that a strange one is seen."""


def groups_of(width: int) -> list[GroupSpec]:
    """One layer of a Llama of this width: what shares an input is one group."""
    return [
        GroupSpec("qkv", ("q", "k", "v"), width, (width, width // 4, width // 4)),
        GroupSpec("o", ("o",), width, (width,)),
        GroupSpec("gate_up", ("gate", "up"), width, (4 * width, 4 * width)),
        GroupSpec("down", ("down",), 4 * width, (width,)),
    ]


def prepared_at(directory: Path, width: int) -> PreparedModel:
    """The layer with random weights, prepared."""
    groups = groups_of(width)
    shapes = {
        member: (outputs, group.in_features)
        for group in groups
        for member, outputs in zip(group.members, group.out_features, strict=True)
    }
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return prepare(
        directory, groups, lambda name: weights[name], preset(PRESET), lambda label, n: None
    )


def clear_product(
    matrix: OwnerMatrix, at_worker: WorkerMatrix, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """float32[T, N]: what `x` [T, K] times the matrix is in clear."""
    weight = at_worker.weight.T if at_worker.forward else at_worker.weight
    return (x * matrix.in_scale) @ weight.astype(np.float32) * matrix.out_scale


@dataclass(frozen=True)
class Recording:
    """A request as it was encrypted, and its answer when nobody else asks."""

    request: NDArray[np.uint8]
    answer: NDArray[np.uint8]


def record(
    model: PreparedModel, owner: MlweOwner, worker: MlweWorker, tokens: int
) -> list[Recording]:
    """One request for every matrix, encrypted under secrets of its own."""
    draw = np.random.default_rng()
    found = []
    for matrix, at_worker in zip(model.owner_matrices(), model.worker_matrices(), strict=True):
        x = draw.standard_normal((tokens, matrix.in_features), np.float32)
        encrypted = owner.encrypt(x, matrix)
        owner.discard(encrypted.sealed)
        request = np.frombuffer(encrypted.payload, np.uint8)
        loaded = worker.load(at_worker.weight, at_worker.forward, at_worker.format)
        found.append(Recording(request, worker.multiply(request, tokens, loaded)))
    return found


def save_recordings(path: Path, recordings: list[Recording]) -> None:
    """For `load_recordings`, in another process."""
    arrays: dict[str, Any] = {}
    for index, one in enumerate(recordings):
        arrays |= {f"request{index}": one.request, f"answer{index}": one.answer}
    np.savez(path, **arrays)


def load_recordings(path: Path) -> list[Recording]:
    """What `save_recordings` wrote."""
    with np.load(path) as arrays:
        count = len(arrays.files) // 2
        return [Recording(arrays[f"request{i}"], arrays[f"answer{i}"]) for i in range(count)]


def make_place(place: Path, width: int, tokens: int, owners: int) -> PreparedModel:
    """All that a run needs: model/, certs of a worker and of each owner, and recordings."""
    model = prepared_at(place / "model", width)
    assert model.parameters is not None
    authority, worker = Authority(), MlweWorker()
    # It opens no answer: they are compared as they come.
    cipher = MlweOwner(model.parameters, model.public_matrix(), unverified=True)
    authority.issue(place / "worker", ["localhost"])
    for index in range(owners):
        authority.issue(place / f"owner{index}")
        save_recordings(place / f"owner{index}.npz", record(model, cipher, worker, tokens))
    return model
