"""The same interface with no encryption at all: for tests, debugging and the clear baseline.

Values travel as float32. Nothing here is private, and the name says so wherever it shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.entropy import Entropy, OsEntropy
from backends.he.integrity import secret_signs, wrong_answer
from backends.he.interface import (
    Encrypted,
    Float32Array,
    NonFiniteInputError,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    WorkerCipher,
)


@dataclass(frozen=True)
class Sealed:
    """What was sent, float32[T, K]: nothing here is secret, but the check needs it."""

    values: Float32Array = field(repr=False)


class ClearCheck:
    """Freivalds' check in float64: V*y = (V*M)*x for secret sign vectors V, up to rounding.

    A float32 sum of K products errs by about sqrt(K)*2^-24 of the sum of their sizes (Higham and
    Mary 2019), so all N errors together, as a vector, by 2*sqrt(K)*2^-24 * ||x||*||M|| at most.
    Random signs stretch a vector's length by more than 8 with probability below 2*exp(-32).
    """

    def __init__(
        self, name: str, weight: NDArray[np.int8], forward: bool, entropy: Entropy
    ) -> None:
        operand = (weight if forward else weight.T).astype(np.float64)
        self._name = name
        self._signs = secret_signs(entropy, len(operand)).astype(np.float64)
        self._projected = self._signs @ operand
        self._size = float(np.linalg.norm(operand))

    def tolerance(self, values: Float32Array) -> NDArray[np.float64]:
        """float64[T]: the largest difference an honest answer to float32[T, K] may show."""
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        return 16 * np.sqrt(values.shape[1]) * 2.0**-24 * self._size * lengths

    def verify(self, values: Float32Array, answer: Float32Array) -> None:
        """Raise WrongAnswerError unless answer float32[T, N] fits the request float32[T, K]."""
        with np.errstate(invalid="ignore", over="ignore"):
            expected = values.astype(np.float64) @ self._projected.T
            found = answer.astype(np.float64) @ self._signs.T
            fits = np.abs(found - expected) <= self.tolerance(values)[:, None]
        # A NaN fits nothing.
        if not fits.all():
            raise wrong_answer(self._name)


class ClearOwner(OwnerCipher):
    """Sends inputs as they are. Its only secrets are the signs of its checks."""

    def __init__(self, entropy: Entropy | None = None) -> None:
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._checks: dict[str, ClearCheck] = {}

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._checks[matrix.name] = ClearCheck(matrix.name, weight, forward, self._entropy)

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
        values = x * matrix.in_scale
        return Encrypted(values.reshape(-1).view(np.uint8), Sealed(values))

    def decrypt(self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix) -> Float32Array:
        answer = np.frombuffer(payload, np.float32)
        if answer.size != len(sealed.values) * matrix.out_features:
            raise ValueError(f"{matrix.name}: wrong number of bytes in an answer")
        answer = answer.reshape(-1, matrix.out_features)
        check = self._checks.get(matrix.name)
        if check is not None:
            check.verify(sealed.values, answer)
        return answer * matrix.out_scale


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
