"""Products with int8 weights on any processor, through torch's float64 GEMM.

A 24-bit value times an int8 weight, summed over up to MAX_INPUTS = 2^20, stays below 2^53, so one
float64 product is exact. That is two fp32 products' worth of work; the alternative, three 8-bit
limbs in fp32 by slices of 1,024 inputs, is three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.he.matmul.interface import Digits, Kernel, check_planes, check_values, check_weight

_SLAB_WEIGHTS = 1 << 20  # weights widened to float64 at a time: 8 MB, about a share of the L3
_EXACT_INPUTS = 1 << 14  # |int32 * int8| summed over so many inputs stays below 2^53


@dataclass(frozen=True)
class StoredWeight:
    """One direction of an int8 weight, as it is stored: int8[inputs, outputs], maybe strided."""

    operand: NDArray[np.int8]

    @property
    def inputs(self) -> int:
        """Rows."""
        return self.operand.shape[0]

    @property
    def outputs(self) -> int:
        """Columns."""
        return self.operand.shape[1]


class GenericKernel(Kernel):
    """Slow but everywhere."""

    name = "generic"
    warning = (
        "the generic kernel takes two to three times as long as clear fp32; this processor has "
        "none of the instructions that the faster ones are written for"
    )

    def pack(self, weight: NDArray[np.int8], forward: bool) -> StoredWeight:
        check_weight(weight)
        return StoredWeight(weight.T if forward else weight)

    def answer(
        self, planes: NDArray[np.int8], packed: StoredWeight, dropped_bits: int
    ) -> NDArray[np.uint16]:
        check_planes(planes, packed.inputs)
        limbs, tokens, inputs = planes.shape
        values = np.zeros((tokens, inputs))
        for limb in reversed(range(limbs)):
            values *= 256.0
            values += planes[limb]
        half, mask = (1 << dropped_bits) >> 1, (1 << (8 * limbs - dropped_bits)) - 1
        answer = np.empty((tokens, packed.outputs), np.uint16)
        for columns in _slabs(packed):
            sums = _product(values, packed.operand[:, columns]).astype(np.int64)
            answer[:, columns] = ((sums + half) >> dropped_bits) & mask
        return answer

    def digits_of(self, values: NDArray[np.int32]) -> Digits:
        check_values(values)
        return Digits(values.astype(np.float64)[None], values.shape[1], 32)

    def exact(self, digits: Digits, packed: StoredWeight) -> NDArray[np.int64]:
        if digits.inputs != packed.inputs:
            raise ValueError(f"{digits.inputs} inputs do not fit a weight with {packed.inputs}")
        values = digits.values[0]
        out = np.zeros((len(values), packed.outputs), np.int64)
        for columns in _slabs(packed):
            for k in range(0, packed.inputs, _EXACT_INPUTS):
                part = slice(k, k + _EXACT_INPUTS)
                product = _product(values[:, part], packed.operand[part, columns])
                out[:, columns] += product.astype(np.int64)
        return out


def _slabs(packed: StoredWeight) -> list[slice]:
    """Ranges of outputs whose weights are widened together."""
    width = max(64, _SLAB_WEIGHTS // packed.inputs)
    return [slice(j, min(packed.outputs, j + width)) for j in range(0, packed.outputs, width)]


def _product(values: NDArray[np.float64], weights: NDArray[np.int8]) -> NDArray[np.float64]:
    import torch  # only here: a worker with a faster kernel does without it

    product: NDArray[np.float64] = torch.matmul(
        torch.from_numpy(values), torch.from_numpy(weights.astype(np.float64))
    ).numpy()
    return product
