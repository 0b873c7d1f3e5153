"""Schemes that are wrong, each in one way, and the check of the suite that has to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he import conformance
from backends.he.conformance import Scheme
from backends.he.entropy import Entropy
from backends.he.interface import Encrypted
from backends.he.wire import Packing
from docs import skeleton_backend
from docs.skeleton_backend import DIMENSION, SkeletonOwner, SkeletonWorker
from tests.he import broken_secrecy


class OffByALittle(SkeletonOwner):
    """Spoils what it delivers."""

    def decrypt(self, *a: Any) -> Any:
        return super().decrypt(*a) * np.float32(1.001)


class TakesNothingForSomething(SkeletonOwner):
    """Delivers noise for a token of zeros."""

    def decrypt(self, *a: Any) -> Any:
        found = super().decrypt(*a)
        found[~found.any(axis=1)] = 1
        return found


class Talkative(SkeletonOwner):
    """Its requests' length tells what is in them."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        sent = super().encrypt(x, matrix)
        more = np.zeros(0 if x.any() else 8, np.uint8)
        return Encrypted(np.concatenate([sent.payload, more]), sent.sealed)


class Indulgent(SkeletonOwner):
    """Makes numbers of what is none."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(np.nan_to_num(x), matrix)


class Hoarder(SkeletonOwner):
    """Keeps what it should overwrite."""

    def discard(self, sealed: Any) -> None:
        pass


class Reopener(SkeletonOwner):
    """Opens one request twice."""

    def decrypt(self, sealed: Any, *a: Any) -> Any:
        key = sealed.key.copy()
        found = super().decrypt(sealed, *a)
        sealed.__init__(key, sealed.inverse, sealed.expected)
        return found


class OneKey(SkeletonOwner):
    """Draws the same numbers for every request."""

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        return np.random.default_rng(1).integers(0, 1 << 63, shape, np.uint64)


class Uncounted(SkeletonOwner):
    """Counts a request for one block."""

    def _seal(self, message: Any) -> Any:
        sealed = super()._seal(message)
        self.blocks += 1 - len(message)
        return sealed


class Believer(SkeletonOwner):
    """Checks nothing, and does not say so."""

    def __init__(self, entropy: Entropy | None = None, unverified: bool = False) -> None:
        super().__init__(entropy, True)

    def guard(self, *a: Any) -> None:
        pass

    def weakness(self, matrices: Any) -> str | None:
        return None


class Accuser(SkeletonOwner):
    """Takes what it has spoilt itself for a lie."""

    def _open(self, *a: Any) -> Any:
        return super()._open(*a) + 100


class Careless(SkeletonWorker):
    """Takes as many bytes as it needs."""

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        size = skeleton_backend.PACKING.bytes_of(matrix.shape[1], tokens)
        return super().multiply((bytes(payload) + bytes(size))[:size], tokens, matrix)


class Restless(SkeletonWorker):
    """Answers the same request in two ways."""

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        told = super().multiply(payload, tokens, matrix)
        told[0] ^= np.random.default_rng().integers(0, 256)
        return told


class Optimist(SkeletonOwner):
    """Rounds far more than it says."""

    def __init__(self, *a: Any) -> None:
        super().__init__(*a)
        self._limit = 2.0**28

    def predicted_error(self, plan: Any) -> float:
        return super().predicted_error(plan) / 1000


class Flusher(SkeletonOwner):
    """Takes what is tiny for nothing."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(np.where(np.abs(x) < 1e-35, np.float32(0), x), matrix)


class Unscaled(SkeletonOwner):
    """Forgets the scales of inputs."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(x, replace(matrix, in_scale=np.ones_like(matrix.in_scale)))


class Unscaling(SkeletonOwner):
    """Forgets the scales of results."""

    def decrypt(self, sealed: Any, payload: Any, matrix: Any, worker: str = "") -> Any:
        return super().decrypt(sealed, payload, matrix, worker) / matrix.out_scale


class Odd(SkeletonOwner):
    """Declares a byte too much for an odd number of results."""

    def down_bytes(self, matrix: Any, tokens: int) -> int:
        return super().down_bytes(matrix, tokens) + matrix.out_features % 2


class OtherSizes(SkeletonWorker):
    """Does not agree on the packing."""

    packing = Packing(bytes(32), 1, 8 * (DIMENSION + 1) + 1)


class AnyType(SkeletonOwner):
    """Takes float16, whole numbers and columns first."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(np.ascontiguousarray(x, np.float32), matrix)


class SwappedBytes(SkeletonOwner):
    """Takes numbers of the other byte order for its own."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(x.view(np.float32) if x.dtype == ">f4" else x, matrix)


class InputWiper(SkeletonOwner):
    """Overwrites the caller's input in the end."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        sent = super().encrypt(x, matrix)
        sent.sealed.x = x
        return sent

    def discard(self, sealed: Any) -> None:
        sealed.x[...] = 0
        super().discard(sealed)


