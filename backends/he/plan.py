"""The planner: how values travel, at what scale, and what error to expect. Public arithmetic only.

For a matrix M (N x K, int8) and one token x the owner encrypts round(alpha*x*q/p) with

    alpha = gain * (p/2 - margin) / (||x||_2 * max_j ||M_j||_2),        p = 2^(8*limbs).

`exact`: gain is 1. By Cauchy-Schwarz |alpha * M_j.x| <= p/2 - margin, and `margin` bounds all else
that is added to a result (rounding of u, LWE error, rounding of the message, dropped bits), so no
result can wrap: overflow is impossible, not improbable.

`thin`: results are far below that bound (2 to 8 times, on real models), so the owner learns a gain
from those it has decrypted (`gain.py`), and what wraps is seen and repaired (`repair.py`). The
margin is MARGIN standard deviations of the noise.

Error. u is rounded to a multiple of `unit` (1, where all of p travels): uniform on +-unit/2,
independent of the message. So result j carries noise of variance ||M_j||^2 * v with
v = unit^2/12 + (p/q)^2 * (10 + 1/12), plus 4^delta/12 from the two roundings on the way down
(`docs/cipher.md` has the whole law). For x in general position the mean square of M_j.x is
||x||^2 ||M_j||^2 / K. Their ratio, weighted by the output scales, is the predicted relative error
||y - y'||_F / ||y||_F against the same int8 weights.

Formats. Of those whose predicted error, at `nominal_gain`, is within the target, a thin
plan takes the one with the fewest bytes a token. It must also leave the check of answers sharp: a
result that wrapped is off by p, and the check's noise at most CHECK_NOISE of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backends.he.params import ERROR_BITS, ERROR_BOUND, Parameters
from backends.he.wire import DOWN_BITS, EXACT, UP_BITS, Format

if TYPE_CHECKING:
    import torch  # not when this is loaded: a worker, which reads plans, does without it

_BLOCK_VALUES = 1 << 20  # int8 values summed at a time

FORWARD_ERROR, BACKWARD_ERROR = 0.07, 0.05
"""Of a product, relative, at most. What errors forward do to the logits goes through the softmax
into every gradient; those backward only add up (`benchmarks.quality` has what either does)."""
LEAST_FORWARD = Format(20, 10)
"""Forward, no format has fewer bits: up to 2,048 inputs an error is 2 % then. With 18 and 8 the
adapters' gradients of a small model were 22 % off, with these 8 %, with all bits 7 %: what is left
is backward's."""
LEAST = Format(UP_BITS[0], DOWN_BITS[0])
PRECISE_ERROR = 0.002
"""The same for a language-model head: logits are exponentiated."""
_GAIN_PER_ROOT = 0.1
MARGIN = 6.0
CHECK_NOISE = 0.125
"""Standard deviation of the check's differences over p, at most."""
LARGEST_GAIN = 16.0
COEFFICIENT_SQUARE = 7 / 12
"""Mean square of a coefficient of the check: uniform on [1/2, 1), either sign."""


