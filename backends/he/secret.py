"""One secret, one block, one message: a secret that cannot be used twice.

Only the owner's ciphers may import this module; a test walks the imports.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Keystream
from backends.he.ring import secret_to_ntt


class SecretReuseError(RuntimeError):
    """A block secret was asked for a second message. This is a bug in the caller."""


class _Use(Enum):
    FRESH = "fresh"
    SEALED = "sealed"
    OPENING = "being opened"
    SPENT = "spent"


def ternary(stream: Keystream, count: int) -> NDArray[np.int8]:
    """`count` exactly uniform values of {-1, 0, 1}: bytes below 255 modulo 3, others rejected."""
    out = np.empty(count, np.int8)
    drawn = kept = np.empty(0, np.uint8)
    done = 0
    try:
        while done < count:
            drawn = stream.take(count + 64)
            kept = drawn[drawn < 255]
            used = kept[: count - done]
            used %= 3
            out[done : done + len(used)] = used
            done += len(used)
            # What a secret was made from is as good as the secret.
            drawn[...] = 0
            kept[...] = 0
        out -= 1
    except BaseException:
        for private in (out, drawn, kept):
            private[...] = 0
        raise
    return out


class UseOnce(ABC):
    """The life of a secret: fresh, then sealed one message, then opened one answer and wiped."""

    def __init__(self) -> None:
        self._use = _Use.FRESH
        self._changing = threading.Lock()

    @abstractmethod
    def _erase(self) -> None:
        """Overwrite the secret."""

    def begin_sealing(self) -> None:
        """Raises SecretReuseError the second time."""
        with self._changing:
            if self._use is not _Use.FRESH:
                raise SecretReuseError("this block secret has already sealed a message")
            self._use = _Use.SEALED

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Inside, the secret may open an answer; then it is wiped. An error leaves it sealed.

        Raises SecretReuseError unless the secret has sealed a message and opened none.
        """
        with self._changing:
            if self._use is not _Use.SEALED:
                raise SecretReuseError(f"this block secret is {self._use.value}, not sealed")
            self._use = _Use.OPENING
        try:
            yield
        except BaseException:
            with self._changing:
                if self._use is _Use.OPENING:  # not wiped meanwhile
                    self._use = _Use.SEALED
            raise
        self.wipe()

    def wipe(self) -> None:
        """Forget the secret; it can neither seal nor open afterwards."""
        with self._changing:
            self._use = _Use.SPENT
        self._erase()


class BlockSecret(UseOnce):
    """A ternary secret s of R^rank for one block: seals one message, opens one answer."""

    def __init__(self, secret: NDArray[np.int8]) -> None:
        super().__init__()
        self._ntt = secret_to_ntt(secret)

    @classmethod
    def draw(cls, stream: Keystream, count: int, rank: int, degree: int) -> list[BlockSecret]:
        """`count` independent secrets from one fresh keystream."""
        secrets: list[BlockSecret] = []
        drawn = ternary(stream, count * rank * degree)
        try:
            for secret in drawn.reshape(count, rank, degree):
                secrets.append(cls(secret))
        except BaseException:
            for made in secrets:
                made.wipe()
            raise
        finally:
            drawn[...] = 0
        return secrets

    def seal(self) -> NDArray[np.int32]:
        """The NTT-domain secret, to encrypt the block's only message.

        Raises SecretReuseError the second time.
        """
        self.begin_sealing()
        return self._ntt

    @contextmanager
    def opened(self) -> Iterator[NDArray[np.int32]]:
        """The secret, to decrypt the answer; wiped at the end, still sealed after an error.

        Raises SecretReuseError unless the secret has sealed a message and opened none.
        """
        with self.opening():
            yield self._ntt

    def _erase(self) -> None:
        self._ntt[...] = 0
