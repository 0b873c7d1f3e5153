"""Schemes that do not keep secrets, or believe what they should not; see `broken_schemes.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he import conformance
from backends.he.conformance import Scheme
from backends.he.interface import Encrypted, NonFiniteInputError
from docs import skeleton_backend
from docs.skeleton_backend import DIMENSION, PACKING, SkeletonOwner, SkeletonWorker
from protocol.errors import WrongAnswerError


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
