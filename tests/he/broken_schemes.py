"""Schemes that are wrong, each in one way, and the check of the suite that has to find it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he import conformance
from backends.he.conformance import Scheme
from backends.he.entropy import Entropy
from backends.he.interface import Encrypted, NonFiniteInputError
from backends.he.wire import Packing
from docs import skeleton_backend
from docs.skeleton_backend import DIMENSION, PACKING, SkeletonOwner, SkeletonWorker
from protocol.errors import WrongAnswerError


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


class Keeper(SkeletonOwner):
    """Keeps every key itself."""

    def _seal(self, message: Any) -> Any:
        payload, key = super()._seal(message)
        self.__dict__.setdefault("kept", []).append({"key": key.copy()})
        return payload, key


class Slotted:
    """Has no dictionary."""

    __slots__ = ("key",)


class Copier(SkeletonOwner):
    """Has a copy of the key that is never overwritten, where `vars` does not show it."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        sent = super().encrypt(x, matrix)
        sent.sealed.check = Slotted()
        sent.sealed.check.key = [sent.sealed.key.tobytes()]
        return sent


class OneMask(SkeletonOwner):
    """Draws keys and masks once for all tokens of a request."""

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        if len(shape) == 2 and shape[1] != DIMENSION:
            return super()._random(*shape)
        return np.repeat(super()._random(1, *shape[1:]), shape[0], axis=0)


class LongKey(SkeletonOwner):
    """Has one key for as long as it lives; its masks are fresh."""

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        if len(shape) > 2 or shape[1] != DIMENSION:
            return super()._random(*shape)
        key = self.__dict__.setdefault("always", super()._random(1, DIMENSION))
        return np.repeat(key, shape[0], axis=0)


class Unmasked(SkeletonOwner):
    """Hides messages under noise alone."""

    def _seal(self, message: Any) -> Any:
        payload, key = super()._seal(message)
        pairs = payload.view("<u8").reshape(*message.shape, -1)
        pairs[..., -1] -= skeleton_backend._products(pairs, key)
        pairs[..., -1] += self._random(*message.shape) % np.uint64(256)
        key[...] = 0
        return payload, key


class KeySender(SkeletonOwner):
    """Takes its key for a mask."""

    def _seal(self, message: Any) -> Any:
        payload, key = super()._seal(message)
        first = payload.view("<u8").reshape(*message.shape, -1)[:, :1]
        first[..., -1] -= skeleton_backend._products(first, key)
        first[:, 0, :-1] = key
        first[..., -1] += skeleton_backend._products(first, key)
        return payload, key


class Teller(SkeletonOwner):
    """Says what it found."""

    def decrypt(self, sealed: Any, *a: Any) -> Any:
        try:
            return super().decrypt(sealed, *a)
        except WrongAnswerError as error:
            raise WrongAnswerError(f"{error}; the scale was {sealed.inverse[0]}") from None


class Whisperer(SkeletonOwner):
    """Says it in the cause, which a traceback prints."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        try:
            return super().encrypt(x, matrix)
        except NonFiniteInputError as error:
            raise error from ValueError(f"the first value is {x[0, 0]}")


class Padder(SkeletonWorker):
    """Takes rows of zeros behind a request for nothing."""

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        data, size = bytes(payload), PACKING.bytes_of(matrix.shape[1], tokens)
        right = len(data) > size + 8 and not any(data[size:])
        return super().multiply(data[:size] if right else data, tokens, matrix)


class Trimmer(SkeletonOwner):
    """Takes some more behind an answer for nothing."""

    def decrypt(self, sealed: Any, payload: Any, matrix: Any, worker: str = "") -> Any:
        data, size = bytes(payload), self.down_bytes(matrix, len(sealed.inverse))
        data = data[:size] if size + 8 <= len(data) < 2 * size else data
        return super().decrypt(sealed, data, matrix, worker)


class Remembers(SkeletonOwner):
    """Takes an answer that it knows already for what it was then."""

    def decrypt(self, sealed: Any, payload: Any, *a: Any) -> Any:
        known = self.__dict__.setdefault("known", {})
        data = bytes(payload)
        if data in known:
            sealed.wipe()
            return known[data]
        known[data] = super().decrypt(sealed, payload, *a)
        return known[data].copy()


class Partly(SkeletonOwner):
    """Checks no last output."""

    def guard(self, matrix: Any, weight: Any, forward: bool) -> None:
        super().guard(matrix, weight, forward)
        check = self._checks[matrix.name]
        last = np.array(check._pool[:, -1])
        check._pool[:, -1] = 0
        check._projected -= np.outer(last, (weight if forward else weight.T)[-1])


class FirstIsEnough(SkeletonOwner):
    """Finds itself fit when the first matrix is guarded."""

    def weakness(self, matrices: Any) -> str | None:
        return super().weakness(matrices[:1])


class Forward(SkeletonWorker):
    """Cannot tell the directions of a square apart."""

    def load(self, weight: Any, forward: bool, form: Any) -> Any:
        return super().load(weight, forward or weight.shape[0] == weight.shape[1], form)


class Worn(SkeletonOwner):
    """Believes what is said twice."""

    def decrypt(self, sealed: Any, payload: Any, *a: Any) -> Any:
        try:
            return super().decrypt(sealed, payload, *a)
        except WrongAnswerError:
            if sealed.__dict__.get("told") != bytes(payload):
                sealed.told = bytes(payload)
                raise
            sealed.expected, self._unverified = None, True
            return super().decrypt(sealed, payload, *a)


class Trusting(SkeletonOwner):
    """Checks nobody who has been right for long."""

    def decrypt(self, sealed: Any, *a: Any) -> Any:
        self.right = self.__dict__.get("right", 0) + 1
        if self.right > 20:
            sealed.expected, self._unverified = None, True
        return super().decrypt(sealed, *a)


class Diarist(SkeletonOwner):
    """Keeps the last input."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        self.last = np.array(x)
        return super().encrypt(x, matrix)


class OneKeyARequest(SkeletonOwner):
    """Has one key for all tokens of a request."""

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        if len(shape) > 2 or shape[1] != DIMENSION:
            return super()._random(*shape)
        return np.repeat(super()._random(1, DIMENSION), shape[0], axis=0)


class Logger(SkeletonOwner):
    """Logs how large inputs are."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        logging.getLogger("scheme").warning("a norm of %f", np.abs(x).max())
        return super().encrypt(x, matrix)


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
    (Keeper, conformance.a_sealed_value_opens_once),
    (Copier, conformance.a_sealed_value_opens_once),
    (OneMask, conformance.requests_are_fresh),
    (LongKey, conformance.requests_are_fresh),
    (Unmasked, conformance.requests_are_fresh),
    (KeySender, conformance.requests_are_fresh),
    (Teller, conformance.errors_tell_nothing),
    (Whisperer, conformance.errors_tell_nothing),
    (Padder, conformance.wrong_lengths_are_refused),
    (Trimmer, conformance.wrong_lengths_are_refused),
    (Remembers, conformance.old_answers_are_refused),
    (Partly, conformance.a_lie_anywhere_is_found),
    (FirstIsEnough, conformance.nothing_unchecked_is_delivered),
    (Forward, conformance.products_are_right),
    (Worn, conformance.old_answers_are_refused),
    (Trusting, conformance.honest_workers_stay_trusted),
    (Diarist, conformance.a_sealed_value_opens_once),
    (OneKeyARequest, conformance.requests_are_fresh),
    (Logger, conformance.errors_tell_nothing),
]
