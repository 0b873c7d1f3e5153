"""A prepared model on disk: int8 weights for workers, scales and hints for owners.

    DIR/manifest.json               written last: a directory without one is unfinished
    DIR/worker/g0003.weight.npy     int8[N, K]
    DIR/owner/g0003.scale.npy       float32[N]
    DIR/owner/g0003.forward.npy     int32[tiles, rank, 256, 16], the hint Wq*A
    DIR/owner/g0003.backward.npy    the hint Wq^T*A

Everything here is public: it depends on the model, the parameters and a public seed.
`preparation.py` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.files import array_digest
from backends.he.interface import Float32Array, OwnerCipher, OwnerMatrix
from backends.he.params import Parameters
from backends.he.plan import MatrixPlan
from backends.he.public import PublicMatrix, public_seed
from backends.threads import core_count
from protocol.catalogue import Catalogue, MatrixShape

FORMAT = 1


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


def digest_of_groups(entries: Sequence[dict[str, Any]]) -> bytes:
    """32 bytes that name the quantised weights, from the groups' manifest entries."""
    facts = [[e["spec"], e["weight_sha256"], e["scale_sha256"]] for e in entries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def shapes_of(matrices: Sequence[OwnerMatrix], cipher: OwnerCipher) -> tuple[MatrixShape, ...]:
    """What the catalogue says of matrices whose payloads `cipher` makes."""
    return tuple(
        MatrixShape(
            m.name, m.in_features, m.out_features, cipher.up_bytes(m, 1), cipher.down_bytes(m, 1)
        )
        for m in matrices
    )


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
        self.model_digest = digest_of_groups(manifest["groups"])
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
        if manifest.get("format") != FORMAT:
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

    def guard(self, cipher: OwnerCipher) -> None:
        """Have the owner's cipher check the answers for every matrix."""
        weights = self.worker_weights()
        for index, matrix in enumerate(self.owner_matrices()):
            cipher.guard(matrix, weights[index // 2], forward=index % 2 == 0)

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
        shapes = shapes_of(self.owner_matrices(), cipher)
        digest = self.parameters.digest() if self.parameters else hashlib.sha256(b"clear").digest()
        return Catalogue(self.model_digest, digest, shapes)
