"""The owner's check of answers on the GPU: the sums of `backends/he/check.py`, judged on the host.

Of an answer only its differences travel, 64 bytes a token. Holds secret rows: owner code only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.launch import Kernels
from backends.he.cuda.streams import Readback
from backends.he.entropy import Entropy
from backends.he.integrity import ROWS, Judge, draw_pool, mlwe_honesty, survey
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
        self, gpu: Gpu, kernels: Kernels, name: str, weight: NDArray[np.int8], forward: bool,
        entropy: Entropy, parameters: Parameters,
    ) -> None:  # fmt: skip
        self._gpu, self._kernels = gpu, kernels
        pool = draw_pool(entropy, weight.shape[0 if forward else 1])
        self._pool = torch.from_numpy(pool).to(gpu.device)
        found = survey(self._pool, weight, forward, entropy)
        self._projected = found.projected.float()
        self.judge = Judge(name, mlwe_honesty(pool, found, parameters), entropy)
        self._ratio = parameters.worker_modulus / parameters.modulus

    def expect(self, x: torch.Tensor, in_scale: torch.Tensor, factor: torch.Tensor) -> Expected:
        """For a request float32[T, K] whose message is round(x * in_scale * factor)."""
        tokens, inputs = x.shape
        rows = self.judge.draw_rows()
        on_device = torch.from_numpy(rows.astype(np.int32)).to(self._gpu.device)
        values = torch.empty((tokens, ROWS), dtype=torch.float64, device=self._gpu.device)
        self._kernels.launch(
            "expectations", (-(-tokens // _TOKENS_EACH), 1),
            x, in_scale, factor, self._projected, on_device, values, tokens, inputs, self._ratio,
        )  # fmt: skip
        return Expected(self, rows, on_device, values)

    def compare(
        self, expected: Expected, y: torch.Tensor, inverse: torch.Tensor, out_scale: torch.Tensor
    ) -> Comparison:
        """Queue what `Expected.compare` says."""
        tokens, outputs = y.shape
        found = torch.empty_like(expected.values)
        self._kernels.launch(
            "differences", (-(-tokens // _TOKENS_EACH), 1),
            y, self._pool, expected.on_device, expected.values, inverse, out_scale, found,
            tokens, outputs,
        )  # fmt: skip
        return Comparison(expected, Readback(self._gpu, found))


class Comparison:
    """One comparison on its way."""

    def __init__(self, expected: Expected, found: Readback) -> None:
        self._expected, self._found = expected, found

    def require(self, worker: str) -> None:
        """Wait for it. Raises WrongAnswerError unless the answer is an honest worker's."""
        self._expected.check.judge.require(self._expected.rows, self._found.read(), worker)
