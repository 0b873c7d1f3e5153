"""The worker's whole job: one int8 matrix product, recombined mod p and rounded.

This module holds no key and imports nothing that could: a test walks its imports.

    Y = sum_l 256^l planes_l[T, K] @ M^T  mod p
    answer = round(Y / 2^delta)               `down_bits` bits a value

How the product is made is the affair of the machine's kernel (`matmul/`); the bits are the same.
How both travel is the matrix's format (`wire.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.interface import Payload, WorkerCipher
from backends.he.matmul.choice import chosen_kernel
from backends.he.matmul.interface import Kernel
from backends.he.packing import pack_answer, unpack_request
from backends.he.wire import Format


@dataclass(frozen=True)
class LoadedMatrix:
    """One direction of a weight, in the form of a worker's kernel, and how its values travel."""

    packed: Any = field(repr=False)
    format: Format


class MlweWorker(WorkerCipher):
    """Worker half of the module-LWE backend on CPU.

    kernel  what multiplies; None takes this process's (`matmul/choice.py`)
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self._kernel = kernel or chosen_kernel()

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> LoadedMatrix:
        return LoadedMatrix(self._kernel.pack(weight, forward), format)

    def multiply(self, payload: Payload, tokens: int, matrix: LoadedMatrix) -> NDArray[np.uint8]:
        return self._answers([(payload, tokens)], matrix)[0]

    def multiply_many(
        self, requests: Sequence[tuple[Payload, int]], matrix: LoadedMatrix
    ) -> list[NDArray[np.uint8]]:
        """One product for all: where each has few tokens, reading the weight is what it costs."""
        return self._answers(requests, matrix)

    def _answers(
        self, requests: Sequence[tuple[Payload, int]], matrix: LoadedMatrix
    ) -> list[NDArray[np.uint8]]:
        packed, wire = matrix.packed, matrix.format
        planes = [
            unpack_request(np.frombuffer(payload, np.uint8), tokens, packed.inputs, wire)
            for payload, tokens in requests
        ]
        joined = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=1)
        answers = self._kernel.answer(joined, packed, wire.dropped_bits)
        ends = list(accumulate(tokens for _, tokens in requests))
        parts = np.split(answers, ends[:-1]) if len(ends) > 1 else [answers]
        return [pack_answer(part, wire) for part in parts]
