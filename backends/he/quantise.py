"""Symmetric per-output-channel int8 quantisation of frozen weights (as LLM.int8, QLoRA bases).

W[j, k] ~ scale[j] * Wq[j, k]. One Wq serves both directions: forward Wq.x, backward Wq^T.dy'
with dy' = scale * dy, applied by the owner.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def quantise(weight: torch.Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8[N, K], float32[N]) of a floating weight [N, K], row by row block.

    An all-zero row gets scale 1. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    quantised = np.empty((rows, columns), np.int8)
    scales = np.empty(rows, np.float32)
    for start in range(0, rows, 1024):
        part = weight[start : start + 1024].detach().to(torch.float32)
        peak = part.abs().amax(dim=1)
        if not torch.isfinite(peak).all():
            raise ValueError("the weight holds NaN or infinity; is the checkpoint damaged?")
        scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
        codes = torch.round(part / scale[:, None]).clamp_(-127, 127)
        quantised[start : start + 1024] = codes.to(torch.int8).numpy()
        scales[start : start + 1024] = scale.numpy()
    return quantised, scales


def dequantise(weight: NDArray[np.int8], scales: NDArray[np.float32]) -> torch.Tensor:
    """float32[N, K]: what the quantised weight stands for."""
    return torch.from_numpy(weight * scales[:, None])
