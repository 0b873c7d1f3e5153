"""int8 x int8 -> int32 products through torch (oneDNN)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

# Requests and memory-mapped weights are read-only buffers, and they are only read here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def int8_product(a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """a[M, K] @ b[K, N] in int32; either operand may be a transposed view.

    The caller sees to it that 128*127*K fits int32.
    """
    if a.shape[1] == 1:
        # torch 2.13's _int_mm reads beyond a one-row operand whose rows have stride 1.
        return a.astype(np.int32) * b.astype(np.int32)
    product: NDArray[np.int32] = torch._int_mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    return product
