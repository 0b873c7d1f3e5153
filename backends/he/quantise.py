"""Symmetric per-output-channel quantisation of frozen weights to int8 or fewer bits.

W[j, k] ~ scale[j] * Wq[j, k] / c[k]. One Wq serves both directions: forward Wq.(x/c), backward
Wq^T.dy' / c with dy' = scale * dy, all applied by the owner.

c is one but for outlier channels: inputs whose column of weights is far from the others'. Models
have activations of some channels hundreds of times the rest, with columns as much smaller. Left as
they are those columns round to zero, and those inputs drown all others in the cipher's noise. c
evens the columns out and so, where the model compensates, the inputs. It is a power of two, so that
nothing is rounded by it, and comes from the public weights alone: a choice made on private text
would show in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_CPU = torch.device("cpu")
_BLOCK = 1024  # rows quantised at a time
LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: below it a quotient loses its digits, and at last is zero."""
MOST_DOUBLINGS = 20
"""c is within 2^-20 and 2^20."""
_LEAST_DOUBLINGS = 2
# Less is what columns of any model differ by, and would not even out its inputs.
_FINE = 1 << 15  # steps each way of the weights that columns are compared by: squares fit int32
_USUAL = 1e-20, 1e20  # largest weights of rows: with others, c could leave float32


def quantise(
    weight: torch.Tensor,
    limit: int = 127,
    device: torch.device = _CPU,
    channels: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8[N, K], float32[N]) of a floating weight [N, K], row by row block.

    limit     the largest absolute value of a code: 127, or 31 for 6 bits
    device    where to compute; the result is the same bit for bit everywhere
    channels  c, float32[K] (`channel_scales`), by which columns are multiplied first; None for ones

    An all-zero row gets scale 1, any other at least LEAST_SCALE: values far below that become
    zeros. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    quantised = np.empty((rows, columns), np.int8)
    scales = np.empty(rows, np.float32)
    factors = None if channels is None else torch.from_numpy(channels).to(device)
    for start in range(0, rows, _BLOCK):
        part, peak = _block(weight, start, device)
        if not torch.isfinite(peak).all():
            raise ValueError("the weight holds NaN or infinity; is the checkpoint damaged?")
        if factors is not None:
            part = part * factors
            peak = part.abs().amax(dim=1)
        # By a tensor: torch's CUDA kernel multiplies by the reciprocal of a number instead,
        # which is off by a bit now and then.
        step = (peak / torch.full_like(peak, limit)).clamp_(min=LEAST_SCALE)
        scale = torch.where(peak > 0, step, torch.ones_like(peak))
        codes = torch.round(part / scale[:, None]).clamp_(-limit, limit)
        quantised[start : start + _BLOCK] = codes.to(torch.int8).cpu().numpy()
        scales[start : start + _BLOCK] = scale.cpu().numpy()
    return quantised, scales


def _block(weight: torch.Tensor, start: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows of a weight in float32, and the largest of each."""
    # In two steps, so that a 16-bit weight travels as such.
    part = weight[start : start + _BLOCK].detach().to(device).to(torch.float32)
    return part, part.abs().amax(dim=1)


def channel_scales(
    weights: Sequence[torch.Tensor], device: torch.device = _CPU
) -> NDArray[np.float32]:
    """c, float32[K], of floating weights [N_i, K] that share their inputs.

    device  where to compute; the result is the same bit for bit everywhere

    A column counts by its norm, each row taken relative to its largest weight, as it is quantised.
    The median column's over a column's own, to the nearest power of two, is its c; 1 where that is
    1/2 or 2, for a column of nothing but zeros and weights below 2^-16 of their row's largest, and
    for all columns where a row's largest weight is of no usual size, or no number.
    """
    squares = np.zeros(weights[0].shape[1], np.int64)
    for weight in weights:
        for start in range(0, len(weight), _BLOCK):
            part, peak = _block(weight, start, device)
            usual = (peak == 0) | ((peak > _USUAL[0]) & (peak < _USUAL[1]))
            if not usual.all():
                return np.ones_like(squares, np.float32)
            step = torch.where(peak > 0, peak / torch.full_like(peak, _FINE), 1.0)
            fine = torch.round(part / step[:, None]).to(torch.int32)
            # Of integers, so that the order of the sum is immaterial.
            squares += (fine * fine).sum(dim=0, dtype=torch.int64).cpu().numpy()
    some = squares > 0
    if not some.any():
        return np.ones_like(squares, np.float32)
    middle = np.sort(squares[some])[np.count_nonzero(some) // 2]
    # The exponent e of a ratio of squares, in [2^(e-1), 2^e): half its logarithm, to the nearest.
    doublings = np.frexp(middle / np.where(some, squares, middle))[1] // 2
    doublings[np.abs(doublings) < _LEAST_DOUBLINGS] = 0
    limited = np.clip(doublings, -MOST_DOUBLINGS, MOST_DOUBLINGS)
    return np.ldexp(np.float32(1), limited)


def quantise_bytes(columns: int) -> int:
    """Bytes of device memory that either takes for a weight of `columns` inputs."""
    # The block in its own dtype (4 bytes at most), in float32, its quotients, their integers and
    # squares, which are summed in 8 bytes; `quantise` itself has fewer.
    return _BLOCK * columns * (4 + 4 + 4 + 4 + 4 + 8)


def dequantise(
    weight: NDArray[np.int8],
    scales: NDArray[np.float32],
    channels: NDArray[np.float32] | None = None,
) -> torch.Tensor:
    """float32[N, K]: what the quantised weight stands for; `channels` is c, None for ones."""
    wide = weight * scales[:, None]
    return torch.from_numpy(wide if channels is None else wide / channels)
