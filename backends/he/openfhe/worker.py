"""The worker's half over OpenFHE: scalars times ciphertexts, added up. It has no key.

OpenFHE multiplies by whole numbers from 0 on. So every weight is taken 128 too large, and of each
sum what that makes too much is subtracted: 128 times the sum of all inputs, once a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import Payload, WorkerCipher
from backends.he.openfhe.library import one_thread
from backends.he.openfhe.scheme import scheme
from backends.he.wire import Format

_SHIFT = 128


class OpenFheWorker(WorkerCipher):
    """Worker half of "openfhe-bfv" or "openfhe-ckks". Raises OpenFheError where there is none."""

    def __init__(self, name: str) -> None:
        self._scheme = scheme(name)
        self.packing = self._scheme.packing

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> NDArray[np.int64]:
        return (weight if forward else weight.T).astype(np.int64) + _SHIFT

    @one_thread()
    def multiply(
        self, payload: Payload, tokens: int, matrix: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        outputs, inputs = matrix.shape
        data = np.frombuffer(payload, np.uint8)
        self._scheme.packing.require(data.size, inputs, tokens)
        form = self._scheme.form
        words = data.view("<u8").reshape(-1, inputs, 2, form.nbytes // 16)
        answer = np.empty((len(words), outputs, form.nbytes // 8), "<u8")
        for block, each in enumerate(words):
            ciphertexts = [form.ciphertext(word) for word in each]
            too_much = self._sum(ciphertexts, [_SHIFT] * inputs)
            for j, row in enumerate(matrix.tolist()):
                found = self._scheme.context.EvalSub(self._sum(ciphertexts, row), too_much)
                answer[block, j] = form.coefficients(found).reshape(-1)
        return answer.reshape(-1).view(np.uint8)

    def _sum(self, ciphertexts: list[Any], factors: list[int]) -> Any:
        """The sum of whole numbers times ciphertexts."""
        context = self._scheme.context
        multiply, add = context.EvalMultNoCheck, context.EvalAddInPlaceNoCheck
        total = multiply(ciphertexts[0], factors[0])
        for ciphertext, factor in zip(ciphertexts[1:], factors[1:], strict=True):
            add(total, multiply(ciphertext, factor))
        return total
