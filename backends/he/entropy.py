"""Randomness for secrets and errors: OS entropy, hedged, expanded with AES-256-CTR.

Real runs take `OsEntropy`. `SeededEntropy` exists for the simulator and tests and says so in
its type; every real driver refuses a cipher that was built on it.

What is wiped. A key is a bytearray that whoever drew it overwrites after use; a `Keystream` keeps
no other copy. What cannot be overwritten from Python is short-lived and small: the immutable bytes
that `os.urandom` and `hmac.digest` return (32 each, freed at once, one of each a request), and
OpenSSL's expanded key, which OpenSSL itself cleanses at the end of each `Keystream.add`.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK_BYTES = 16
KEY_BYTES = 32
_MOMENT = struct.Struct("<QQ")  # a count, a clock's reading


class Keystream:
    """AES-256-CTR keystream under a key that is used for this one stream.

    Bytes can be had from any place, so that threads may fill disjoint parts of one buffer.

    key  bytearray[32], the stream's from now on: `wipe` overwrites it
    """

    def __init__(self, key: bytearray) -> None:
        self._key = key
        self._algorithm: algorithms.AES | None = algorithms.AES(key)
        self._place = 0

    def add(self, out: NDArray[np.uint8], place: int) -> None:
        """XOR bytes place .. place+n of the stream onto contiguous uint8[n].

        Raises ValueError after `wipe`.
        """
        self.add_several([(out, place)])

    def add_several(self, parts: Iterable[tuple[NDArray[np.uint8], int]]) -> None:
        """`add` to each of these (out, place), with OpenSSL's key expanded once."""
        if self._algorithm is None:
            raise ValueError("this keystream was wiped")
        encryptor = Cipher(self._algorithm, modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
        for out, place in parts:
            _add(encryptor, out, place)

    def fill(self, out: NDArray[np.uint8], place: int) -> None:
        """Overwrite contiguous uint8[n] with bytes place .. place+n of the stream."""
        out[...] = 0
        self.add(out, place)

    def take(self, size: int) -> NDArray[np.uint8]:
        """The next `size` bytes not yet taken, uint8[size]."""
        out = np.empty(size, np.uint8)
        self.fill(out, self._place)
        self._place += size
        return out

    def wipe(self) -> None:
        """Overwrite the key; nothing more can be had of the stream."""
        self._algorithm = None
        self._key[:] = bytes(len(self._key))


def _add(encryptor: Any, out: NDArray[np.uint8], place: int) -> None:
    counter, skip = divmod(place, _BLOCK_BYTES)
    encryptor.reset_nonce(counter.to_bytes(_BLOCK_BYTES, "big"))
    if skip:
        unused = bytearray(skip + _BLOCK_BYTES)  # a block more than is written, as it demands
        encryptor.update_into(bytes(skip), unused)
        unused[:] = bytes(len(unused))
    view = out.data.cast("B")
    encryptor.update_into(view, view)


class Entropy(ABC):
    """A source of fresh 32-byte keys, each handed out once."""

    simulated: bool

    @abstractmethod
    def fresh_key(self, tag: bytes = b"") -> bytearray:
        """32 bytes never handed out before, the caller's to overwrite.

        tag  of the message that is to be encrypted under it, where there is one (`hedge.py`)
        """


def random_bytes(entropy: Entropy, size: int) -> NDArray[np.uint8]:
    """uint8[size] of a stream of their own."""
    stream = Keystream(entropy.fresh_key())
    try:
        return stream.take(size)
    finally:
        stream.wipe()


class RequestKeys:
    """All keys of one request, made of one that is drawn for it; overwritten when `with` ends.

    They are the first 96 bytes of AES-256-CTR under the drawn key. Drawn one by one, they could
    repeat one by one: had a generator repeated itself, and the clock ticked or another thread drawn
    in between, the same secrets would meet other errors, and errors that change average out.

    tag      see `Entropy.fresh_key`
    secrets  bytearray[32], of the stream of the blocks' secrets
    errors   bytearray[32], of the stream of errors
    rows     bytearray[32], of the rows its answer is checked with
    """

    def __init__(self, entropy: Entropy, tag: bytes = b"") -> None:
        self.secrets, self.errors, self.rows = (bytearray(KEY_BYTES) for _ in range(3))
        drawn = bytearray()
        try:
            drawn = entropy.fresh_key(tag)
            keys = (self.secrets, self.errors, self.rows)  # all zero so far
            Keystream(drawn).add_several(
                (np.frombuffer(key, np.uint8), n * KEY_BYTES) for n, key in enumerate(keys)
            )
        except BaseException:
            self.wipe()
            raise
        finally:
            drawn[:] = bytes(len(drawn))

    def wipe(self) -> None:
        """Overwrite all of them."""
        for key in (self.secrets, self.errors, self.rows):
            key[:] = bytes(KEY_BYTES)

    def __enter__(self) -> RequestKeys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.wipe()


class OsEntropy(Entropy):
    """Keys from the operating system's CSPRNG, hedged. Nothing of it can be saved or resumed.

    key = HMAC-SHA256(32 bytes of os.urandom, session || count || clock || tag)

    As long as the generator is good, HMAC is a pseudo-random function under a key nobody knows and
    nothing else matters. But a virtual machine restored twice from one snapshot may get the same
    bytes twice (Ristenpart and Yilek 2010; Everspaugh et al. 2014); then keys still differ, and
    are as good as independent, when any of the rest does:

      session  of this object: more random bytes, the process's number, the clock at its making
      count    of the keys drawn from this object
      clock    nanoseconds; likely to differ, which is no proof
      tag      a hash of the message and of what it is encrypted with: two different messages, or
               public matrices, or parameters, have different ones (`hedge.py`)

    The same message encrypted twice under the same everything gives the same ciphertext, which
    tells that it is the same and nothing more.
    """

    simulated = False

    def __init__(self) -> None:
        made = _MOMENT.pack(os.getpid(), time.time_ns())
        self._session = hashlib.sha256(os.urandom(32) + made).digest()
        self._count = itertools.count()

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        moment = _MOMENT.pack(next(self._count), time.time_ns())
        return bytearray(hmac.digest(os.urandom(32), self._session + moment + tag, "sha256"))


class SeededEntropy(Entropy):
    """Reproducible keys, for the simulator and for tests ONLY: whoever knows the seed reads all.

    They do not depend on tags.
    """

    simulated = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        self._count += 1
        text = f"simulated:{self._seed}:{self._count}"
        return bytearray(hashlib.sha256(text.encode()).digest())