@dataclass(frozen=True)
class MatrixPlan:
    """Public facts about one int8 matrix M (outputs x inputs), enough to scale and predict.

    max_norm        max_j ||M_j||_2, at least 1
    max_l1          max_j ||M_j||_1
    noise_gain      sum_j s_j^2 / sum_j s_j^2 ||M_j||^2 over output scales s: how much the
                    roundings on the way down weigh against the ones on the way up
    in_features     K
    up_bits, down_bits  of the format that its values travel in
    """

    max_norm: float
    max_l1: float
    noise_gain: float
    in_features: int
    up_bits: int = EXACT.up_bits
    down_bits: int = EXACT.down_bits

    @property
    def format(self) -> Format:
        """How its values travel."""
        return Format(self.up_bits, self.down_bits)

    def input_variance(self, modulus: int) -> float:
        """Variance of what encrypting adds to each value, in units of p; q is `modulus`."""
        p_over_q = self.format.modulus / modulus
        return self.format.unit**2 / 12 + p_over_q**2 * (ERROR_BITS / 4 + 1 / 12)

    def noise(self, parameters: Parameters) -> float:
        """Standard deviation of what is added to an exact result, in units of p, of any row."""
        up = self.max_norm**2 * self.input_variance(parameters.modulus)
        return sqrt(up + 4.0**self.format.dropped_bits / 12)

    def margin(self, parameters: Parameters) -> float:
        """What is held back of p/2 for everything that is added to an exact result.

        A bound on it, or for `thin`, MARGIN standard deviations.
        """
        form = self.format
        if parameters.thin:
            return MARGIN * self.noise(parameters)
        p_over_q = form.modulus / parameters.modulus
        per_input = form.unit * (0.5 + 2.0**-24) + (ERROR_BOUND + 0.5) * p_over_q
        return self.max_l1 * per_input + 2.0**form.dropped_bits + 2.0

    def amplitude(self, parameters: Parameters, gain: float = 1.0) -> float:
        """gain * (p/2 - margin) / max_norm: alpha is this over ||x||_2.

        Raises ValueError when the matrix is too wide for the parameters.
        """
        room = self.format.modulus / 2 - self.margin(parameters)
        if room <= 0:
            raise ValueError(
                f"a matrix with {self.in_features} inputs and row L1 norm {self.max_l1:.0f} "
                f"leaves no room below p/2 = 2^{8 * self.format.limbs - 1}; split it into narrower "
                "ones"
            )
        return gain * room / self.max_norm

    def check_noise(self, squares: float, outputs: int, parameters: Parameters) -> float:
        """Standard deviation of the check's differences (`integrity.py`) of one row, over p.

        squares  sum of all the matrix's entries' squares
        """
        up = self.input_variance(parameters.modulus) * squares
        down = outputs * 4.0**self.format.dropped_bits / 12
        return sqrt(COEFFICIENT_SQUARE * (up + down)) / self.format.modulus

    def predicted_error(self, parameters: Parameters, gain: float = 1.0) -> float:
        """Expected relative error of results against the same int8 weights, as a fraction."""
        up = self.input_variance(parameters.modulus)
        down = 4.0**self.format.dropped_bits / 12 * self.noise_gain
        return sqrt((up + down) * self.in_features) / self.amplitude(parameters, gain)


def plan_matrix(
    weight: NDArray[np.int8], out_scale: NDArray[np.float32], parameters: Parameters | None = None,
    target: float = FORWARD_ERROR,
) -> MatrixPlan:  # fmt: skip
    """Plan for int8[outputs, inputs] with float32[outputs] scales (exact integer sums)."""
    squares, absolutes = np.empty((2, len(weight)), np.int64)
    block = max(1, _BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), block):
        wide = weight[start : start + block].astype(np.int64)
        squares[start : start + block] = (wide**2).sum(axis=1)
        absolutes[start : start + block] = np.abs(wide).sum(axis=1)
    rows = Norms(squares, absolutes)
    return _plan(rows, out_scale, weight.shape[1], parameters, target)


def plan_directions(
    codes: NDArray[np.int8], scales: NDArray[np.float32], parameters: Parameters | None,
    precise: bool = False, device: torch.device | None = None,
    channels: NDArray[np.float32] | None = None,
) -> tuple[MatrixPlan, MatrixPlan]:  # fmt: skip
    """Plans of int8[N, K] with float32[N] scales: of Wq forward, and of Wq^T backward.

    parameters  None, for the `clear` backend, gives the plans of `exact`
    precise     plan for PRECISE_ERROR
    device      where to sum (the CPU); the sums are exact, so the plans are the same everywhere
    channels    c, float32[K] (`quantise.py`), None for ones
    """
    return plans_from(*_norms(codes, device), scales, parameters, precise, channels)


