"""The worker's whole job: one int8 matrix product, recombined mod p and rounded.

This module holds no key and imports nothing that could: a test walks its imports.

    Y = sum_l 256^l planes_l[T, K] @ M^T  mod p
    answer = round(Y / 2^delta)               two bytes a value, little endian

How the product is made is the affair of the machine's kernel (`matmul/`); the bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import Payload, WorkerCipher
from backends.he.matmul.choice import chosen_kernel
from backends.he.matmul.interface import Kernel
from backends.he.params import Parameters


def check_request_bytes(size: int, limbs: int, tokens: int, inputs: int) -> None:
    """Raise ValueError unless a request of `size` bytes is int8[limbs, T, K]."""
    expected = limbs * tokens * inputs
    if size != expected:
        raise ValueError(
            f"a request of {tokens} tokens with {inputs} inputs has {expected} bytes, this one "
            f"{size}"
        )


class MlweWorker(WorkerCipher):
    """Worker half of the module-LWE backend on CPU.

    kernel  what multiplies; None takes this process's (`matmul/choice.py`)
    """

    def __init__(self, parameters: Parameters, kernel: Kernel | None = None) -> None:
        self._parameters = parameters
        self._kernel = kernel or chosen_kernel()

    def load(self, weight: NDArray[np.int8], forward: bool) -> Any:
        return self._kernel.pack(weight, forward)

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        limbs = self._parameters.limbs
        digits = np.frombuffer(payload, np.int8)
        check_request_bytes(digits.size, limbs, tokens, matrix.inputs)
        planes = digits.reshape(limbs, tokens, matrix.inputs)
        answer = self._kernel.answer(planes, matrix, self._parameters.dropped_bits)
        return answer.reshape(-1).view(np.uint8)
