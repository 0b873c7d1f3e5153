"""Repairing results that wrapped, on the device: the arithmetic of `backends/he/repair.py`.

Owner code only. A repair is for a few tokens in ten thousand, so it is simple rather than fast: the
weight comes from the host in slabs, and is multiplied in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.repair import LEAST_PERIOD

TOKENS_AT_ONCE = 256
"""Tokens repaired together, which bounds the memory that an answer full of lies can ask for."""
_SLAB_VALUES = 1 << 23  # of the weight, widened at a time


def clear_products(values: torch.Tensor, weight: NDArray[np.int8], forward: bool) -> torch.Tensor:
    """float64[T, K] times the transposed weight int8[N, K] (forward), or float64[T, N] times it.

    The weight is on the host, values and result on the device.
    """
    rows, columns = weight.shape
    shape = len(values), rows if forward else columns
    out = torch.zeros(shape, dtype=torch.float64, device=values.device)
    step = max(1, _SLAB_VALUES // columns)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        # A copy: the weight may be a read-only map.
        slab = torch.from_numpy(np.array(weight[part])).to(values.device).double()
        if forward:
            out[:, part] = values @ slab.T
        else:
            out += values[:, part] @ slab
    return out


def unwrap(
    out: torch.Tensor, tokens: torch.Tensor, right: torch.Tensor, modulus: int, scale: torch.Tensor
) -> torch.Tensor:
    """Move each result of some tokens by the multiple of p that brings it nearest to `right`.

    out     float32[T, N], results times their scale, changed in place
    tokens  int64[n]
    right   float64[n, N], in units of which the period is `modulus`
    scale   float64[n, N]: what a unit is in `out`

    Returns the multiples, float64[n, N].
    """
    found = out[tokens]
    turns = torch.round((right - found / scale) / modulus)
    # See `backends/he/repair.py`: of a result that float32 cannot hold, its sign is left.
    lost = ~torch.isfinite(turns) | (modulus * scale < LEAST_PERIOD)
    whole = torch.round(right / modulus)
    part = right / modulus - whole
    over = (part.abs() > 0.25) & (torch.signbit(found) != torch.signbit(part))
    turns = torch.where(lost, whole + over * torch.sign(part), turns)
    moved = torch.where(torch.isfinite(found), found + turns * modulus * scale, right * scale)
    out[tokens] = moved.float()
    return turns


def astray(
    out: torch.Tensor, tokens: torch.Tensor, right: torch.Tensor, most: float, scale: torch.Tensor
) -> bool:
    """Whether a result is further than `most` units from where `right` says; as for `unwrap`."""
    limit = torch.finfo(torch.float32).max
    true = right * scale
    errors = out[tokens].double().clamp_(-limit, limit).sub_(true.clamp(-limit, limit))
    fits = errors.abs() <= most * scale + 2.0**-22 * true.abs() + 2.0**-148
    errors.zero_()
    true.zero_()
    return not bool(fits.all())
