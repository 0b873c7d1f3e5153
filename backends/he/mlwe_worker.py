"""The worker's whole job: one int8 matrix product, recombined mod p and rounded.

This module holds no key and imports nothing that could: a test walks its imports.

    P = planes[limbs*T, K] @ M^T      int8 x int8 -> int32
    Y = sum_l 256^l P_l mod p          (uint32 wraps at 2^32, and p divides 2^32)
    answer = round(Y / 2^delta)        two bytes a value, little endian

The limb planes cannot overflow int32: |P| <= 128*127*K < 2^31 for K <= 131,072.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from backends.he import vnni
from backends.he.gemm import int8_product
from backends.he.interface import Payload, WorkerCipher
from backends.he.params import Parameters
from backends.threads import run_split

MAX_INPUTS = (1 << 31) // (128 * 127)
_PRODUCT_BYTES = 8 << 20  # int32 products of one slice of outputs: small enough for the L3


def check_inputs(inputs: int) -> None:
    """Raise ValueError when the products of so many inputs could leave int32."""
    if inputs > MAX_INPUTS:
        raise ValueError(f"{inputs} inputs overflow int32; at most {MAX_INPUTS}")


def check_request_bytes(size: int, limbs: int, tokens: int, inputs: int) -> None:
    """Raise ValueError unless a request of `size` bytes is int8[limbs, T, K]."""
    expected = limbs * tokens * inputs
    if size != expected:
        raise ValueError(
            f"a request of {tokens} tokens with {inputs} inputs has {expected} bytes, this one "
            f"{size}"
        )


@njit(nogil=True, cache=True)
def _recombine(products: Any, out: Any, dropped_bits: int, first: int, last: int) -> None:
    """products int32[limbs, T, N] -> out uint16[T, N] for tokens first..last."""
    limbs, _, outputs = products.shape
    half = np.uint32((1 << dropped_bits) >> 1)
    shift = np.uint32(dropped_bits)
    mask = np.uint32((1 << (8 * limbs - dropped_bits)) - 1)
    for t in range(first, last):
        if limbs == 3:
            p0, p1, p2 = products[0, t], products[1, t], products[2, t]
            for j in range(outputs):
                y = np.uint32(p0[j]) + (np.uint32(p1[j]) << np.uint32(8))
                y = np.uint32(y + (np.uint32(p2[j]) << np.uint32(16)) + half)
                out[t, j] = np.uint16((y >> shift) & mask)
        else:
            p0, p1 = products[0, t], products[1, t]
            for j in range(outputs):
                y = np.uint32(np.uint32(p0[j]) + (np.uint32(p1[j]) << np.uint32(8)) + half)
                out[t, j] = np.uint16((y >> shift) & mask)


class MlweWorker(WorkerCipher):
    """Worker half of the module-LWE backend on CPU.

    fused  use the fused VNNI kernel (`vnni.py`), which keeps a packed copy of each matrix; else
           oneDNN's int8 GEMM through torch on the weight as stored. Same bits either way. None
           takes the kernel where the machine has the instructions.
    """

    def __init__(self, parameters: Parameters, fused: bool | None = None) -> None:
        self._parameters = parameters
        self._fused = vnni.supported() if fused is None else fused

    def load(self, weight: NDArray[np.int8], forward: bool) -> vnni.PackedWeight | NDArray[np.int8]:
        if self._fused:
            return vnni.pack(weight, forward)
        operand = weight.T if forward else weight
        check_inputs(len(operand))
        return operand

    def multiply(
        self, payload: Payload, tokens: int, matrix: vnni.PackedWeight | NDArray[np.int8]
    ) -> NDArray[np.uint8]:
        limbs, dropped_bits = self._parameters.limbs, self._parameters.dropped_bits
        inputs = matrix.inputs if isinstance(matrix, vnni.PackedWeight) else len(matrix)
        digits = np.frombuffer(payload, np.int8)
        check_request_bytes(digits.size, limbs, tokens, inputs)
        planes = digits.reshape(limbs, tokens, inputs)
        if isinstance(matrix, vnni.PackedWeight):
            answer = vnni.multiply(planes, matrix, dropped_bits)
        else:
            answer = _multiply_by_slices(planes, matrix, dropped_bits)
        return answer.reshape(-1).view(np.uint8)


def _multiply_by_slices(
    planes: NDArray[np.int8], operand: NDArray[np.int8], dropped_bits: int
) -> NDArray[np.uint16]:
    """planes int8[limbs, T, K] @ operand int8[K, N], a slice of outputs at a time."""
    limbs, tokens, inputs = planes.shape
    outputs = operand.shape[1]
    answer = np.empty((tokens, outputs), np.uint16)
    width = max(256, _PRODUCT_BYTES // (4 * limbs * tokens) // 64 * 64)
    for start in range(0, outputs, width):
        stop = min(outputs, start + width)
        products = int8_product(planes.reshape(-1, inputs), operand[:, start:stop])
        _recombine_all(products.reshape(limbs, tokens, -1), answer[:, start:stop], dropped_bits)
    return answer


def _recombine_all(products: NDArray[np.int32], out: NDArray[np.uint16], dropped_bits: int) -> None:
    tokens = products.shape[1]
    run_split(lambda a, b: _recombine(products, out, dropped_bits, a, b), tokens)
