"""The same interface with no encryption at all: for tests, debugging and the clear baseline.

Values travel as float32. Nothing here is private, and the name says so wherever it shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import (
    Encrypted,
    Float32Array,
    NonFiniteInputError,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    WorkerCipher,
)


class ClearOwner(OwnerCipher):
    """Sends inputs as they are."""

    @property
    def simulated_randomness(self) -> bool:
        return False

    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return 4 * tokens * matrix.in_features

    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return 4 * tokens * matrix.out_features

    def encrypt(self, x: Float32Array, matrix: OwnerMatrix) -> Encrypted:
        if x.ndim != 2 or x.shape[1] != matrix.in_features:
            raise ValueError(
                f"{matrix.name}: takes [tokens, {matrix.in_features}], got {list(x.shape)}"
            )
        if not np.isfinite(x).all():
            raise NonFiniteInputError(f"{matrix.name}: NaN or infinity in the input")
        return Encrypted((x * matrix.in_scale).reshape(-1).view(np.uint8), len(x))

    def decrypt(self, sealed: Any, payload: Payload, matrix: OwnerMatrix) -> Float32Array:
        values = np.frombuffer(payload, np.float32)
        if values.size != sealed * matrix.out_features:
            raise ValueError(f"{matrix.name}: wrong number of bytes in an answer")
        return values.reshape(sealed, matrix.out_features) * matrix.out_scale


class ClearWorker(WorkerCipher):
    """Multiplies float32 by the int8 weights."""

    def load(self, weight: NDArray[np.int8], forward: bool) -> torch.Tensor:
        operand = torch.from_numpy(weight.astype(np.float32))
        return operand.t() if forward else operand

    def multiply(self, payload: Payload, tokens: int, matrix: torch.Tensor) -> NDArray[np.uint8]:
        values = np.frombuffer(payload, np.float32)
        if values.size != tokens * matrix.shape[0]:
            raise ValueError("wrong number of bytes in a request")
        x = torch.from_numpy(values.reshape(tokens, -1).copy())
        return (x @ matrix).numpy().reshape(-1).view(np.uint8)
