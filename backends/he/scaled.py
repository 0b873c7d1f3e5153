"""The owner's half of any scheme that multiplies integers: all of it but the encryption.

Per token t, as `plan.py` has it, with `limit` the largest result that the scheme can hold:

    alpha_t = (limit - margin) / (||x_t||_2 * max_j ||M_j||_2),      m = round(alpha_t * x)

so by Cauchy-Schwarz no result wraps. `margin` is for rounding m. What comes back is M*m, exactly or
to within `noise`; it is compared with the product in clear before a value is delivered.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.direct import DirectCheck, Expected
from backends.he.entropy import Entropy, OsEntropy
from backends.he.integrity import Float64Array
from backends.he.interface import (
    Encrypted,
    Exactness,
    Float32Array,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    UnguardedError,
    check_input,
    require_finite,
    unchecked,
)
from backends.he.plan import MatrixPlan
from backends.he.secret import UseOnce
from backends.he.wire import Packing

_LEAST_UNIT = 2.0**-20
"""Of the check's differences: a matrix of zeros has exact answers."""


class Sealed(UseOnce):
    """One encrypted request: its key, 1/alpha of each token float64[T], and its check."""

    def __init__(self, key: Any, inverse: Float64Array, expected: Expected | None) -> None:
        super().__init__()
        self.key, self.inverse, self.expected = key, inverse, expected
        self.begin_sealing()

    def _erase(self) -> None:
        if isinstance(self.key, np.ndarray):
            self.key[...] = 0
        self.key = None  # a library's is freed with its last reference
        self.inverse[...] = 0
        if self.expected is not None:
            self.expected.wipe()


class ScaledOwner(OwnerCipher):
    """What a scheme has to add is `_seal` and `_open`.

    limit       the largest |result| it can hold, in integers
    noise       standard deviation of what is added to each input; 0 where products are exact
    packing     the sizes of what travels
    unverified  decrypt answers for matrices that were never guarded, too
    """

    def __init__(
        self, limit: float, noise: float, packing: Packing, entropy: Entropy | None = None,
        unverified: bool = False,
    ) -> None:  # fmt: skip
        self._limit, self._noise, self.packing = limit, noise, packing
        self._sizes = packing
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._unverified = unverified
        self._checks: dict[str, DirectCheck] = {}

    @abstractmethod
    def _seal(self, message: Float64Array) -> tuple[NDArray[np.uint8], Any]:
        """The request's bytes for whole numbers float64[T, K], and the key that opens its answer.

        The key is drawn for this request. An array is overwritten in the end.
        """

    @abstractmethod
    def _open(self, key: Any, answer: NDArray[np.uint8], tokens: int, outputs: int) -> Float64Array:
        """float64[T, N], centred, of an answer of the right size, whatever is in it."""

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        return unchecked(self._unverified, self._checks, matrices)

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._checks[matrix.name] = DirectCheck(matrix.name, weight, forward, self._entropy)

    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return self._sizes.bytes_of(matrix.in_features, tokens)

    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return self._sizes.bytes_of(matrix.out_features, tokens)

    def exactness(self, matrices: Sequence[OwnerMatrix]) -> Exactness:
        errors = {matrix.name: self.predicted_error(matrix.plan) for matrix in matrices}
        where = max(errors, key=errors.__getitem__)
        return Exactness(float(np.median(list(errors.values()))), errors[where], where, 0)

    def predicted_error(self, plan: MatrixPlan) -> float:
        """Relative error of products, from rounding m and from the scheme's noise."""
        return sqrt(plan.in_features * (1 / 12 + self._noise**2)) / self._amplitude(plan)

    def _amplitude(self, plan: MatrixPlan) -> float:
        """||m|| of every token. Raises ValueError for a matrix that is too wide."""
        room = self._limit - plan.max_l1 / 2 - 8 * self._noise * plan.max_norm - 1
        if room <= 0:
            raise ValueError(f"{plan.in_features} inputs leave no room for results; split them")
        return room / plan.max_norm

    def encrypt(self, x: Float32Array, matrix: OwnerMatrix) -> Encrypted:
        check_input(x, matrix)
        amplitude = self._amplitude(matrix.plan)
        message = x.astype(np.float64) * matrix.in_scale
        norms = np.linalg.norm(message, axis=1)
        try:
            require_finite(np.isfinite(norms), matrix)
            # A token of zeros is encrypted like any other; its inverse 0 makes its result zero.
            scale = np.divide(amplitude, norms, out=np.zeros(len(x)), where=norms > 0)
            message *= scale[:, None]
            np.rint(message, out=message)
            check, expected = self._checks.get(matrix.name), None
            if check is not None:
                unit = np.full(len(x), self._unit(check, matrix.in_features, amplitude))
                expected = check.expect(message, unit)
            payload, key = self._seal(message)
            return Encrypted(payload, Sealed(key, norms / amplitude, expected))
        finally:
            message[...] = 0
            norms[...] = 0

    def _unit(self, check: DirectCheck, inputs: int, amplitude: float) -> float:
        """What an honest difference is at most, but for chance: noise, and sums in float64."""
        # |coefficients| are below 1, so the noise of K inputs weighs ||M|| at most, and decrypting
        # may add as much again; sums of K products err by sqrt(K)*2^-53 of ||M||*||m||.
        return max(
            _LEAST_UNIT, check.norm * (2 * self._noise + 2.0**-50 * sqrt(inputs) * amplitude)
        )

    def decrypt(
        self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        tokens, outputs = len(sealed.inverse), matrix.out_features
        answer = np.frombuffer(payload, np.uint8)
        self._sizes.require(answer.size, outputs, tokens)
        expected = sealed.expected
        if expected is None and not self._unverified:
            raise UnguardedError(matrix.name)
        with sealed.opening():  # a failed check leaves it sealed
            results = self._open(sealed.key, answer, tokens, outputs)
            try:
                if expected is not None:
                    expected.require(results, worker)
                with np.errstate(over="ignore"):  # beyond float32, as the product in clear is
                    results *= sealed.inverse[:, None]
                    results *= matrix.out_scale
                    return results.astype(np.float32)
            finally:
                # Where the answer was a lie, they tell of the key that may yet open another.
                results[...] = 0

    def discard(self, sealed: Sealed) -> None:
        sealed.wipe()