def plans_from(
    rows: Norms, columns: Norms, scales: NDArray[np.float32], parameters: Parameters | None,
    precise: bool = False, channels: NDArray[np.float32] | None = None,
) -> tuple[MatrixPlan, MatrixPlan]:  # fmt: skip
    """The same from the norms of Wq's rows and columns, whoever summed them."""
    outputs, inputs = len(rows.squares), len(columns.squares)
    back = np.ones(inputs, np.float32) if channels is None else np.reciprocal(channels)
    backward = _plan(columns, back, outputs, parameters, target_of(False, precise))
    return _plan(rows, scales, inputs, parameters, target_of(True, precise)), backward


def nominal_gain(inputs: int) -> float:
    """What a plan takes for granted of a matrix's calibrated scale: sqrt(K)/10, at least 1.

    Were entries Gaussian, the largest of thousands of results would be 4 to 5 deviations, and the
    bound is sqrt(K) of them. Learnt on Gemma 3 270M: 2.1 to 5.4 at K = 640, 2.9 to 4.5 at 1,024,
    4.9 to 5.9 at 1,536, 5.9 to 8.3 at 2,048, 9 to 11 at 4,096.
    """
    return min(max(1.0, _GAIN_PER_ROOT * sqrt(inputs)), LARGEST_GAIN)


def target_of(forward: bool, precise: bool = False) -> float:
    """The error that a thin plan aims at."""
    if precise:
        return PRECISE_ERROR
    return FORWARD_ERROR if forward else BACKWARD_ERROR


def nominal_plan(
    inputs: int, outputs: int, parameters: Parameters, forward: bool = True, precise: bool = False
) -> MatrixPlan:
    """The plan of a matrix of which only the shape is known, its entries taken as Gaussian.

    A row's largest of K entries, which its codes are scaled by, is taken as sqrt(2*ln(K))
    deviations.
    """
    limit = 127 if precise else parameters.weight_limit
    deviation = limit / sqrt(2 * log(max(inputs, 2)))
    # Norms of rows differ by their sampling error only; the largest of many is a little more.
    spread = 1 + sqrt(log(max(outputs, 2)) / inputs)
    norm = deviation * sqrt(inputs)
    plan = MatrixPlan(norm * spread, 0.8 * deviation * inputs * spread, 1 / norm**2, inputs)
    target = target_of(forward, precise)
    return _with_format(plan, outputs * norm**2, outputs, parameters, target)


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


def _plan(
    norms: Norms, out_scale: NDArray[np.float32], inputs: int, parameters: Parameters | None,
    target: float,
) -> MatrixPlan:  # fmt: skip
    squared_scale = out_scale.astype(np.float64) ** 2
    weighted = 0.0
    # In blocks of a fixed size: another order of a floating sum would be another plan.
    for start in range(0, len(squared_scale), 512):
        part = slice(start, start + 512)
        weighted += float(norms.squares[part] @ squared_scale[part])
    gain = float(np.sum(squared_scale)) / weighted if weighted > 0 else 1.0
    max_square = max(1, int(norms.squares.max()))
    plan = MatrixPlan(sqrt(max_square), float(norms.absolutes.max()), gain, inputs)
    if parameters is None:
        return plan
    total = float(norms.squares.sum())
    return _with_format(plan, total, len(norms.squares), parameters, target)


def _with_format(
    plan: MatrixPlan, squares: float, outputs: int, parameters: Parameters, target: float
) -> MatrixPlan:
    """The plan with the lightest format that is good enough; with all bits where none is.

    squares  sum of all entries' squares
    """
    if not parameters.thin:
        return plan
    least = LEAST_FORWARD if target == FORWARD_ERROR else LEAST
    formats = sorted(
        (Format(up, down) for up in UP_BITS for down in DOWN_BITS),
        key=lambda f: f.up_bytes(plan.in_features) + f.down_bytes(outputs),
    )
    for form in formats:
        found = replace(plan, up_bits=form.up_bits, down_bits=form.down_bits)
        if form.up_bits < least.up_bits or form.down_bits < least.down_bits:
            continue
        if found.margin(parameters) >= form.modulus / 2:
            continue
        error = found.predicted_error(parameters, nominal_gain(plan.in_features))
        if error <= target and found.check_noise(squares, outputs, parameters) <= CHECK_NOISE:
            return found
    return plan