class AnswerSpoiler(SkeletonOwner):
    """Computes in the answer's memory."""

    def decrypt(self, sealed: Any, payload: Any, *a: Any) -> Any:
        found = super().decrypt(sealed, payload, *a)
        if isinstance(payload, np.ndarray):
            payload[:8] ^= 1
        return found


class RequestSpoiler(SkeletonWorker):
    """Computes in the request's memory."""

    def multiply(self, payload: Any, *a: Any) -> Any:
        told = super().multiply(payload, *a)
        if isinstance(payload, np.ndarray):
            payload[0] ^= 1
        return told


class Writer(SkeletonOwner):
    """Takes no answer that is read-only."""

    def decrypt(self, sealed: Any, payload: Any, *a: Any) -> Any:
        memoryview(payload).cast("B")[:0] = b""
        return super().decrypt(sealed, payload, *a)


class OneResult(SkeletonOwner):
    """Gives all results of one shape in the same memory."""

    def decrypt(self, *a: Any) -> Any:
        found = super().decrypt(*a)
        memory = self.__dict__.setdefault(f"memory {found.shape}", np.empty_like(found))
        memory[...] = found
        return memory


class OneAnswer(SkeletonWorker):
    """Gives all answers of one size in the same memory."""

    def multiply(self, *a: Any) -> Any:
        told = super().multiply(*a)
        memory = self.__dict__.setdefault(f"memory {told.size}", np.empty_like(told))
        memory[...] = told
        return memory


class OneUnderWay(SkeletonOwner):
    """Opens answers with the key of the last request."""

    def _seal(self, message: Any) -> Any:
        payload, self.last = super()._seal(message)
        return payload, self.last

    def _open(self, key: Any, *a: Any) -> Any:
        return super()._open(self.last if self.last.shape == key.shape else key, *a)


class OneCheck(SkeletonOwner):
    """Holds answers against the matrix that was guarded last, where the shapes fit."""

    def guard(self, matrix: Any, *a: Any) -> None:
        super().guard(matrix, *a)
        mine = self._checks[matrix.name]
        for name, check in self._checks.items():
            if check._projected.shape == mine._projected.shape:
                self._checks[name] = mine


class OneMatrix(SkeletonWorker):
    """Multiplies by the matrix that was loaded last, where the shapes fit."""

    def load(self, *a: Any) -> Any:
        self.last = super().load(*a)
        return self.last

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        used = self.last if self.last.shape == matrix.shape else matrix
        return super().multiply(payload, tokens, used)


class Shuffler(SkeletonWorker):
    """Gives several answers in another order."""

    def multiply_many(self, requests: Any, matrix: Any) -> Any:
        return super().multiply_many(requests, matrix)[::-1]


BROKEN: list[tuple[type, Callable[[Scheme], None]]] = [
    (OffByALittle, conformance.products_are_right),
    (TakesNothingForSomething, conformance.products_are_right_at_any_scale),
    (Talkative, conformance.sizes_are_as_declared),
    (Indulgent, conformance.bad_input_is_refused),
    (Hoarder, conformance.a_sealed_value_opens_once),
    (Reopener, conformance.a_sealed_value_opens_once),
    (OneKey, conformance.requests_are_fresh),
    (Uncounted, conformance.requests_are_fresh),
    (Restless, conformance.workers_are_exact),
    (Careless, conformance.wrong_lengths_are_refused),
    (Believer, conformance.garbage_is_refused),
    (Believer, conformance.lies_are_found),
    (Believer, conformance.nothing_unchecked_is_delivered),
    (Accuser, conformance.honest_workers_stay_trusted),
    (Optimist, conformance.errors_are_predicted),
    (Flusher, conformance.products_are_right_at_any_scale),
    (Unscaled, conformance.products_are_right),
    (Unscaling, conformance.products_are_right),
    (Odd, conformance.sizes_are_as_declared),
    (OtherSizes, conformance.sizes_are_as_declared),
    (AnyType, conformance.bad_input_is_refused),
    (SwappedBytes, conformance.bad_input_is_refused),
    (InputWiper, conformance.memory_is_its_owners),
    (AnswerSpoiler, conformance.memory_is_its_owners),
    (RequestSpoiler, conformance.memory_is_its_owners),
    (Writer, conformance.memory_is_its_owners),
    (OneResult, conformance.memory_is_its_owners),
    (OneAnswer, conformance.memory_is_its_owners),
    (OneUnderWay, conformance.nothing_gets_mixed_up),
    (OneCheck, conformance.nothing_gets_mixed_up),
    (OneMatrix, conformance.nothing_gets_mixed_up),
    (Shuffler, conformance.workers_are_exact),
    *broken_secrecy.BROKEN,
]
