"""OpenFHE's ciphertexts as numbers, and back: what travels is coefficients and nothing else.

OpenFHE's own format has lengths, pointers and a whole crypto context in it, and its reader trusts
them: a few wrong bytes make it ask for any amount of memory. So nothing that came off a wire is ever
given to it. Each side has one ciphertext of its own written out once; of what arrives the
coefficients are taken, mod q, and put into the place of those, and only that is read.

    a ciphertext's bytes    uint64[2, 2048], little endian: both polynomials
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.openfhe.library import OpenFheError, openfhe

_TAG = "private-lora"
"""Of every key: OpenFHE writes it into ciphertexts, where a tag of its own would tell keys apart."""
_WORD = 8


def fresh_key(context: Any) -> Any:
    """A secret key, of OpenFHE's own generator."""
    key = context.KeyGen().secretKey
    key.SetKeyTag(_TAG)
    return key


def _written(ciphertext: Any) -> bytes:
    fhe = openfhe()
    data: bytes = fhe.Serialize(ciphertext, fhe.BINARY)
    return data


class CiphertextForm:
    """Where the coefficients lie in what this OpenFHE writes for one context.

    modulus  q
    nbytes   of a ciphertext as it travels
    """

    def __init__(self, context: Any, zero: Any, ring: int) -> None:
        self._ring = ring
        self.nbytes = 2 * ring * _WORD
        self._template = _written(context.Encrypt(fresh_key(context), zero))
        places, self.modulus = self._find(self._template)
        self._layouts = {len(self._template): places}
        # One that was read has a context with more in it than one that was made.
        again = _written(self.ciphertext(np.zeros((2, ring), np.uint64)))
        self._layouts[len(again)], _ = self._find(again)

    def _find(self, data: bytes) -> tuple[list[int], int]:
        """Where each polynomial begins: behind its length, followed by the modulus.

        Raises OpenFheError where there are not two.
        """
        length = self._ring * _WORD
        head = self._ring.to_bytes(_WORD, "little")
        places, moduli, start = [], set(), 0
        while (start := data.find(head, start)) >= 0:
            begin, end = start + _WORD, start + _WORD + length
            modulus = int.from_bytes(data[end : end + _WORD], "little")
            values = np.frombuffer(data[begin:end], np.uint8)
            if 50 < modulus.bit_length() <= 54 and values.view("<u8").max() < modulus:
                places.append(begin)
                moduli.add(modulus)
                start = end
            else:
                start += 1
        if len(places) != 2 or len(moduli) != 1:
            raise OpenFheError(
                f"OpenFHE {openfhe().__version__} writes ciphertexts in a way that this project "
                "does not know: install the version in constraints.txt"
            )
        return places, moduli.pop()

    def coefficients(self, ciphertext: Any) -> NDArray[np.uint64]:
        """uint64[2, ring] of a ciphertext of this context."""
        data = _written(ciphertext)
        places = self._layouts[len(data)]
        return np.stack([np.frombuffer(data, "<u8", self._ring, place) for place in places])

    def ciphertext(self, coefficients: NDArray[np.uint64]) -> Any:
        """A ciphertext with uint64[2, ring], each taken mod q."""
        data, fhe = bytearray(self._template), openfhe()
        residues = (coefficients % np.uint64(self.modulus)).astype("<u8")
        for place, polynomial in zip(self._layouts[len(data)], residues, strict=True):
            data[place : place + self._ring * _WORD] = polynomial.tobytes()
        return fhe.DeserializeCiphertextString(bytes(data), fhe.BINARY)
