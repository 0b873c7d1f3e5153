"""OpenFHE's ciphertexts as numbers, and back: what travels is coefficients and nothing else.

OpenFHE's own format has lengths, pointers and a whole crypto context in it, and its reader trusts
them: a few wrong bytes make it ask for any amount of memory. So nothing that came off a wire is
ever given to it. Each side has one ciphertext of its own written out once; of what arrives the
coefficients are taken, mod q, and put into the place of those, and only that is read.

    a ciphertext's bytes    uint64[2, 2048], little endian: both polynomials
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.openfhe.library import OpenFheError, openfhe

_TAG = "private-lora"
"""Of every key: OpenFHE writes it into ciphertexts, where one of its own would tell keys apart."""
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
        self._context, self._ring = context, ring
        self.nbytes = 2 * ring * _WORD
        made = context.Encrypt(fresh_key(context), zero)
        self._template = _written(made)
        self._places, self.modulus = self._find(self._template)
        self._nothing = context.EvalSub(made, made)

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
        """uint64[2, ring] of a ciphertext that this context made."""
        data = _written(ciphertext)
        assert len(data) == len(self._template)
        return np.stack([np.frombuffer(data, "<u8", self._ring, place) for place in self._places])

    def ciphertext(self, coefficients: NDArray[np.uint64]) -> Any:
        """A ciphertext with uint64[2, ring], each taken mod q."""
        data, fhe = bytearray(self._template), openfhe()
        residues = (coefficients % np.uint64(self.modulus)).astype("<u8")
        for place, polynomial in zip(self._places, residues, strict=True):
            data[place : place + self._ring * _WORD] = polynomial.tobytes()
        read = fhe.DeserializeCiphertextString(bytes(data), fhe.BINARY)
        # What is read brings parameters of its own, with which every sum takes five times as long.
        return self._context.EvalAdd(self._nothing, read)
