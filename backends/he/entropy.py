"""Randomness for secrets and errors: OS entropy, expanded with AES-256-CTR.

Real runs take `OsEntropy`. `SeededEntropy` exists for the simulator and tests and says so in
its type; every real driver refuses a cipher that was built on it.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK_BYTES = 16


class Keystream:
    """AES-256-CTR keystream under a key that is used for this one stream.

    Bytes can be had from any place, so that threads may fill disjoint parts of one buffer.
    """

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)
        self._place = 0

    def fill(self, out: NDArray[np.uint8], place: int) -> None:
        """Overwrite contiguous uint8[n] with bytes place .. place+n of the stream."""
        counter, skip = divmod(place, _BLOCK_BYTES)
        encryptor = Cipher(self._algorithm, modes.CTR(counter.to_bytes(16, "big"))).encryptor()
        if skip:
            encryptor.update(bytes(skip))
        # Encrypting in place spares a second buffer; the buffer must be zero first.
        out[...] = 0
        view = out.data.cast("B")
        encryptor.update_into(view, view)

    def take(self, size: int) -> NDArray[np.uint8]:
        """The next `size` bytes not yet taken, uint8[size]."""
        out = np.empty(size, np.uint8)
        self.fill(out, self._place)
        self._place += size
        return out


class Entropy(ABC):
    """A source of fresh 32-byte keys, each handed out once."""

    simulated: bool

    @abstractmethod
    def fresh_key(self) -> bytes:
        """32 bytes never handed out before."""


class OsEntropy(Entropy):
    """Keys from the operating system's CSPRNG. Nothing of it can be saved or resumed."""

    simulated = False

    def fresh_key(self) -> bytes:
        return os.urandom(32)


class SeededEntropy(Entropy):
    """Reproducible keys, for the simulator and for tests ONLY: whoever knows the seed reads all."""

    simulated = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def fresh_key(self) -> bytes:
        self._count += 1
        return hashlib.sha256(f"simulated:{self._seed}:{self._count}".encode()).digest()
