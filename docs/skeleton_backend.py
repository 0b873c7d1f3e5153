"""A scheme of less than a hundred lines, which passes `backends/he/conformance`. Start from it.

Textbook LWE mod 2^64: an input m of a token travels as (a, a*s + e + 2^20*m), a uniform, e small,
s the token's key. Sums of weights times these are such pairs of M*m, as long as all e together stay
below 2^19. With 32 numbers in a key it is a toy, which a laptop breaks; so is its size on the wire.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.conformance import Scheme
from backends.he.entropy import Entropy, random_bytes
from backends.he.interface import Float32Array, OwnerMatrix, Payload, WorkerCipher
from backends.he.plan import plan_matrix
from backends.he.scaled import ScaledOwner
from backends.he.wire import Format, Packing

DIMENSION, STEP_BITS = 32, 20
PACKING = Packing(
    hashlib.sha256(b"skeleton v1: LWE mod 2^64, n = 32, step 2^20").digest(),
    block_tokens=1, value_bytes=8 * (DIMENSION + 1),
)  # fmt: skip
"""Public: a digest of what both sides must agree on, how many tokens share a ciphertext, sizes."""


class SkeletonOwner(ScaledOwner):
    """The owner's half. `ScaledOwner` scales tokens, checks answers, and opens each once."""

    def __init__(self, entropy: Entropy | None = None, unverified: bool = False) -> None:
        limit = 2.0 ** (63 - STEP_BITS)
        super().__init__(limit, 0.0, PACKING, entropy, unverified)

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        """Uniform, of a keystream of its own."""
        drawn = random_bytes(self._entropy, 8 * int(np.prod(shape)))
        return drawn.view("<u8").reshape(shape)

    def _seal(self, message: NDArray[np.float64]) -> tuple[NDArray[np.uint8], Any]:
        """The request's bytes, and the key that opens its answer: each key of one token only."""
        tokens, inputs = message.shape
        key = self._random(tokens, DIMENSION)
        pairs = np.empty((tokens, inputs, DIMENSION + 1), "<u8")
        pairs[..., :-1] = self._random(tokens, inputs, DIMENSION)
        errors = self._random(tokens, inputs) % np.uint64(7) - np.uint64(3)
        message_bits = message.astype(np.int64).view(np.uint64) << np.uint64(STEP_BITS)
        pairs[..., -1] = _products(pairs, key) + errors + message_bits
        errors[...] = 0
        message_bits[...] = 0
        self.blocks += tokens
        return pairs.reshape(-1).view(np.uint8), key

    def _open(
        self, key: Any, answer: NDArray[np.uint8], tokens: int, outputs: int
    ) -> NDArray[np.float64]:
        """Centred results, of any bytes of the right number: whether they are true is checked."""
        pairs = answer.view("<u8").reshape(tokens, outputs, DIMENSION + 1)
        noisy = (pairs[..., -1] - _products(pairs, key)).view(np.int64)
        return ((noisy + (1 << (STEP_BITS - 1))) >> STEP_BITS).astype(np.float64)


def _products(pairs: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[T, n]: a*s mod 2^64 of pairs[T, n, DIMENSION + 1]."""
    return (pairs[..., :-1] * key[:, None]).sum(axis=-1, dtype=np.uint64)


class SkeletonWorker(WorkerCipher):
    """The worker's half, in a module of its own in a real scheme: it must not reach a secret."""

    packing = PACKING

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> Any:
        return (weight if forward else weight.T).astype(np.int64).view(np.uint64)

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        data = np.frombuffer(payload, np.uint8)
        PACKING.require(data.size, matrix.shape[1], tokens)
        pairs = data.view("<u8").reshape(tokens, -1, DIMENSION + 1)
        return (matrix @ pairs).reshape(-1).view(np.uint8)


def matrix_of(weight: NDArray[np.int8], forward: bool) -> OwnerMatrix:
    """The owner's view, as a preparation makes it; here every scale is 1."""
    turned = weight if forward else weight.T
    ones: list[Float32Array] = [np.ones(size, np.float32) for size in turned.shape]
    return OwnerMatrix("skeleton", ones[1], ones[0], plan_matrix(turned, ones[0]))


SCHEME = Scheme(
    "skeleton", SkeletonOwner, SkeletonWorker, matrix_of, error=1e-6, word="<u8", modulus=1 << 64,
    block=1,
)  # fmt: skip
