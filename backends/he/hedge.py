"""A tag of the message that a request encrypts, for the keys it is encrypted under.

Two requests under the same secrets and errors differ by their messages, in plain. `OsEntropy`
therefore makes keys of the message too, so that not even a generator that repeats can bring that
about. The message round(x * in_scale * factor) is a function of three things, all of them tagged:

    tag = SHA-256(T, K, NH(x), factor, in_scale)

NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, UMAC, CRYPTO 1999) hashes a row of K = 2h words of 32
bits, here the bits of float32, with a secret key (k, l) of as many words:

    NH(w) = sum over j < h of ((w_j + k_j) mod 2^32) * ((w_{j+h} + l_j) mod 2^32)   mod 2^64

Claim: two rows that differ, in whatever bit, have equal sums for at most 2^-32 of the keys. Proof:
say w_j differs (else swap the halves' parts). Fix all of the key but l_j. The sums are equal when
((w_j + k_j) - (w'_j + k_j)) * b + (terms without l_j) = 0 mod 2^64 for b = w_{j+h} + l_j (where
w_{j+h} differs as well, b and b' differ by a constant mod 2^32, and the paper's lemma covers it);
the first factor is not 0 and below 2^32 in size, so at most one b of 2^32 solves it, and b is
uniform as l_j is. An odd last word is paired with a word of zeros. Two independent keys: 2^-64.

Requests that could collide are pairs: the same count in two lives of one snapshot. A million of
them share a key with probability 2^-44. The sums never leave this process, and enter keys through
HMAC, so nobody can look for collisions.

Measured for float32[256, 2048] on two AVX2 cores beside an encryption of 3 ms: NH 0.09 ms, SHA-256
of sums and scales 0.01 ms; over all of x, GMAC would take 0.36 ms, Poly1305 0.37, SHA-256 1.5,
BLAKE2b 3.9. The integrity check's sums cost nothing, but do not see a change that the matrix maps
to zero.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy, random_bytes
from backends.threads import run_split

_KEYS = 2
_WORDS_EACH = 1 << 20
"""Words of 32 bits worth a thread: waking one takes as long as hashing half as many."""


@jit.kernel
def _hash_rows(words: Any, key: Any, sums: Any, first: int, last: int) -> None:
    """sums uint64[T, 2] = NH of rows first..last of uint32[T, K] under both keys."""
    half = words.shape[1] // 2
    odd = words.shape[1] % 2
    k, l = key[0, 0, :half], key[0, 1, :half]  # noqa: E741
    m, n = key[1, 0, :half], key[1, 1, :half]
    for t in range(first, last):
        left, right = words[t, :half], words[t, half : 2 * half]
        a = b = np.uint64(0)
        for j in range(half):
            u, v = left[j], right[j]
            a += np.uint64(np.uint32(u + k[j])) * np.uint64(np.uint32(v + l[j]))
            b += np.uint64(np.uint32(u + m[j])) * np.uint64(np.uint32(v + n[j]))
        if odd:
            u = words[t, 2 * half]
            a += np.uint64(np.uint32(u + key[0, 0, half])) * np.uint64(key[0, 1, half])
            b += np.uint64(np.uint32(u + key[1, 0, half])) * np.uint64(key[1, 1, half])
        sums[t, 0], sums[t, 1] = a, b


class MessageHash:
    """Tags messages under keys of its own. Simulated entropy takes no tags, and gets none."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._keys: dict[int, NDArray[np.uint32]] = {}
        self._lock = threading.Lock()

    def tag(
        self, x: NDArray[np.float32], factor: NDArray[np.float64], in_scale: NDArray[np.float32]
    ) -> bytes:
        """32 bytes for the message of float32[T, K], factor[T], in_scale[K]; none if simulated."""
        if self._entropy.simulated:
            return b""
        sums = np.empty((len(x), _KEYS), np.uint64)
        words, key = x.view(np.uint32), self._key(x.shape[1])
        grain = max(1, _WORDS_EACH // x.shape[1])
        run_split(lambda a, b: _hash_rows(words, key, sums, a, b), len(x), grain)
        found = hashlib.sha256(np.array(x.shape, np.int64).tobytes())
        for part in (sums, factor, in_scale):
            found.update(np.ascontiguousarray(part).data)
        sums[...] = 0
        return found.digest()

    def _key(self, inputs: int) -> NDArray[np.uint32]:
        """uint32[2, 2, ceil(K/2)], drawn when a message of this width is first seen."""
        with self._lock:
            if inputs not in self._keys:
                half = (inputs + 1) // 2
                drawn = random_bytes(self._entropy, 4 * _KEYS * 2 * half).view("<u4")
                self._keys[inputs] = drawn.reshape(_KEYS, 2, half)
            return self._keys[inputs]
