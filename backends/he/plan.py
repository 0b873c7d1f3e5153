"""The planner: what scale can never wrap, and what error to expect. Public arithmetic only.

For a matrix M (N x K, int8) and one token x the owner encrypts round(alpha*x*q/p) with

    alpha = (p/2 - margin) / (||x||_2 * max_j ||M_j||_2).

By Cauchy-Schwarz |alpha * M_j.x| <= p/2 - margin, and `margin` bounds everything else that is
added to a result (rounding of u, LWE error, rounding of the message, dropped bits), so no
result can wrap: overflow is impossible, not improbable.

Error. The rounding of u to p is uniform on +-1/2, independent of the message, so result j
carries noise of variance ||M_j||^2 * v with v = 1/12 + (p/q)^2 * (10 + 1/12), plus 4^delta/12 from
the two roundings on the way down (`docs/cipher.md` has the whole law). For x in general position
E[(M_j.x)^2] = ||x||^2 ||M_j||^2 / K. Their ratio, weighted by the output scales, is the predicted
relative error ||y - y'||_F / ||y||_F against the same int8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backends.he.params import ERROR_BITS, ERROR_BOUND, Parameters

if TYPE_CHECKING:
    import torch  # not when this is loaded: a worker, which reads plans, does without it

_BLOCK_VALUES = 1 << 20  # int8 values summed at a time


@dataclass(frozen=True)
class MatrixPlan:
    """Public facts about one int8 matrix M (outputs x inputs), enough to scale and predict.

    max_norm        max_j ||M_j||_2, at least 1
    max_l1          max_j ||M_j||_1
    noise_gain      sum_j s_j^2 / sum_j s_j^2 ||M_j||^2 over output scales s: how much the
                    roundings on the way down weigh against the ones on the way up
    in_features     K
    """

    max_norm: float
    max_l1: float
    noise_gain: float
    in_features: int

    def margin(self, parameters: Parameters) -> float:
        """Bound on everything added to an exact result, in units of the worker modulus."""
        p_over_q = parameters.worker_modulus / parameters.modulus
        per_input = 0.5 + 2.0**-24 + (ERROR_BOUND + 0.5) * p_over_q
        return self.max_l1 * per_input + 2.0**parameters.dropped_bits + 2.0

    def amplitude(self, parameters: Parameters) -> float:
        """(p/2 - margin) / max_norm: alpha is this over ||x||_2.

        Raises ValueError when the matrix is too wide for the parameters.
        """
        room = parameters.worker_modulus / 2 - self.margin(parameters)
        if room <= 0:
            raise ValueError(
                f"a matrix with {self.in_features} inputs and row L1 norm {self.max_l1:.0f} "
                f"leaves no room below p/2 = 2^{8 * parameters.limbs - 1}; split it into narrower "
                "ones"
            )
        return room / self.max_norm

    def predicted_error(self, parameters: Parameters) -> float:
        """Expected relative error of results against the same int8 weights, as a fraction."""
        p_over_q = parameters.worker_modulus / parameters.modulus
        up = 1 / 12 + p_over_q**2 * (ERROR_BITS / 4 + 1 / 12)
        down = 4.0**parameters.dropped_bits / 12 * self.noise_gain
        return sqrt((up + down) * self.in_features) / self.amplitude(parameters)


def plan_matrix(weight: NDArray[np.int8], out_scale: NDArray[np.float32]) -> MatrixPlan:
    """Plan for int8[outputs, inputs] with float32[outputs] scales (exact integer sums)."""
    rows, _ = _norms(weight, None)
    return _plan(rows, out_scale, weight.shape[1])


def plan_directions(
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    channels: NDArray[np.float32],
    device: torch.device | None = None,
) -> tuple[MatrixPlan, MatrixPlan]:
    """Plans of int8[N, K] with float32[N] scales and float32[K] c (`quantise.py`): of Wq forward,
    and of Wq^T backward.

    device  where to sum (the CPU); the sums are exact, so the plans are the same everywhere
    """
    return plans_from(*_norms(codes, device), scales, channels)


def plans_from(
    rows: Norms, columns: Norms, scales: NDArray[np.float32], channels: NDArray[np.float32]
) -> tuple[MatrixPlan, MatrixPlan]:
    """The same from the norms of Wq's rows and columns, whoever summed them."""
    outputs, inputs = len(rows.squares), len(columns.squares)
    backward = _plan(columns, np.reciprocal(channels), outputs)
    return _plan(rows, scales, inputs), backward


def plan_bytes(columns: int) -> int:
    """Bytes of device memory that `plan_directions` needs for a weight of `columns` inputs."""
    values = max(_BLOCK_VALUES, columns)
    # Codes, int32 codes, their squares and absolute values; 8 for the sums, far fewer.
    return values * (1 + 4 + 4 + 4 + 8)


@dataclass(frozen=True)
class Norms:
    """Of every row of a matrix: int64[rows] sums of squares and of absolute values."""

    squares: NDArray[np.int64]
    absolutes: NDArray[np.int64]


def _norms(codes: NDArray[np.int8], device: torch.device | None) -> tuple[Norms, Norms]:
    """Of the rows of int8[N, K], and of its columns."""
    import torch

    device = device or torch.device("cpu")
    count, width = codes.shape
    rows = torch.empty((2, count), dtype=torch.int64, device=device)
    columns = torch.zeros((2, width), dtype=torch.int64, device=device)
    block = max(1, _BLOCK_VALUES // width)
    for start in range(0, count, block):
        part = torch.from_numpy(codes[start : start + block]).to(device).to(torch.int32)
        for kind, values in enumerate((part * part, part.abs())):
            rows[kind, start : start + block] = values.sum(dim=1, dtype=torch.int64)
            columns[kind] += values.sum(dim=0, dtype=torch.int64)
    return Norms(*rows.cpu().numpy()), Norms(*columns.cpu().numpy())


def _plan(norms: Norms, out_scale: NDArray[np.float32], inputs: int) -> MatrixPlan:
    squared_scale = out_scale.astype(np.float64) ** 2
    weighted = 0.0
    # In blocks of a fixed size: another order of a floating sum would be another plan.
    for start in range(0, len(squared_scale), 512):
        part = slice(start, start + 512)
        weighted += float(norms.squares[part] @ squared_scale[part])
    gain = float(np.sum(squared_scale)) / weighted if weighted > 0 else 1.0
    max_square = max(1, int(norms.squares.max()))
    return MatrixPlan(sqrt(max_square), float(norms.absolutes.max()), gain, inputs)
