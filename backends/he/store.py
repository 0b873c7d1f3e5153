"""A prepared model on disk: int8 weights for workers, scales and hints for owners.

    DIR/manifest.json               written last: a directory without one is unfinished
    DIR/worker/g0003.weight.npy     int8[N, K]
    DIR/owner/g0003.scale.npy       float32[N]
    DIR/owner/g0003.forward.npy     int32[tiles, rank, 256, 16], the hint Wq*A
    DIR/owner/g0003.backward.npy    the hint Wq^T*A

Everything here is public: it depends on the model, the parameters and a public seed. Two
passes, because A's seed is bound to the digest of all quantised weights: first quantise, then
build hints. Each file appears whole or not at all, and a second run goes on where an
interrupted one stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from backends.files import array_digest, write_array, write_json
from backends.he.interface import Float32Array, OwnerCipher, OwnerMatrix
from backends.he.params import RING_DEGREE, Parameters
from backends.he.plan import MatrixPlan, plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.quantise import quantise
from backends.he.ring import tiles_of
from backends.he.vector import LANES
from backends.threads import core_count
from protocol.catalogue import Catalogue, MatrixShape

_FORMAT = 1
_HINT_SLAB = 4096  # rows of a hint built and written at a time


class PreparationError(RuntimeError):
    """A prepared model cannot be made or used; the text says what to do."""


@dataclass(frozen=True)
class GroupSpec:
    """Linear modules fed the same tensor, so that one ciphertext serves them all.

    members       module names in the order their outputs are concatenated
    out_features  outputs of each member
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def total_out(self) -> int:
        """N: outputs of all members together."""
        return sum(self.out_features)


class Progress(Protocol):
    """What preparation tells of its advance: a label and work units done."""

    def __call__(self, label: str, done: int) -> None: ...


def disk_bytes(groups: Sequence[GroupSpec], parameters: Parameters | None) -> int:
    """Bytes a prepared model takes on disk (no hints when `parameters` is None)."""
    total = 0
    for group in groups:
        total += group.in_features * group.total_out + 4 * group.total_out
        if parameters is not None:
            rows = LANES * (tiles_of(group.total_out) + tiles_of(group.in_features))
            total += rows * parameters.dimension * 4
    return total


def work_units(groups: Sequence[GroupSpec], parameters: Parameters | None) -> int:
    """Units that `prepare` reports in all: int8 weights quantised, plus hint rows * inputs."""
    weights = sum(group.in_features * group.total_out for group in groups)
    return weights * (1 if parameters is None else 3)


def prepare(
    directory: Path,
    groups: Sequence[GroupSpec],
    load_weight: Callable[[str], torch.Tensor],
    parameters: Parameters | None,
    progress: Progress,
    owner_tag: bytes = b"",
) -> PreparedModel:
    """Quantise the groups' weights and build their hints, keeping what a former run finished.

    load_weight  the floating weight [out, in] of one module, by name
    parameters   None prepares for the `clear` backend: no hints

    Raises PreparationError when the disk has no room.
    """
    if (directory / "manifest.json").exists():
        return PreparedModel.open(directory)
    _check_room(directory, groups, parameters)
    entries = []
    for index, group in enumerate(groups):
        entries.append(_quantise_group(directory, index, group, load_weight))
        progress(f"quantise {group.name}", group.in_features * group.total_out)
    model_digest = _model_digest(entries)
    if parameters is not None:
        seed = public_seed(model_digest, parameters, owner_tag)
        public = PublicMatrix(seed, parameters.rank)
        builder = HintBuilder(public)
        # Groups of equal width share the limb planes of A: widest first, then by width.
        for direction in ("forward", "backward"):
            order = sorted(range(len(groups)), key=lambda i: _inputs(groups[i], direction))
            for index in reversed(order):
                entries[index] |= _hint(directory, index, direction, builder, seed)
                group = groups[index]
                progress(f"hint {group.name} {direction}", group.in_features * group.total_out)
    manifest = {
        "format": _FORMAT,
        "model_digest": model_digest.hex(),
        "owner_tag": owner_tag.hex(),
        "parameters": asdict(parameters) if parameters else None,
        "groups": entries,
    }
    write_json(directory / "manifest.json", manifest)
    return PreparedModel.open(directory, verify=False)


