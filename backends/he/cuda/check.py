"""The owner's check of answers on the GPU: the sums of `backends/he/check.py`, judged on the host.

Of an answer only its differences travel, 64 bytes a token, and under `thin` parameters 8 more for
its largest result. Holds secret rows: owner code only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.launch import Kernels
from backends.he.cuda.repair import clear_products
from backends.he.cuda.streams import Readback
from backends.he.entropy import Entropy
from backends.he.integrity import (
    ROWS,
    Float64Array,
    Judge,
    Pool,
    draw_rows,
    mlwe_honesty,
    survey,
    suspicious,
)
from backends.he.interface import OwnerMatrix
from backends.he.params import Parameters

_TOKENS_EACH = 2  # CHECK_TOKENS of the kernels


@dataclass(frozen=True)
class Expected:
    """What the answer to one request is held against.

    rows     int64[ROWS], of the pool of `check`; on_device the same as int32
    values   float64[T, ROWS] on the device
    """

    check: DeviceCheck
    rows: NDArray[np.int64] = field(repr=False)
    on_device: torch.Tensor = field(repr=False)
    values: torch.Tensor = field(repr=False)

    def compare(
        self, y: torch.Tensor, inverse: torch.Tensor, out_scale: torch.Tensor
    ) -> Comparison:
        """Queue the comparison of centred results float32[T, N], and their scaling in place."""
        return self.check.compare(self, y, inverse, out_scale)

    def wipe(self) -> None:
        """Overwrite which rows these were, and what they gave."""
        self.rows[...] = 0
        self.on_device.zero_()
        self.values.zero_()


class DeviceCheck:
    """The owner's secret check of one matrix, on the device.

    judge  decides
    """

    def __init__(
        self, gpu: Gpu, kernels: Kernels, matrix: OwnerMatrix, weight: NDArray[np.int8],
        forward: bool, entropy: Entropy, parameters: Parameters,
    ) -> None:  # fmt: skip
        self._gpu, self._kernels = gpu, kernels
        self._weight, self._forward = weight, forward
        self._thin = parameters.thin
        form = matrix.plan.format
        pool = Pool(entropy, weight.shape[0 if forward else 1]).whole()
        self._pool = torch.from_numpy(pool).to(gpu.device)
        found = survey(self._pool, weight, forward, entropy)
        self._projected = found.projected.float()
        self.judge = Judge(matrix.name, mlwe_honesty(pool, found, form, parameters))
        self._ratio = form.modulus / parameters.modulus

    def products(self, values: torch.Tensor) -> torch.Tensor:
        """float64[T, K] -> float64[T, N] on the device: what the matrix makes of them, in clear."""
        return clear_products(values, self._weight, self._forward)

    def moved(self, expected: Expected, turns: torch.Tensor) -> Float64Array:
        """float64[n, ROWS] = v*turns, for float64[n, N] multiples of p that results moved by."""
        rows = self._pool[expected.on_device.long()].double()
        found: Float64Array = (turns @ rows.T).cpu().numpy()
        rows.zero_()
        return found

    def expect(
        self, x: torch.Tensor, in_scale: torch.Tensor, factor: torch.Tensor, key: bytearray
    ) -> Expected:
        """For a request float32[T, K] whose message is round(x * in_scale * factor).

        key  rows are drawn by it; it is overwritten
        """
        tokens, inputs = x.shape
        device = self._gpu.device
        values = torch.empty((tokens, ROWS), dtype=torch.float64, device=device)
        on_device = torch.empty(ROWS, dtype=torch.int32, device=device)
        carried = torch.empty(ROWS, dtype=torch.int32)
        expected = Expected(self, draw_rows(key), on_device, values)
        try:
            carried.numpy()[...] = expected.rows
            on_device.copy_(carried)
            self._kernels.launch(
                "expectations", (-(-tokens // _TOKENS_EACH), 1), x, in_scale, factor,
                self._projected, on_device, values, tokens, inputs, self._ratio,
            )  # fmt: skip
        except BaseException:
            expected.wipe()
            raise
        finally:
            carried.zero_()
        return expected

    def compare(
        self, expected: Expected, y: torch.Tensor, inverse: torch.Tensor, out_scale: torch.Tensor
    ) -> Comparison:
        """Queue what `Expected.compare` says."""
        tokens, outputs = y.shape
        count = tokens * ROWS
        found = torch.empty(
            count + tokens * self._thin, dtype=torch.float64, device=self._gpu.device
        )
        try:
            if self._thin:
                found[count:] = torch.linalg.vector_norm(y, torch.inf, dim=1)
            self._kernels.launch(
                "differences", (-(-tokens // _TOKENS_EACH), 1),
                y, self._pool, expected.on_device, expected.values, inverse, out_scale,
                found[:count], tokens, outputs,
            )  # fmt: skip
            return Comparison(expected, Readback(self._gpu, found))
        except BaseException:
            found.zero_()
            raise


class Comparison:
    """One comparison on its way. To be wiped when it has been looked at."""

    def __init__(self, expected: Expected, found: Readback) -> None:
        self._expected, self._found = expected, found
        self._tokens = len(expected.values)

    @property
    def _differences(self) -> Float64Array:
        """float64[T, ROWS], once they have come."""
        return self._found.read()[: self._tokens * ROWS].reshape(-1, ROWS)

    @property
    def peaks(self) -> Float64Array:
        """float64[T], the largest |y| of each token; of `thin` parameters only."""
        return self._found.read()[self._tokens * ROWS :]

    def suspicious(self, most: float) -> NDArray[np.int64]:
        """The tokens whose results may have wrapped; those with a larger |y| than `most` count."""
        honesty, rows = self._expected.check.judge.honesty, self._expected.rows
        found = suspicious(self._differences, honesty.mean[rows], honesty.deviation[rows])
        return np.union1d(found, np.flatnonzero(self.peaks > most))

    def add_turns(self, tokens: NDArray[np.int64], turns: torch.Tensor, modulus: int) -> None:
        """Take in that results of some tokens were moved by float64[tokens, N] times p."""
        self._differences[tokens] += modulus * self._expected.check.moved(self._expected, turns)

    def require(self, worker: str) -> None:
        """Raise WrongAnswerError unless the answer is an honest worker's."""
        self._expected.check.judge.require(self._expected.rows, self._differences, worker)

    def wipe(self) -> None:
        """Overwrite the differences."""
        self._found.wipe()
