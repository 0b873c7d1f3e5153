"""The worker's half over OpenFHE: scalars times ciphertexts, added up. It has no key.

Weights have 8 bits, so that a column of a matrix has at most 128 of them but for their signs: its
ciphertext is multiplied by each of these once, for all outputs, and what is left is to add or to
subtract. OpenFHE takes longer to multiply than to add.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import Payload, WorkerCipher
from backends.he.openfhe.library import one_thread
from backends.he.openfhe.scheme import scheme
from backends.he.wire import Format


class OpenFheWorker(WorkerCipher):
    """Worker half of "openfhe-bfv" or "openfhe-ckks". Raises OpenFheError where there is none."""

    def __init__(self, name: str) -> None:
        self._scheme = scheme(name)
        self.packing = self._scheme.packing

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> NDArray[np.int8]:
        return weight if forward else weight.T

    @one_thread()
    def multiply(
        self, payload: Payload, tokens: int, matrix: NDArray[np.int8]
    ) -> NDArray[np.uint8]:
        outputs, inputs = matrix.shape
        data = np.frombuffer(payload, np.uint8)
        self._scheme.packing.require(data.size, inputs, tokens)
        form = self._scheme.form
        words = data.view("<u8").reshape(-1, inputs, 2, form.nbytes // 16)
        answer = np.empty((len(words), outputs, form.nbytes // 8), "<u8")
        for block, each in enumerate(words):
            sums = self._sums(form.ciphertexts(each), matrix)
            answer[block] = form.coefficients(sums).reshape(outputs, -1)
        return answer.reshape(-1).view(np.uint8)

    def _sums(self, ciphertexts: list[Any], matrix: NDArray[np.int8]) -> list[Any]:
        """For each row of a matrix, the sum of its weights times ciphertexts."""
        context = self._scheme.context
        sums = [self._scheme.form.nothing() for _ in matrix]
        for ciphertext, column in zip(ciphertexts, matrix.T.tolist(), strict=True):
            factors = {abs(weight) for weight in column} - {0}
            products = {each: context.EvalMultNoCheck(ciphertext, each) for each in factors}
            for total, weight in zip(sums, column, strict=True):
                if weight > 0:
                    context.EvalAddInPlaceNoCheck(total, products[weight])
                elif weight < 0:
                    context.EvalSubInPlace(total, products[-weight])
        return sums
