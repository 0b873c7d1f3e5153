"""A prepared model on disk: int8 weights for workers, scales and hints for owners.

    DIR/manifest.json               written last: a directory without one is unfinished
    DIR/worker/g0003.weight.npy     int8[N, K]
    DIR/owner/g0003.scale.npy       float32[N]
    DIR/owner/g0003.forward.npy     int32[tiles, rank, 256, 16], the hint Wq*A
    DIR/owner/g0003.backward.npy    the hint Wq^T*A

Everything here is public: it depends on the model, the parameters and a public seed.
`preparation.py` makes it; `verification.py` decides whether one that lies there is to be trusted.
Until it is, no array leaves `PreparedModel`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.files import map_array
from backends.he.interface import Float32Array, OwnerCipher, OwnerMatrix
from backends.he.manifest import (
    KINDS,
    GroupEntry,
    Manifest,
    PreparationError,
    Wanted,
    array_form,
    read_manifest,
)
from backends.he.public import PublicMatrix
from protocol.catalogue import Catalogue, MatrixShape


def shapes_of(matrices: Sequence[OwnerMatrix], cipher: OwnerCipher) -> tuple[MatrixShape, ...]:
    """What the catalogue says of matrices whose payloads `cipher` makes."""
    return tuple(
        MatrixShape(
            m.name, m.in_features, m.out_features, cipher.up_bytes(m, 1), cipher.down_bytes(m, 1)
        )
        for m in matrices
    )


def array_path(directory: Path, index: int, kind: str) -> Path:
    """Where an array of group `index` is."""
    return directory / KINDS[kind] / f"g{index:04d}.{kind}.npy"


@dataclass(frozen=True)
class Stored:
    """An array as it lies on the disk: mapped, of the right shape, its contents unexamined.

    sha256  what the manifest says of its elements
    """

    path: Path
    group: int
    kind: str
    values: NDArray[Any]
    sha256: str

    def fail(self, what: str) -> PreparationError:
        """The error that says what is wrong with it."""
        return PreparationError(
            f"{self.path} {what}; delete {self.path.parent.parent} and prepare anew"
        )


def map_stored(directory: Path, index: int, entry: GroupEntry, kind: str, rank: int) -> Stored:
    """Map an array. Raises PreparationError when its file is not one of the right shape."""
    path = array_path(directory, index, kind)
    dtype, shape = array_form(entry.spec, kind, rank)
    try:
        values = map_array(path, shape, dtype)
    except OSError as error:
        why = error.strerror or error
        raise PreparationError(
            f"{path} cannot be read: {why}; mend that, or delete {directory} and prepare anew"
        ) from error
    except ValueError as error:
        raise PreparationError(
            f"{path} is damaged: {error}; delete {directory} and prepare anew"
        ) from error
    return Stored(path, index, kind, values, entry.sha256[kind])


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

        Raises PreparationError when there is none, when it is not what is wanted, or when anything
        is of another shape or missing.
        """
        manifest = read_manifest(directory)
        differences = manifest.differences(wanted) if wanted is not None else []
        if differences:
            raise PreparationError(
                f"{directory} was prepared otherwise than asked for: {'; '.join(differences)}. "
                "Ask for what is there, choose another --cache, or delete it to prepare anew"
            )
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

    def guard(self, cipher: OwnerCipher) -> None:
        """Have the owner's cipher check the answers for every matrix."""
        weights = self.worker_weights()
        for index, matrix in enumerate(self.owner_matrices()):
            cipher.guard(matrix, weights[index // 2], forward=index % 2 == 0)

    def _load_owner_matrices(self) -> list[OwnerMatrix]:
        matrices = []
        for index, entry in enumerate(self.manifest.groups):
            scale: Float32Array = np.array(self._array(index, "scale"))
            ones = np.ones(entry.spec.in_features, np.float32)
            for direction, in_scale, out_scale, plan in (
                ("forward", ones, scale, entry.forward_plan),
                ("backward", scale, ones, entry.backward_plan),
            ):
                hint = self._array(index, direction) if self.parameters else None
                name = f"{entry.spec.name} {direction}"
                matrices.append(OwnerMatrix(name, in_scale, out_scale, plan, hint))
        return matrices

    def catalogue(self, cipher: OwnerCipher) -> Catalogue:
        """What owner and worker agree on in the handshake."""
        shapes = shapes_of(self.owner_matrices(), cipher)
        digest = self.parameters.digest() if self.parameters else hashlib.sha256(b"clear").digest()
        return Catalogue(self.model_digest, digest, shapes)
