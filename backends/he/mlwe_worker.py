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
from backends.he.packing import pack_answer, unpack_request
from backends.he.wire import Format


class MlweWorker(WorkerCipher):
    """Worker half of the module-LWE backend on CPU.

    kernel  what multiplies; None takes this process's (`matmul/choice.py`)
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self._kernel = kernel or chosen_kernel()

    def load(self, weight: NDArray[np.int8], forward: bool, form: Format) -> Any:
        return self._kernel.pack(weight, forward), form

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        packed, form = matrix
        planes = unpack_request(np.frombuffer(payload, np.uint8), tokens, packed.inputs, form)
        return pack_answer(self._kernel.answer(planes, packed, form.dropped_bits), form)
