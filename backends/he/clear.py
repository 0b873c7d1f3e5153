"""The same interface with no encryption at all: for tests, debugging and the clear baseline.

Values travel as float32. Nothing here is private, and the name says so wherever it shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from backends.he.direct import DirectCheck, Expected
from backends.he.entropy import Entropy, OsEntropy
from backends.he.integrity import Float64Array
from backends.he.interface import (
    Encrypted,
    Float32Array,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    UnguardedError,
    WorkerCipher,
    check_input,
    require_finite,
)
from backends.he.secret import UseOnce
from backends.he.wire import CLEAR, Format


class Sealed(UseOnce):
    """What an answer to T tokens is held against; without a check, only T."""

    def __init__(self, tokens: int, expected: Expected | None) -> None:
        super().__init__()
        self.tokens, self.expected = tokens, expected
        self.begin_sealing()

    def _erase(self) -> None:
        if self.expected is not None:
            self.expected.wipe()


class ClearOwner(OwnerCipher):
    """Sends inputs as they are. Its only secrets are those of its checks.

    An honest worker's error is the rounding of its float32 sums. A sum of K products errs by about
    sqrt(K)*2^-24 of the root of the sum of their squares (Higham and Mary 2019), so all N errors
    together, as a vector, by sqrt(K)*2^-24 * ||x||*||M|| at most, and by 2^-149 each where numbers
    get that small.

    unverified  take answers for matrices that were never guarded, too
    """

    packing = CLEAR

    def __init__(self, entropy: Entropy | None = None, unverified: bool = False) -> None:
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._unverified = unverified
        self._checks: dict[str, DirectCheck] = {}

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        return "it does not encrypt"

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._checks[matrix.name] = DirectCheck(matrix.name, weight, forward, self._entropy)

    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return CLEAR.bytes_of(matrix.in_features, tokens)

    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return CLEAR.bytes_of(matrix.out_features, tokens)

    def encrypt(self, x: Float32Array, matrix: OwnerMatrix) -> Encrypted:
        check_input(x, matrix)
        values = x * matrix.in_scale
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        require_finite(np.isfinite(lengths), matrix)
        check, expected = self._checks.get(matrix.name), None
        if check is not None:
            expected = check.expect(values, _unit(check, lengths, matrix))
        return Encrypted(values.reshape(-1).view(np.uint8), Sealed(len(x), expected))

    def decrypt(
        self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        data = np.frombuffer(payload, np.uint8)
        CLEAR.require(data.size, matrix.out_features, sealed.tokens)
        answer = data.view(np.float32).reshape(-1, matrix.out_features)
        with sealed.opening():
            if sealed.expected is not None:
                sealed.expected.require(answer, worker)
            elif not self._unverified:
                raise UnguardedError(matrix.name)
        return answer * matrix.out_scale

    def discard(self, sealed: Sealed) -> None:
        sealed.wipe()


def _unit(check: DirectCheck, lengths: Float64Array, matrix: OwnerMatrix) -> Float64Array:
    """float64[T]: how long an honest answer's errors are together."""
    size = np.sqrt(matrix.in_features) * 2.0**-24 * check.norm
    return size * lengths + 2.0**-149 * matrix.in_features * matrix.out_features


class ClearWorker(WorkerCipher):
    """Multiplies float32 by the int8 weights, whatever the format."""

    packing = CLEAR

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> Float32Array:
        return (weight.T if forward else weight).astype(np.float32)

    def multiply(self, payload: Payload, tokens: int, matrix: Float32Array) -> NDArray[np.uint8]:
        data = np.frombuffer(payload, np.uint8)
        CLEAR.require(data.size, len(matrix), tokens)
        with np.errstate(invalid="ignore", over="ignore"):  # of whatever was sent
            answer = data.view(np.float32).reshape(tokens, -1) @ matrix
        return answer.reshape(-1).view(np.uint8)
