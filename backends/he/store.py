"""A prepared model on disk: int8 weights for workers, scales and hints for owners.

    DIR/manifest.json               written last: a directory without one is unfinished
    DIR/worker/g0003.weight.npy     int8[N, K]
    DIR/owner/g0003.scale.npy       float32[N]
    DIR/owner/g0003.channels.npy    float32[K], c of `quantise.py`
    DIR/owner/g0003.forward.npy     int32[tiles, rank, 256, 16], the hint Wq*A
    DIR/owner/g0003.backward.npy    the hint Wq^T*A

Everything here is public: it depends on the model, the parameters and a public seed.
`preparation.py` makes it; `verification.py` decides whether one that lies there is to be trusted.
Until it is, no array leaves `PreparedModel`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.files import map_array, replacing_directory, require_own
from backends.he.descriptors import require_descriptors
from backends.he.interface import Float32Array, OwnerCipher, OwnerMatrix, WorkerMatrix
from backends.he.manifest import (
    KINDS,
    NAME,
    GroupEntry,
    GroupSpec,
    Manifest,
    PreparationError,
    Wanted,
    anew,
    array_form,
    read_manifest,
)
from backends.he.params import Parameters
from backends.he.plan import nominal_plan
from backends.he.public import PublicMatrix
from backends.he.wire import CLEAR, Format, Packing
from protocol.catalogue import Catalogue, MatrixShape


def shapes_of(
    groups: Sequence[GroupSpec], formats: Sequence[Format] | Packing
) -> tuple[MatrixShape, ...]:
    """Two matrices a group, forward and backward, and what tokens of theirs take on the wire.

    formats  of each; or of all, where the scheme has no formats
    """
    shapes = []
    for index, group in enumerate(groups):
        sizes = group.in_features, group.total_out
        for turn, (direction, (inputs, outputs)) in enumerate(
            (("forward", sizes), ("backward", sizes[::-1]))
        ):
            if isinstance(formats, Packing):
                block = formats.block_tokens
                up, down = formats.bytes_of(inputs, block), formats.bytes_of(outputs, block)
            else:
                form, block = formats[2 * index + turn], 1
                up, down = form.up_bytes(inputs), form.down_bytes(outputs)
            name = f"{group.name} {direction}"
            shapes.append(MatrixShape(name, inputs, outputs, up, down, block))
    return tuple(shapes)


def nominal_formats(groups: Sequence[GroupSpec], parameters: Parameters) -> list[Format]:
    """What the planner would choose for weights of which nothing but the shapes is known."""
    return [
        nominal_plan(inputs, outputs, parameters, forward, group.precise).format
        for group in groups
        for forward, inputs, outputs in (
            (True, group.in_features, group.total_out), (False, group.total_out, group.in_features)
        )
    ]  # fmt: skip


def catalogue_of(manifest: Manifest, packing: Packing | None = None) -> Catalogue:
    """What owner and worker agree on in the handshake.

    packing  of a scheme without formats, which takes of a prepared model its weights alone
    """
    parameters = manifest.parameters
    specs = [entry.spec for entry in manifest.groups]
    if packing is None and parameters is None:
        packing = CLEAR
    if packing is not None:
        return Catalogue(manifest.model_digest, packing.digest, shapes_of(specs, packing))
    assert parameters is not None
    shapes = shapes_of(specs, manifest.formats)
    return Catalogue(manifest.model_digest, parameters.digest(), shapes)


def worker_matrices(
    manifest: Manifest, weights: Sequence[NDArray[np.int8]], first: int = 0
) -> list[WorkerMatrix]:
    """Matrices as a worker knows them, of groups from number `first` on, of these weights."""
    return [
        WorkerMatrix(weight, turn == 0, manifest.formats[2 * index + turn])
        for index, weight in enumerate(weights, start=first)
        for turn in (0, 1)
    ]


_WORKER_ABSENT = (
    f"a worker needs {NAME} and worker/ of one, as `python -m scenarios.prepare` names them"
)
_SLAB_BYTES = 1 << 20  # hashed, then looked at while the cache has it


def array_path(directory: Path, index: int, kind: str) -> Path:
    """Where an array of group `index` is."""
    return directory / KINDS[kind] / f"g{index:04d}.{kind}.npy"


@dataclass(frozen=True)
class Stored:
    """An array as it lies on the disk: mapped, of the right shape, its contents unexamined.

    sha256  what the manifest says of its elements
    mend    what to do when it is no good
    """

    path: Path
    group: int
    kind: str
    values: NDArray[Any]
    sha256: str
    mend: str

    def read(self, visit: Callable[[int, NDArray[Any]], None] | None = None) -> None:
        """Read the array from one end to the other; every slab is seen by `visit(start, slab)`.

        Raises PreparationError when its digest is not the manifest's.
        """
        digest = hashlib.sha256()
        step = max(1, _SLAB_BYTES // max(1, self.values[0].nbytes))
        for start in range(0, len(self.values), step):
            slab = self.values[start : start + step]
            digest.update(slab.reshape(-1).view(np.uint8).data)
            if visit is not None:
                visit(start, slab)
        if digest.hexdigest() != self.sha256:
            raise self.fail("is damaged (its SHA-256 differs)")

    def fail(self, what: str) -> PreparationError:
        """The error that says what is wrong with it."""
        return PreparationError(f"{self.path} {what}; {self.mend}")


def map_stored(
    directory: Path, index: int, entry: GroupEntry, kind: str, rank: int, mend: str = ""
) -> Stored:
    """Map an array. Raises PreparationError when its file is not one of the right shape.

    mend  what to do about one that is not (`anew`)
    """
    path, mend = array_path(directory, index, kind), mend or anew(directory)
    dtype, shape = array_form(entry.spec, kind, rank)
    try:
        require_own(path)
        values = map_array(path, shape, dtype)
    except OSError as error:
        why = error.strerror or error
        raise PreparationError(f"{path} cannot be read: {why}; mend that, or {mend}") from error
    except ValueError as error:
        raise PreparationError(f"{path} is damaged: {error}; {mend}") from error
    return Stored(path, index, kind, values, entry.sha256[kind], mend)


class PreparedModel:
    """A finished prepared model; arrays are memory-mapped, once, and read-only.

    stored          every array, group by group, for whoever examines them
    trusted         whether arrays may be used; set by who verified or made them
    verification_s  what verifying it took, in this process; 0 when it was not necessary
    """

    def __init__(self, directory: Path, manifest: Manifest, stored: list[list[Stored]]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.groups = [entry.spec for entry in manifest.groups]
        self.parameters = manifest.parameters
        self.model_digest = manifest.model_digest
        self.setup_digest = manifest.setup_digest
        self.stored = stored
        self.trusted = False
        self.verification_s = 0.0
        self._owner_matrices: list[OwnerMatrix] = []

    @classmethod
    def open(cls, directory: Path, wanted: Wanted | None = None) -> PreparedModel:
        """Read the manifest and map every array; of their contents nothing is read yet.

        Raises PreparationError when there is none, when it is not what is wanted, when anything is
        of another shape or missing, or when this process may not have so many files open.
        """
        manifest = read_manifest(directory)
        try:
            require_own(directory, directory / NAME, directory / "worker", directory / "owner")
        except OSError as error:
            raise PreparationError(f"{error}; mend that, or use a place of your own") from error
        differences = manifest.differences(wanted) if wanted is not None else []
        if differences:
            raise PreparationError(
                f"{directory} was prepared otherwise than asked for: {'; '.join(differences)}. "
                "Ask for what is there, choose another --cache, or delete it to prepare anew"
            )
        require_descriptors(len(manifest.groups) * len(manifest.kinds))
        stored = [
            [map_stored(directory, i, entry, kind, manifest.rank) for kind in manifest.kinds]
            for i, entry in enumerate(manifest.groups)
        ]
        return cls(directory, manifest, stored)

    def _array(self, index: int, kind: str) -> NDArray[Any]:
        if not self.trusted:
            raise PreparationError(
                f"{self.directory} has not been verified; open it with verification.open_trusted"
            )
        return next(s.values for s in self.stored[index] if s.kind == kind)

    def public_matrix(self) -> PublicMatrix:
        """A of this model, derived from its seed. Raises PreparationError for `clear`."""
        seed = self.manifest.seed
        if seed is None:
            raise PreparationError(f"{self.directory} was prepared for the clear backend only")
        return PublicMatrix(seed, self.manifest.rank)

    def worker_weights(self) -> list[NDArray[np.int8]]:
        """int8[N, K] of each group. Raises PreparationError for a model that is not trusted."""
        return [self._array(i, "weight") for i in range(len(self.groups))]

    def owner_matrices(self) -> list[OwnerMatrix]:
        """Forward and backward matrix of each group, in the catalogue's order.

        Raises PreparationError for a model that is not trusted.
        """
        if not self._owner_matrices:
            self._owner_matrices = self._load_owner_matrices()
        return self._owner_matrices

    def worker_matrices(self) -> list[WorkerMatrix]:
        """Every matrix of the catalogue as a worker knows it."""
        return worker_matrices(self.manifest, self.worker_weights())

    def guard(self, cipher: OwnerCipher) -> None:
        """Have the owner's cipher check the answers for every matrix."""
        weights = self.worker_weights()
        for index, matrix in enumerate(self.owner_matrices()):
            cipher.guard(matrix, weights[index // 2], forward=index % 2 == 0)

    def _load_owner_matrices(self) -> list[OwnerMatrix]:
        matrices = []
        for index, entry in enumerate(self.manifest.groups):
            scale: Float32Array = np.array(self._array(index, "scale"))
            channels: Float32Array = np.reciprocal(self._array(index, "channels"))
            for direction, in_scale, out_scale, plan in (
                ("forward", channels, scale, entry.forward_plan),
                ("backward", scale, channels, entry.backward_plan),
            ):
                hint = self._array(index, direction) if self.parameters else None
                name = f"{entry.spec.name} {direction}"
                matrices.append(OwnerMatrix(name, in_scale, out_scale, plan, hint))
        return matrices

    def catalogue(self, packing: Packing | None = None) -> Catalogue:
        """What owner and worker agree on in the handshake; see `catalogue_of`."""
        return catalogue_of(self.manifest, packing)


def copy_worker_part(directory: Path, out: Path) -> None:
    """Put a worker's part of the prepared model in `directory` into `out`, for copying it away.

    Weights are linked where the file system can, else copied. An `out` that has the manifest of
    this very model is complete, and left alone.

    Raises PreparationError when something else is there, or when it cannot be written.
    """
    manifest = (directory / NAME).read_bytes()
    try:
        if out.exists() and any(out.iterdir()):
            if not (out / NAME).is_file() or (out / NAME).read_bytes() != manifest:
                raise PreparationError(f"{out} is there already, and is not this model's; choose "
                                       "another name, or delete it")  # fmt: skip
            return
        with replacing_directory(out) as aside:
            (aside / "worker").mkdir()
            for file in sorted((directory / "worker").glob("g*.weight.npy")):
                _link(file, aside / "worker" / file.name)
            (aside / NAME).write_bytes(manifest)
    except OSError as error:
        raise PreparationError(f"{out} cannot be written: {error.strerror or error}") from error


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, to)


class WorkerPart:
    """What a worker needs of a prepared model: manifest.json, and the weights under worker/.

    Its weights are those the manifest names; whether they are any good is the owner's to know. An
    owner needs all of the model (`PreparedModel`): it multiplies some requests itself.

    groups, catalogue  of the whole model
    weights, matrices  of the groups that it was opened with: int8[N, K], forward and backward
    """

    def __init__(self, manifest: Manifest, weights: list[NDArray[np.int8]], first: int = 0) -> None:
        self.parameters = manifest.parameters
        self.groups = [entry.spec for entry in manifest.groups]
        self.weights = weights
        self.matrices = worker_matrices(manifest, weights, first)
        self.catalogue = catalogue_of(manifest)

    @classmethod
    def open(cls, directory: Path, groups: range | None = None) -> WorkerPart:
        """Map the weights and compare them with their digests; nothing of an owner is looked at.

        groups  whose weights; None for all of them

        Raises PreparationError when a file is missing, damaged or of another shape, or when this
        process may not have so many files open.
        """
        mend = f"copy {NAME} and worker/ of a prepared model to {directory} again"
        manifest = read_manifest(directory, _WORKER_ABSENT, mend)
        groups = range(len(manifest.groups)) if groups is None else groups
        require_descriptors(len(groups))
        weights = []
        for index in groups:
            entry = manifest.groups[index]
            stored = map_stored(directory, index, entry, "weight", manifest.rank, mend)
            stored.read()
            weights.append(stored.values)
        return cls(manifest, weights, groups.start)
