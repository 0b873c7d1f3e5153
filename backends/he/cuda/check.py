"""The owner's check of answers, on the GPU: what `backends/he/integrity.py` defines, same bits.

Holds secret signs: owner code only.
"""

from __future__ import annotations

from math import floor

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.launch import Kernels
from backends.he.cuda.streams import Flag, Flags
from backends.he.entropy import Entropy
from backends.he.integrity import ROWS, SignCheck, secret_signs
from backends.he.params import Parameters

_TOKENS_EACH = 4  # CHECK_TOKENS of the kernel
_SLAB_BYTES = 64 << 20


class DeviceCheck(SignCheck):
    """The owner's secret check of one matrix, on the device."""

    def __init__(
        self, gpu: Gpu, kernels: Kernels, flags: Flags, name: str, weight: NDArray[np.int8],
        forward: bool, entropy: Entropy,
    ) -> None:  # fmt: skip
        super().__init__(name, weight.shape[0 if forward else 1])
        self._gpu, self._kernels, self._flags = gpu, kernels, flags
        self._signs = torch.from_numpy(secret_signs(entropy, self._outputs)).to(gpu.device)
        self._projected = project(self._signs, weight, forward)

    def compare(
        self, planes: torch.Tensor, answer: torch.Tensor, parameters: Parameters
    ) -> Comparison:
        """Queue the comparison of answer uint16[T, N] with the request int8[limbs, T, K]."""
        tokens, outputs = answer.shape
        flag = self._flags.take()
        found = torch.empty((tokens, ROWS), dtype=torch.int32, device=self._gpu.device)
        self._kernels.launch(
            "differences", (-(-tokens // _TOKENS_EACH), 1),
            planes, self._projected, answer, self._signs, found, flag.cell,
            tokens, planes.shape[2], outputs, parameters.dropped_bits,
            floor(self.tolerance(parameters)),
        )  # fmt: skip
        flag.fetch()
        return Comparison(self, flag)


class Comparison:
    """One comparison on its way."""

    def __init__(self, check: DeviceCheck, flag: Flag) -> None:
        self._check, self._flag = check, flag

    def require(self) -> None:
        """Wait for it. Raises WrongAnswerError unless the answer fits."""
        if self._flag.read():
            raise self._check.wrong_answer()


def project(signs: torch.Tensor, weight: NDArray[np.int8], forward: bool) -> torch.Tensor:
    """int32[ROWS, K]: signs int8[ROWS, N] times the matrix (the weight, or its transpose).

    In float64, which holds every sum exactly: 8 rows are too few for an int8 product.
    """
    wide = signs.double()
    rows, columns = weight.shape
    out = torch.zeros((len(signs), columns if forward else rows), dtype=torch.float64)
    out = out.to(signs.device)
    step = max(1, _SLAB_BYTES // (8 * columns))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        slab = torch.from_numpy(np.array(weight[part])).to(signs.device).double()
        if forward:
            out += wide[:, part] @ slab
        else:
            out[:, part] = wide @ slab.T
    return out.to(torch.int32)
