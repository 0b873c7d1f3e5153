"""The same interface with no encryption at all: for tests, debugging and the clear baseline.

Values travel as float32. Nothing here is private, and the name says so wherever it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.entropy import Entropy, OsEntropy
from backends.he.integrity import (
    POOL,
    Float64Array,
    Honesty,
    Judge,
    Pool,
    draw_rows,
    survey,
)
from backends.he.interface import (
    Encrypted,
    Float32Array,
    NonFiniteInputError,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    UnguardedError,
    WorkerCipher,
)
from backends.he.wire import Format


@dataclass(frozen=True)
class Sealed:
    """What an answer to T tokens is held against; without a check, only T."""

    tokens: int
    expected: Expected | None = field(repr=False)


@dataclass(frozen=True)
class Expected:
    """For one request: the rows of the pool, float64[T, ROWS], and each token's unit float64[T]."""

    check: ClearCheck
    rows: NDArray[np.int64] = field(repr=False)
    values: Float64Array = field(repr=False)
    unit: Float64Array = field(repr=False)

    def wipe(self) -> None:
        """Overwrite it: where it goes the way of the ciphers', tests of these see more."""
        for part in (self.rows, self.values, self.unit):
            part[...] = 0


class ClearCheck:
    """The check of `integrity.py`; an honest worker's noise is the rounding of its float32 sums.

    A sum of K products errs by about sqrt(K)*2^-24 of the root of the sum of their squares (Higham
    and Mary 2019), so all N errors together, as a vector, by sqrt(K)*2^-24 * ||x||*||M|| at most,
    and by 2^-149 each where numbers get that small. This is taken for the deviation; and as
    roundings are no random numbers, the same for the same x, a mean may drift by as much.
    """

    def __init__(
        self, name: str, weight: NDArray[np.int8], forward: bool, entropy: Entropy
    ) -> None:
        outputs, inputs = weight.shape if forward else weight.shape[::-1]
        self._pool = Pool(entropy, outputs).whole()
        found = survey(torch.from_numpy(self._pool), weight, forward, entropy)
        self._projected = found.projected.numpy()
        self._size = np.sqrt(inputs) * 2.0**-24 * np.linalg.norm(weight.astype(np.float64))
        self._least = 2.0**-149 * inputs * outputs
        honesty = Honesty(np.zeros(POOL), np.ones(POOL), drift=1.0)
        self._judge = Judge(name, honesty)
        self._entropy = entropy

    def expect(self, values: Float32Array) -> Expected:
        """For a request of float32[T, K]."""
        wide, rows = values.astype(np.float64), draw_rows(self._entropy.fresh_key())
        lengths = np.linalg.norm(wide, axis=1)
        unit = self._size * lengths + self._least
        return Expected(self, rows, wide @ self._projected[rows].T, unit)

    def require(self, expected: Expected, answer: Float32Array, worker: str) -> None:
        """Raise WrongAnswerError unless answer float32[T, N] fits."""
        with np.errstate(invalid="ignore", over="ignore"):
            found = answer.astype(np.float64) @ self._pool[expected.rows].T.astype(np.float64)
            differences = found - expected.values
        self._judge.require(expected.rows, differences, worker, expected.unit)


class ClearOwner(OwnerCipher):
    """Sends inputs as they are. Its only secrets are those of its checks.

    unverified  take answers for matrices that were never guarded, too
    """

    def __init__(self, entropy: Entropy | None = None, unverified: bool = False) -> None:
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._unverified = unverified
        self._checks: dict[str, ClearCheck] = {}

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        return "it does not encrypt"

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
        check = self._checks.get(matrix.name)
        expected = None if check is None else check.expect(values)
        return Encrypted(values.reshape(-1).view(np.uint8), Sealed(len(x), expected))

    def decrypt(
        self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        answer = np.frombuffer(payload, np.float32)
        if answer.size != sealed.tokens * matrix.out_features:
            raise ValueError(f"{matrix.name}: wrong number of bytes in an answer")
        answer = answer.reshape(-1, matrix.out_features)
        if sealed.expected is not None:
            sealed.expected.check.require(sealed.expected, answer, worker)
        elif not self._unverified:
            raise UnguardedError(matrix.name)
        self.discard(sealed)
        return answer * matrix.out_scale

    def discard(self, sealed: Sealed) -> None:
        if sealed.expected is not None:
            sealed.expected.wipe()


class ClearWorker(WorkerCipher):
    """Multiplies float32 by the int8 weights, whatever the format."""

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> torch.Tensor:
        operand = torch.from_numpy(weight.astype(np.float32))
        return operand.t() if forward else operand

    def multiply(self, payload: Payload, tokens: int, matrix: torch.Tensor) -> NDArray[np.uint8]:
        values = np.frombuffer(payload, np.float32)
        if values.size != tokens * matrix.shape[0]:
            raise ValueError("wrong number of bytes in a request")
        x = torch.from_numpy(values.reshape(tokens, -1).copy())
        return (x @ matrix).numpy().reshape(-1).view(np.uint8)
