"""An owner's cipher that holds every result against the product in clear, and counts wraps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import Float32Array, OwnerMatrix, Payload
from backends.he.mlwe_owner import MlweOwner, Sealed
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from backends.he.public import PublicMatrix
from backends.he.store import PreparedModel
from backends.net.inprocess import in_process
from backends.nn.skeleton import Skeleton


@dataclass
class Tally:
    """Of one matrix's answers, against the products of the same int8 weights in clear.

    wraps          results that left [-p/2, p/2) before they were taken mod p, noise included
    unseen         results that were used more than p/2 from where they belong
    peak           largest |product| over p/2
    gain           of the last request
    off2, size2    sums of squares, of errors and of products
    """

    format: str
    requests: int = 0
    results: int = 0
    wraps: int = 0
    unseen: int = 0
    peak: float = 0.0
    gain: float = 1.0
    off2: float = 0.0
    size2: float = 0.0

    @property
    def error(self) -> float:
        """Relative, of all results together."""
        return sqrt(self.off2 / self.size2) if self.size2 else 0.0

    def figures(self, name: str) -> dict[str, Any]:
        """For a report."""
        return {
            "matrix": name, "format": self.format, "gain": self.gain, "peak": self.peak,
            "error": self.error, "results": self.results, "wraps": self.wraps,
            "wraps_unseen": self.unseen,
        }  # fmt: skip


class CountingOwner(MlweOwner):
    """The owner's cipher, and the truth beside every answer, which costs a product in clear."""

    def __init__(self, parameters: Parameters, public: PublicMatrix) -> None:
        super().__init__(parameters, public)
        self.tallies: dict[str, Tally] = {}
        self._weights: dict[str, tuple[NDArray[np.int8], bool]] = {}
        self._tally_lock = threading.Lock()

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        super().guard(matrix, weight, forward)
        self._weights[matrix.name] = weight, forward
        form = matrix.plan.format
        self.tallies[matrix.name] = Tally(f"{form.up_bits}/{form.down_bits}")

    def decrypt(
        self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        inverse, x, gain = sealed.inverse_alpha.copy(), sealed.x, sealed.gain
        out = super().decrypt(sealed, payload, matrix, worker)
        self._tally(out, x, inverse, gain, matrix)
        return out

    def _tally(
        self, out: Float32Array, x: Float32Array, inverse: NDArray[np.float64], gain: float,
        matrix: OwnerMatrix,
    ) -> None:  # fmt: skip
        codes, forward = self._weights[matrix.name]
        live = np.flatnonzero(inverse > 0)
        p, unit = matrix.plan.format.modulus, inverse[live, None]
        values = (x[live].astype(np.float64) * matrix.in_scale / unit).astype(np.float32)
        weight = torch.from_numpy(np.array(codes)).float()
        product = torch.from_numpy(values) @ (weight.T if forward else weight)
        right = product.numpy().astype(np.float64)
        scale = unit * matrix.out_scale
        found = out[live] / scale
        turns = np.rint((right - found) / p)
        noisy = np.rint(found + p * turns)
        off, size = (
            np.sum((each * unit * matrix.out_scale) ** 2) for each in (found - right, right)
        )
        tally = self.tallies[matrix.name]
        with self._tally_lock:
            tally.requests += 1
            tally.results += right.size
            tally.wraps += int(np.count_nonzero((noisy >= p / 2) | (noisy < -p / 2)))
            tally.unseen += int(np.count_nonzero(turns))
            tally.peak = max(tally.peak, float(np.abs(right).max(initial=0.0)) / (p / 2))
            tally.gain = gain
            tally.off2 += float(off)
            tally.size2 += float(size)

    def figures(self) -> dict[str, Any]:
        """All matrices together, and those that are worst."""
        told = [t.figures(name) for name, t in self.tallies.items() if t.results]
        errors = [each["error"] for each in told] or [0.0]
        gains = [each["gain"] for each in told] or [1.0]
        return {
            "results": sum(each["results"] for each in told),
            "wraps": sum(each["wraps"] for each in told),
            "wraps_repaired": self.repairs.wraps,
            "wraps_unseen": sum(each["wraps_unseen"] for each in told),
            "tokens_repaired": self.repairs.tokens,
            "median_gain": float(np.median(gains)),
            "median_error": float(np.median(errors)),
            "largest_errors": sorted(told, key=lambda each: -each["error"])[:4],
            "most_wraps": sorted(told, key=lambda each: -each["wraps"])[:4],
        }


@contextmanager
def counted(skeleton: Skeleton, prepared: PreparedModel) -> Iterator[CountingOwner]:
    """The skeleton's remote linears compute through a worker in this process."""
    parameters = prepared.parameters
    assert parameters is not None
    owner = CountingOwner(parameters, prepared.public_matrix())
    prepared.guard(owner)
    with (
        in_process(prepared, owner, [MlweWorker()]) as (client, _),
        skeleton.remote.connected(client.linear, skeleton.local_head(prepared)),
    ):
        yield owner
