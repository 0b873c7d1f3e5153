"""The planner: what scale can never wrap, and what error to expect. Public arithmetic only.

For a matrix M (N x K, int8) and one token x the owner encrypts round(alpha*x*q/p) with

    alpha = (p/2 - margin) / (||x||_2 * max_j ||M_j||_2).

By Cauchy-Schwarz |alpha * M_j.x| <= p/2 - margin, and `margin` bounds everything else that is
added to a result (rounding of u, LWE error, rounding of the message, dropped bits), so no
result can wrap: overflow is impossible, not improbable.

Error. The rounding of u to p is uniform on +-1/2, independent of the message, so result j
carries noise of variance ||M_j||^2 * v with v = 1/12 + (p/q)^2 * (10 + 1/12), plus
2^(2*delta)/12 + 1/12 from the two roundings on the way down. For x in general position
E[(M_j.x)^2] = ||x||^2 ||M_j||^2 / K. Their ratio, weighted by the output scales, is the
predicted relative error ||y - y'||_F / ||y||_F against the same int8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from backends.he.params import ERROR_BITS, ERROR_BOUND, Parameters


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
        per_input = 0.5 + 2.0**-8 + (ERROR_BOUND + 0.5) * p_over_q
        return self.max_l1 * per_input + 2.0**parameters.dropped_bits + 2.0

    def amplitude(self, parameters: Parameters) -> float:
        """(p/2 - margin) / max_norm: alpha is this over ||x||_2.

        Raises ValueError when the matrix is too wide for the parameters.
        """
        room = parameters.worker_modulus / 2 - self.margin(parameters)
        if room <= 0:
            raise ValueError(
                f"a matrix with {self.in_features} inputs and row L1 norm {self.max_l1:.0f} "
                f"leaves no room below p/2 with {parameters.limbs} limbs; use more limbs or "
                "split the group"
            )
        return room / self.max_norm

    def predicted_error(self, parameters: Parameters) -> float:
        """Expected relative error of results against the same int8 weights, as a fraction."""
        p_over_q = parameters.worker_modulus / parameters.modulus
        up = 1 / 12 + p_over_q**2 * (ERROR_BITS / 4 + 1 / 12)
        down = (4.0**parameters.dropped_bits + 1) / 12 * self.noise_gain
        return sqrt((up + down) * self.in_features) / self.amplitude(parameters)


def plan_matrix(weight: NDArray[np.int8], out_scale: NDArray[np.float32]) -> MatrixPlan:
    """Plan for int8[outputs, inputs] with float32[outputs] scales (exact integer sums)."""
    max_square = 1
    max_l1 = 0
    weighted = 0.0
    for start in range(0, len(weight), 512):
        rows = weight[start : start + 512].astype(np.int32)
        squares = np.einsum("nk,nk->n", rows, rows, dtype=np.int64)
        max_square = max(max_square, int(squares.max()))
        max_l1 = max(max_l1, int(np.abs(rows).sum(axis=1, dtype=np.int64).max()))
        weighted += float(squares @ out_scale[start : start + 512].astype(np.float64) ** 2)
    scales = float(np.sum(out_scale.astype(np.float64) ** 2))
    gain = scales / weighted if weighted > 0 else 1.0
    return MatrixPlan(sqrt(max_square), float(max_l1), gain, weight.shape[1])
