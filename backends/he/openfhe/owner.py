"""The owner's half over OpenFHE: a key for every block, one ciphertext for every input.

Encryption is with the secret key, which is never used again: its noise is smaller, and the public
key that comes with it is thrown away. Keys and noise are of OpenFHE's own generator, which seeds
itself from the operating system and takes no seed: ciphertexts cannot be reproduced, not even in a
simulation. `simulated_randomness` speaks of what this project draws, the rows of the check. A key's
memory is freed when its request has ended; that OpenFHE overwrites it, nobody promises.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy
from backends.he.integrity import Float64Array
from backends.he.openfhe.coefficients import fresh_key
from backends.he.openfhe.library import one_thread
from backends.he.openfhe.scheme import OpenFheScheme, scheme
from backends.he.scaled import ScaledOwner


class OpenFheOwner(ScaledOwner):
    """Owner half of "openfhe-bfv" or "openfhe-ckks". Raises OpenFheError where there is none."""

    def __init__(self, name: str, entropy: Entropy | None = None, unverified: bool = False) -> None:
        self._scheme: OpenFheScheme = scheme(name)
        super().__init__(
            self._scheme.limit, self._scheme.noise, self._scheme.packing, entropy, unverified
        )
        self._exact = self._scheme.noise == 0
        self._count_lock = threading.Lock()

    @one_thread()
    def _seal(self, message: Float64Array) -> tuple[NDArray[np.uint8], Any]:
        context, form = self._scheme.context, self._scheme.form
        tokens, inputs = message.shape
        size = self._scheme.packing.block_tokens
        keys = [fresh_key(context) for _ in range(0, tokens, size)]
        sealed = np.empty((len(keys), inputs, form.nbytes // 8), "<u8")
        for block, key in enumerate(keys):
            part = message[block * size : (block + 1) * size]
            made = [context.Encrypt(key, self._encode(part[:, k])) for k in range(inputs)]
            sealed[block] = form.coefficients(made).reshape(inputs, -1)
        with self._count_lock:
            self.blocks += len(keys)
        return sealed.reshape(-1).view(np.uint8), keys

    def _encode(self, values: Float64Array) -> Any:
        context = self._scheme.context
        if self._exact:
            return context.MakePackedPlaintext(values.astype(np.int64))
        return context.MakeCKKSPackedPlaintext(values / self._scheme.scale)

    @one_thread()
    def _open(self, key: Any, answer: NDArray[np.uint8], tokens: int, outputs: int) -> Float64Array:
        form, size = self._scheme.form, self._scheme.packing.block_tokens
        words = answer.view("<u8").reshape(len(key), outputs, 2, -1)
        out = np.empty((tokens, outputs))
        for block, secret in enumerate(key):
            first, last = block * size, min(tokens, (block + 1) * size)
            for j, found in enumerate(form.ciphertexts(words[block])):
                out[first:last, j] = self._values(secret, found, last - first)
        return out

    def _values(self, secret: Any, ciphertext: Any, count: int) -> Float64Array:
        """float64[count]; not a number where OpenFHE finds no message in it."""
        try:
            plain = self._scheme.context.Decrypt(secret, ciphertext)
        except RuntimeError:  # of a lie: its noise is beyond what CKKS decodes
            return np.full(count, np.nan)
        plain.SetLength(count)
        if self._exact:
            return plain.GetPackedValueArray().astype(np.float64)
        return plain.GetCKKSPackedValueArray().real * self._scheme.scale
