"""Catches a worker that returns wrong products, whatever its reason (Freivalds 1977; Slalom).

The owner keeps, per matrix M (N x K), ROWS secret random sign vectors V and U = V*M, made from
the public weights once a run. For a request B it then expects, mod p,

    V * (Y' * 2^delta)  =  U * B  +  V * r,      r the rounding of Y, uniform in +-2^(delta-1)

so the difference is a sum of N bounded, independent errors. It may be as large as eight of its
standard deviations, 2^delta * sqrt(N/12); an honest answer exceeds that with probability
2*exp(-32) per token and row (uniform errors are sub-Gaussian with their own variance).

A wrong answer passes a row with probability at most 1/2, since flipping the sign of one wrong
value moves the difference out of the tolerance; all ROWS pass with 2^-ROWS. Arbitrary bytes are
caught at once. What stays unseen is an error within the tolerance, about the size of the
roundings themselves. The signs are the owner's secret and live as long as the process.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy, Keystream
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import Parameters
from backends.threads import run_split
from protocol.errors import WrongAnswerError

ROWS = 8
"""Random sign vectors a check uses: a wrong answer passes all of them with 2^-ROWS."""


def secret_signs(entropy: Entropy, outputs: int) -> NDArray[np.int8]:
    """int8[ROWS, outputs] of +1 and -1, drawn with a key of their own."""
    bits = Keystream(entropy.fresh_key()).take(ROWS * outputs)
    return ((bits & 1).astype(np.int8) * 2 - 1).reshape(ROWS, outputs)


def wrong_answer(name: str, remark: str = "") -> WrongAnswerError:
    """The error of a failed check of the matrix `name`, for whoever decides about the worker."""
    return WrongAnswerError(
        f"{name}: the worker's answer is not the product that was asked for; the worker is broken "
        f"or lying: stop using it{remark}"
    )


@jit.kernel
def _dot_products(value: Any, matrix: Any, count: int, out: Any) -> None:
    """out[row] = sum_k value[k] * matrix[row, k] mod 2^32; four rows share each load of value."""
    for row in range(0, ROWS, 4):
        a = b = c = d = np.uint32(0)
        m0, m1, m2, m3 = matrix[row], matrix[row + 1], matrix[row + 2], matrix[row + 3]
        for k in range(count):
            v = value[k]
            a = np.uint32(a + np.uint32(v * m0[k]))
            b = np.uint32(b + np.uint32(v * m1[k]))
            c = np.uint32(c + np.uint32(v * m2[k]))
            d = np.uint32(d + np.uint32(v * m3[k]))
        out[row], out[row + 1], out[row + 2], out[row + 3] = a, b, c, d


@jit.kernel
def _differences(
    planes: Any, projected: Any, answer: Any, signs: Any, dropped_bits: int, unused_bits: int,
    out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """out int32[T, ROWS]: (V*Y'*2^delta - U*B) mod p, centred, for tokens first..last.

    Everything wraps at 2^32, which p divides; a last shift takes out what is above p.
    """
    limbs, _, inputs = planes.shape
    outputs = signs.shape[1]
    value = np.empty(max(inputs, outputs), np.uint32)
    left, right = np.empty(ROWS, np.uint32), np.empty(ROWS, np.uint32)
    for t in range(first, last):
        value[:inputs] = 0
        for limb in range(limbs):
            digits, shift = planes[limb, t], np.int32(8 * limb)
            for k in range(inputs):
                value[k] = np.uint32(value[k] + np.uint32(np.int32(digits[k]) << shift))
        _dot_products(value, projected, inputs, right)
        results = answer[t]
        for j in range(outputs):
            value[j] = np.uint32(results[j])
        _dot_products(value, signs, outputs, left)
        for row in range(ROWS):
            difference = np.uint32((left[row] << np.uint32(dropped_bits)) - right[row])
            centred = np.int32(difference << np.uint32(unused_bits))
            out[t, row] = centred >> np.int32(unused_bits)


class SignCheck:
    """What a check of one matrix has wherever it is computed: a tolerance, and its complaint."""

    def __init__(self, name: str, outputs: int) -> None:
        self._name = name
        self._outputs = outputs

    def tolerance(self, parameters: Parameters) -> float:
        """Largest difference an honest answer may show, in units of the worker modulus."""
        outputs = self._outputs
        step = 2.0**parameters.dropped_bits
        return min(outputs * step / 2, 8 * step * sqrt(outputs / 12)) + 1

    def wrong_answer(self) -> WrongAnswerError:
        """The error of an answer that does not fit."""
        return wrong_answer(self._name, " (the request revealed nothing to it)")


class IntegrityCheck(SignCheck):
    """The owner's secret check of one matrix, on the CPU."""

    def __init__(
        self, name: str, weight: NDArray[np.int8], forward: bool, entropy: Entropy
    ) -> None:
        matrix = weight if forward else weight.T
        super().__init__(name, len(matrix))
        signs = secret_signs(entropy, len(matrix))
        self._signs = signs.astype(np.int32).view(np.uint32)
        kernel = chosen_kernel()
        # V*M = (M^T * V^T)^T: the signs are the request, M is a weight with K outputs.
        digits = kernel.digits_of(signs.astype(np.int32))
        projected = kernel.exact(digits, kernel.pack(weight, not forward))
        self._projected = projected.astype(np.uint32)

    def verify(
        self, planes: NDArray[np.int8], answer: NDArray[np.uint16], parameters: Parameters
    ) -> None:
        """Raise WrongAnswerError unless answer uint16[T, N] fits the request int8[limbs, T, K]."""
        tokens = len(answer)
        found = np.empty((tokens, ROWS), np.int32)
        run_split(
            lambda a, b: _differences(
                planes, self._projected, answer, self._signs, parameters.dropped_bits,
                32 - 8 * parameters.limbs, found, a, b,
            ),
            tokens,
        )  # fmt: skip
        if np.abs(found.astype(np.int64)).max() > self.tolerance(parameters):
            raise self.wrong_answer()
