"""The public matrix A and the hints H = Wq*A: public set-up, once per model.

A in R_q^{K x r} is expanded from a public nothing-up-my-sleeve seed, directly in the NTT domain,
tile by tile, so that A for fewer inputs is a prefix of A for more. The seed is bound to the
model digest (and, if the owner wishes, to a tag of its own), and the owner always derives A
itself: it is never taken from a worker.

Tile t is int32[rank, 256, 16]: the little-endian 32-bit words of AES-256-CTR(key=seed, counter
block starting with t), their lower 28 bits taken in that order; a word >= q (2559 of 2^28 are: one
in every fifth tile of rank 5) is replaced by the next unused word of the same stream past the tile.
Values are then centred to [-q/2, q/2].

A hint's rows are integer combinations of A's rows, and the NTT is linear, so a hint is one
exact integer product of A's NTT values and Wq, reduced mod q.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from backends import jit
from backends.he.matmul.choice import chosen_kernel
from backends.he.matmul.interface import Digits, Kernel
from backends.he.params import MODULUS_BITS, NTT_PRIME, RING_DEGREE, Parameters
from backends.he.ring import centre, tiles_of
from backends.he.vector import LANES
from backends.threads import run_split

_Q = NTT_PRIME
_SEED_TEXT = b"public matrix A of the module-LWE cipher for private fine-tuning, v2"


def public_seed(model_digest: bytes, parameters: Parameters, owner_tag: bytes = b"") -> bytes:
    """32 bytes: SHA-256 over a fixed text, the parameters, the model digest, the owner's tag.

    A shared seed lets an attacker spend once and reuse the work against every owner of the
    model; an owner who minds gives a tag of its own and prepares its own hints.
    """
    body = b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (_SEED_TEXT, parameters.digest(), model_digest, owner_tag)
    )
    return hashlib.sha256(body).digest()


class PublicMatrix:
    """A, expanded on demand from its seed and kept: 80 KiB * rank/5 per 16 rows."""

    def __init__(self, seed: bytes, rank: int) -> None:
        if len(seed) != 32:
            raise ValueError(f"the seed of A has 32 bytes, got {len(seed)}")
        self.rank = rank
        self._seed = seed
        self._growing = threading.Lock()
        self._tiles = np.empty((0, rank, RING_DEGREE, LANES), np.int32)

    def rows(self, count: int) -> NDArray[np.int32]:
        """int32[tiles, rank, 256, 16] whose first `count` rows are A's."""
        want = tiles_of(count)
        # Lanes ask at the same time: one grows A, and nobody ever gets a shorter one.
        with self._growing:
            have = len(self._tiles)
            if have < want:
                grown = np.empty((want, *self._tiles.shape[1:]), np.int32)
                grown[:have] = self._tiles
                run_split(lambda a, b: self._expand(grown, have + a, have + b), want - have)
                self._tiles = grown
            return self._tiles[:want]

    def _expand(self, out: NDArray[np.int32], first: int, last: int) -> None:
        for tile in range(first, last):
            out[tile] = expand_tile(self._seed, tile, self.rank)


def expand_tile(seed: bytes, tile: int, rank: int) -> NDArray[np.int32]:
    """Tile `tile` of A: centred int32[rank, 256, 16], as the module's docstring defines."""
    counter = tile.to_bytes(8, "big") + bytes(8)
    stream = Cipher(algorithms.AES(seed), modes.CTR(counter)).encryptor()
    size = rank * RING_DEGREE * LANES
    words = _words(stream, size)
    rejected = np.flatnonzero(words >= _Q)
    for index in rejected:
        word = _Q
        while word >= _Q:
            word = int(_words(stream, 1)[0])
        words[index] = word
    return centre(words).reshape(rank, RING_DEGREE, LANES)


def _words(stream: Any, count: int) -> NDArray[np.uint32]:
    raw = np.frombuffer(stream.update(bytes(4 * count)), "<u4")
    return raw & np.uint32((1 << MODULUS_BITS) - 1)


@jit.kernel
def _rows_inputs_innermost(tiles: Any, out: Any, first: int, last: int) -> None:
    """out int32[r*256, K] = the first K rows of A's tiles, for slots first..last."""
    for slot in range(first, last):
        for k in range(out.shape[1]):
            out[slot, k] = tiles[k // LANES, slot // 256, slot % 256, k % LANES]


@jit.kernel
def _centred_mod_q(sums: Any, out: Any, first: int, last: int) -> None:
    """sums int64[slots, n] -> out int32[tiles, slots, 16], centred mod q."""
    q = np.int64(_Q)
    for slot in range(first, last):
        for j in range(sums.shape[1]):
            v = sums[slot, j] % q
            if v > q // 2:
                v -= q
            out[j // LANES, slot, j % LANES] = np.int32(v)


class HintBuilder:
    """Builds hints against one A. Reuses the digits of A between matrices.

    kernel  what multiplies; None takes this process's
    """

    _COLUMNS = 64 * LANES  # rows of a hint computed together: their sums stay in the cache

    def __init__(self, public: PublicMatrix, kernel: Kernel | None = None) -> None:
        self._public = public
        self._kernel = kernel or chosen_kernel()
        self.rank = public.rank
        self._slots = public.rank * RING_DEGREE
        self._digits: Digits | None = None

    def build(self, weight: NDArray[np.int8], forward: bool) -> NDArray[np.int32]:
        """int32[tiles, rank, 256, 16]: the hint of int8[N, K].

        It has N rows forward, and K rows backward, where the matrix is the transpose.
        """
        outputs, inputs = weight.shape if forward else weight.shape[::-1]
        digits = self._digits_for(inputs)
        out = np.empty((tiles_of(outputs), self.rank, RING_DEGREE, LANES), np.int32)
        flat = out.reshape(len(out), self._slots, LANES)
        for start in range(0, outputs, self._COLUMNS):
            stop = min(outputs, start + self._COLUMNS)
            rows = weight[start:stop] if forward else weight[:, start:stop]
            sums = self._kernel.exact(digits, self._kernel.pack(rows, forward))
            part = flat[start // LANES : tiles_of(stop)]
            if (stop - start) % LANES:
                part[-1] = 0
            self._reduce(sums, part)
        return out

    def _reduce(self, sums: NDArray[np.int64], part: NDArray[np.int32]) -> None:
        run_split(lambda a, b: _centred_mod_q(sums, part, a, b), self._slots)

    def _digits_for(self, inputs: int) -> Digits:
        if self._digits is None or self._digits.inputs != inputs:
            values = np.empty((self._slots, inputs), np.int32)
            tiles = self._public.rows(inputs)
            run_split(lambda a, b: _rows_inputs_innermost(tiles, values, a, b), self._slots)
            self._digits = self._kernel.digits_of(values)
        return self._digits
