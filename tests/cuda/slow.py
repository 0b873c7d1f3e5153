"""The owner's randomness on a GPU, slowly: what `kernels/owner.cu` draws from a key.

With it in place of the CPU's AES streams, `ReferenceOwner` is the definition of `CudaOwner` too.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from backends.he import reference
from backends.he.entropy import SeededEntropy
from backends.he.params import RING_DEGREE
from backends.he.reference import ReferenceOwner
from tests.he.conftest import Case


def chacha20(key: bytes, counter: int, nonce: tuple[int, int, int], size: int) -> NDArray[np.uint8]:
    """`size` bytes of the RFC 8439 stream from block `counter` on."""
    start = struct.pack("<4I", counter, *nonce)
    stream = Cipher(ChaCha20(key, start), mode=None).encryptor().update(bytes(size))
    return np.frombuffer(stream, np.uint8)


def slow_ternary(key: bytes, blocks: int, rank: int) -> NDArray[np.int8]:
    """int8[blocks, rank, 256]."""
    out = np.empty((blocks, rank, RING_DEGREE), np.int8)
    for block in range(blocks):
        for k in range(rank):
            words = chacha20(key, 0, (0, block, k), 8 * RING_DEGREE).view("<u8")
            out[block, k] = [(int(word) * 3 >> 64) - 1 for word in words]
    return out


def slow_errors(key: bytes, tokens: int, inputs: int) -> NDArray[np.int64]:
    """int64[T, K]."""
    out = np.empty((tokens, inputs), np.int64)
    place = np.array([16 * (t % 16) + t // 16 for t in range(RING_DEGREE)])
    for start in range(0, tokens, RING_DEGREE):
        count = min(RING_DEGREE, tokens - start)
        for k in range(inputs):
            stream = chacha20(key, 20 * k, (1, start // RING_DEGREE, 0), 5 * RING_DEGREE)
            bits = np.unpackbits(stream).reshape(-1, 8).sum(axis=1)
            entries = bits[:1024].reshape(-1, 4).sum(axis=1) + bits[1024:]
            out[start : start + count, k] = entries[place][:count].astype(np.int64) - 20
    return out


def reference_owner(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> ReferenceOwner:
    """The slow owner that draws what CudaOwner draws under SeededEntropy(seed)."""
    rank = case.parameters.rank

    def ternary(key: bytes, count: int) -> NDArray[np.int8]:
        return slow_ternary(key, count // (rank * RING_DEGREE), rank)

    monkeypatch.setattr(reference, "Keystream", lambda key: key)
    monkeypatch.setattr(reference, "ternary", ternary)
    monkeypatch.setattr(reference, "_errors", slow_errors)
    return ReferenceOwner(case.parameters, case.public, SeededEntropy(seed), unverified=True)