def _inputs(group: GroupSpec, direction: str) -> int:
    return group.in_features if direction == "forward" else group.total_out


def _check_room(
    directory: Path, groups: Sequence[GroupSpec], parameters: Parameters | None
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    done = sum(file.stat().st_size for file in directory.rglob("*.npy"))
    needed = disk_bytes(groups, parameters) - done
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise PreparationError(
            f"preparation needs {needed / 1e9:.1f} GB more in {directory}, which has "
            f"{free / 1e9:.1f} GB free; make room or choose another place with --cache"
        )


def _quantise_group(
    directory: Path, index: int, group: GroupSpec, load_weight: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    """The manifest entry of a group, from its file when a former run left one."""
    record = directory / "owner" / f"g{index:04d}.json"
    spec = json.loads(json.dumps(asdict(group)))
    if record.exists():
        entry: dict[str, Any] = json.loads(record.read_text())
        if entry["spec"] == spec:
            return entry
    codes = np.empty((group.total_out, group.in_features), np.int8)
    scales = np.empty(group.total_out, np.float32)
    row = 0
    for module, outputs in zip(group.members, group.out_features, strict=True):
        weight = load_weight(module)
        if tuple(weight.shape) != (outputs, group.in_features):
            raise PreparationError(
                f"{module}: the checkpoint's weight is {list(weight.shape)}, the model's config "
                f"says [{outputs}, {group.in_features}]"
            )
        try:
            codes[row : row + outputs], scales[row : row + outputs] = quantise(weight)
        except ValueError as error:
            raise PreparationError(f"{module}: {error}") from error
        row += outputs
    weight_path = directory / "worker" / f"g{index:04d}.weight.npy"
    scale_path = directory / "owner" / f"g{index:04d}.scale.npy"
    ones = np.ones(group.in_features, np.float32)
    entry = {
        "spec": spec,
        "weight_sha256": write_array(weight_path, codes.shape, np.int8, lambda: [codes]),
        "scale_sha256": write_array(scale_path, scales.shape, np.float32, lambda: [scales]),
        "forward_plan": asdict(plan_matrix(codes, scales)),
        "backward_plan": asdict(plan_matrix(codes.T, ones)),
    }
    write_json(record, entry)
    return entry


def _model_digest(entries: Sequence[dict[str, Any]]) -> bytes:
    facts = [[e["spec"], e["weight_sha256"], e["scale_sha256"]] for e in entries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _hint(
    directory: Path, index: int, direction: str, builder: HintBuilder, seed: bytes
) -> dict[str, str]:
    """Build one hint, slab by slab, unless the file and its record are there already."""
    path = directory / "owner" / f"g{index:04d}.{direction}.npy"
    record = path.with_suffix(".json")
    if record.exists() and path.exists():
        found = json.loads(record.read_text())
        if found["seed"] == seed.hex():
            return {f"{direction}_sha256": found["sha256"]}
    weight = np.load(directory / "worker" / f"g{index:04d}.weight.npy")
    forward = direction == "forward"
    outputs = weight.shape[0 if forward else 1]

    def slabs() -> Iterator[NDArray[np.int32]]:
        for start in range(0, outputs, _HINT_SLAB):
            part = slice(start, start + _HINT_SLAB)
            yield builder.build(weight[part] if forward else weight[:, part], forward)

    shape = (tiles_of(outputs), builder.rank, RING_DEGREE, LANES)
    sha256 = write_array(path, shape, np.int32, slabs)
    write_json(record, {"seed": seed.hex(), "sha256": sha256})
    return {f"{direction}_sha256": sha256}


class PreparedModel:
    """A finished prepared model; arrays are memory-mapped and read-only."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self._manifest = manifest
        self.groups = [
            GroupSpec(
                e["spec"]["name"],
                tuple(e["spec"]["members"]),
                e["spec"]["in_features"],
                tuple(e["spec"]["out_features"]),
            )
            for e in manifest["groups"]
        ]
        stored = manifest["parameters"]
        self.parameters = Parameters(**stored) if stored else None
        self.model_digest = _model_digest(manifest["groups"])
        self._owner_matrices: list[OwnerMatrix] = []

    @classmethod
    def open(cls, directory: Path, verify: bool = True) -> PreparedModel:
        """Open a prepared model and check every file against the manifest's SHA-256.

        Raises PreparationError when there is none, or when a file is missing or damaged.
        """
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise PreparationError(
                f"{directory} holds no finished preparation; run it again"
            ) from error
        if manifest.get("format") != _FORMAT:
            raise PreparationError(f"{directory} has another format; delete it and prepare anew")
        model = cls(directory, manifest)
        if model.model_digest.hex() != manifest["model_digest"]:
            raise PreparationError(
                f"{directory}: the model digest in the manifest is not that of its groups; delete "
                "the directory and prepare anew"
            )
        if verify:
            model.verify()
        return model

    def verify(self) -> None:
        """Raise PreparationError unless every array has the digest the manifest states."""

        def check(job: tuple[Path, str]) -> None:
            path, expected = job
            try:
                actual = array_digest(np.load(path, mmap_mode="r"))
            except (OSError, ValueError) as error:
                raise PreparationError(f"{path} cannot be read: {error}") from error
            if actual != expected:
                raise PreparationError(
                    f"{path} is damaged (its SHA-256 differs); delete {self.directory} and "
                    "prepare anew"
                )

        jobs = []
        for index, entry in enumerate(self._manifest["groups"]):
            for role, kind in self._files():
                jobs.append((self._path(role, index, kind), entry[f"{kind}_sha256"]))
        with ThreadPoolExecutor(core_count()) as pool:
            list(pool.map(check, jobs))

    def _files(self) -> list[tuple[str, str]]:
        hints = [("owner", "forward"), ("owner", "backward")] if self.parameters else []
        return [("worker", "weight"), ("owner", "scale"), *hints]

    def _path(self, role: str, index: int, kind: str) -> Path:
        return self.directory / role / f"g{index:04d}.{kind}.npy"

    def _array(self, role: str, index: int, kind: str) -> NDArray[Any]:
        return np.load(self._path(role, index, kind), mmap_mode="r")

    def public_matrix(self) -> PublicMatrix:
        """A of this model, derived from its seed. Raises PreparationError for `clear`."""
        if self.parameters is None:
            raise PreparationError(f"{self.directory} was prepared for the clear backend only")
        tag = bytes.fromhex(self._manifest["owner_tag"])
        # Derived here, not read from the manifest: the owner takes nobody's word for A.
        seed = public_seed(self.model_digest, self.parameters, tag)
        return PublicMatrix(seed, self.parameters.rank)

    def worker_weights(self) -> list[NDArray[np.int8]]:
        """int8[N, K] of each group."""
        return [self._array("worker", i, "weight") for i in range(len(self.groups))]

    def owner_matrices(self) -> list[OwnerMatrix]:
        """Forward and backward matrix of each group, in the catalogue's order."""
        if not self._owner_matrices:
            self._owner_matrices = self._load_owner_matrices()
        return self._owner_matrices

    def _load_owner_matrices(self) -> list[OwnerMatrix]:
        matrices = []
        for index, group in enumerate(self.groups):
            entry = self._manifest["groups"][index]
            scale: Float32Array = np.array(self._array("owner", index, "scale"))
            ones = np.ones(group.in_features, np.float32)
            for direction, in_scale, out_scale in (
                ("forward", ones, scale),
                ("backward", scale, ones),
            ):
                matrices.append(
                    OwnerMatrix(
                        f"{group.name} {direction}",
                        in_scale,
                        out_scale,
                        MatrixPlan(**entry[f"{direction}_plan"]),
                        self._array("owner", index, direction) if self.parameters else None,
                    )
                )
        return matrices

    def catalogue(self, cipher: OwnerCipher) -> Catalogue:
        """What owner and worker agree on in the handshake."""
        shapes = tuple(
            MatrixShape(
                m.name,
                m.in_features,
                m.out_features,
                cipher.up_bytes(m, 1),
                cipher.down_bytes(m, 1),
            )
            for m in self.owner_matrices()
        )
        digest = self.parameters.digest() if self.parameters else hashlib.sha256(b"clear").digest()
        return Catalogue(self.model_digest, digest, shapes)
