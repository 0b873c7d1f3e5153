"""A tag of the message that a request encrypts, for the keys it is encrypted under.

Two requests under the same secrets and errors differ by their messages, in plain. `OsEntropy`
therefore makes keys of the message too, so that not even a generator that repeats can bring that
about. The message round(x * in_scale * factor) is a function of three things, all of them tagged:

    tag = SHA-256(T, K, NH(x), factor, in_scale)

NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, UMAC, CRYPTO 1999) hashes a row of K = 2h words of 32
bits, here the bits of float32, with a secret key (k, l) of as many words:

    NH(w) = sum over j < h of ((w_j + k_j) mod 2^32) * ((w_{j+h} + l_j) mod 2^32)   mod 2^64

Claim: two rows that differ, in whatever bit, have equal sums for at most 2^-32 of the keys. Proof:
say w_j differs (a difference in w_{j+h} goes the same way). Fix all of the key but l_j. Let c and
c' be the two w_j + k_j, which differ, and z and (z + d) mod 2^32 the two w_{j+h} + l_j. Equal sums
are c*z - c'*(z + d mod 2^32) = constant mod 2^64. Where the bracket does not wrap, two solutions z
would give (c - c')*(difference) = 0 mod 2^64, with both factors below 2^32 in size: impossible;
nor are there two where it wraps. One of each, D apart, would give c*D + c'*(2^32 - D) = 0 mod
2^64, which is above 0 and below 2^64. So one l_j of 2^32 fits at most. An odd last word is paired
with a zero. Two independent keys: 2^-64.

Requests that could collide are pairs: the same count in two lives of one snapshot. A million of
them share a key with probability 2^-44. The sums never leave this process, and enter keys through
HMAC, so nobody can look for collisions.

Measured for float32[256, 2048] on two AVX2 cores, where an encryption takes 2 to 3 ms: NH 0.09 ms
of one core, SHA-256 of sums and scales 0.01 ms, together 3 to 4 % of an encryption's processor
time. Over all of x, GMAC would take 0.36 ms, Poly1305 0.37, SHA-256 1.5, BLAKE2b 3.9. The integrity
check's sums cost nothing, but do not see a change that the matrix maps to zero.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.entropy import Entropy, random_bytes

_KEYS = 2


@jit.kernel
def hash_rows(words: Any, key: Any, sums: Any, first: int, last: int) -> None:
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
        self, sums: NDArray[np.uint64], factor: NDArray[np.float64], in_scale: NDArray[np.float32]
    ) -> bytes:
        """32 bytes for a message of `hash_rows` sums [T, 2], factor[T] and in_scale[K].

        The sums are overwritten. No bytes where entropy is simulated.
        """
        if self._entropy.simulated:
            return b""
        found = hashlib.sha256(np.array([len(factor), len(in_scale)]).tobytes())
        for part in (sums, factor, in_scale):
            found.update(np.ascontiguousarray(part).data)
        sums[...] = 0
        return found.digest()

    def key(self, inputs: int) -> NDArray[np.uint32] | None:
        """uint32[2, 2, ceil(K/2)], drawn when a message of this width is first seen.

        None where entropy is simulated.
        """
        if self._entropy.simulated:
            return None
        with self._lock:
            if inputs not in self._keys:
                half = (inputs + 1) // 2
                drawn = random_bytes(self._entropy, 4 * _KEYS * 2 * half).view("<u4")
                self._keys[inputs] = drawn.reshape(_KEYS, 2, half)
            return self._keys[inputs]
