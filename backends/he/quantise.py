"""Symmetric per-output-channel quantisation of frozen weights to int8 or fewer bits.

W[j, k] ~ scale[j] * Wq[j, k]. One Wq serves both directions: forward Wq.x, backward Wq^T.dy'
with dy' = scale * dy, applied by the owner.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_CPU = torch.device("cpu")
_BLOCK = 1024  # rows quantised at a time
LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: below it a quotient loses its digits, and at last is zero."""


def quantise(
    weight: torch.Tensor, limit: int = 127, device: torch.device = _CPU
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8[N, K], float32[N]) of a floating weight [N, K], row by row block.

    limit   the largest absolute value of a code: 127, or 31 for 6 bits
    device  where to compute; the result is the same bit for bit everywhere

    An all-zero row gets scale 1, any other at least LEAST_SCALE: values far below that become
    zeros. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    quantised = np.empty((rows, columns), np.int8)
    scales = np.empty(rows, np.float32)
    for start in range(0, rows, _BLOCK):
        # In two steps, so that a 16-bit weight travels as such.
        part = weight[start : start + _BLOCK].detach().to(device).to(torch.float32)
        peak = part.abs().amax(dim=1)
        if not torch.isfinite(peak).all():
            raise ValueError("the weight holds NaN or infinity; is the checkpoint damaged?")
        # By a tensor: torch's CUDA kernel multiplies by the reciprocal of a number instead,
        # which is off by a bit now and then.
        step = (peak / torch.full_like(peak, limit)).clamp_(min=LEAST_SCALE)
        scale = torch.where(peak > 0, step, torch.ones_like(peak))
        codes = torch.round(part / scale[:, None]).clamp_(-limit, limit)
        quantised[start : start + _BLOCK] = codes.to(torch.int8).cpu().numpy()
        scales[start : start + _BLOCK] = scale.cpu().numpy()
    return quantised, scales


def quantise_bytes(columns: int) -> int:
    """Bytes of device memory that `quantise` needs for a weight of `columns` inputs."""
    # The block in its own dtype (4 bytes at most), in float32, its absolute values or its
    # quotients and their rounding, and the codes.
    return _BLOCK * columns * (4 + 4 + 4 + 4 + 1)


def dequantise(weight: NDArray[np.int8], scales: NDArray[np.float32]) -> torch.Tensor:
    """float32[N, K]: what the quantised weight stands for."""
    return torch.from_numpy(weight * scales[:, None])
