"""OpenFHE's ciphertexts as numbers, and back: what travels is coefficients and nothing else.

OpenFHE's own format has lengths, pointers and a whole crypto context in it, and its reader trusts
them: a few wrong bytes make it ask for any amount of memory. So nothing that came off a wire is
ever given to it. Each side has ciphertexts of its own written out once; of what arrives the
coefficients are taken, mod q, and put into the place of those, and only that is read.

    a ciphertext's bytes    uint64[2, 2048], little endian: both polynomials

For OpenFHE, polynomials of many ciphertexts are written and read as those of a single one. To read
takes it a millisecond whatever it is: it looks for roots of unity again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.openfhe.library import OpenFheError, openfhe

_TAG = "private-lora"
"""Of every key: OpenFHE writes it into ciphertexts, where one of its own would tell keys apart."""
_WORD = 8
_TOGETHER = 32
"""Ciphertexts that are written or read at a time."""


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
        self._nothing = context.EvalSub(made, made)
        self._padding = made.GetElements() * _TOGETHER
        self._template = _written(self._holding(self._padding))
        self._places, self.modulus = self._find(self._template)

    def _find(self, data: bytes) -> tuple[list[int], int]:
        """Where each polynomial begins: behind its length, followed by the modulus.

        Raises OpenFheError where there are not as many as were written.
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
        if len(places) != len(self._padding) or len(moduli) != 1:
            raise OpenFheError(
                f"OpenFHE {openfhe().__version__} writes ciphertexts in a way that this project "
                "does not know: install the version in constraints.txt"
            )
        return places, moduli.pop()

    def _holding(self, polynomials: list[Any]) -> Any:
        """One ciphertext of any polynomials, even or odd in number."""
        holder = self._nothing.CloneEmpty()
        holder.SetElements(polynomials)
        return holder

    def nothing(self) -> Any:
        """A ciphertext of zeros without noise, to add to."""
        return self._nothing.Clone()

    def coefficients(self, ciphertexts: Sequence[Any]) -> NDArray[np.uint64]:
        """uint64[n, 2, ring] of n ciphertexts that this context made."""
        found = np.empty((2 * len(ciphertexts), self._ring), "<u8")
        for first in range(0, len(ciphertexts), _TOGETHER):
            part = ciphertexts[first : first + _TOGETHER]
            polynomials = [each for ciphertext in part for each in ciphertext.GetElements()]
            count = len(polynomials)
            assert count == 2 * len(part)
            data = _written(self._holding(polynomials + self._padding[count:]))
            assert len(data) == len(self._template)
            for row, place in enumerate(self._places[:count], 2 * first):
                found[row] = np.frombuffer(data, "<u8", self._ring, place)
        return found.reshape(-1, 2, self._ring)

    def ciphertexts(self, coefficients: NDArray[np.uint64]) -> list[Any]:
        """n ciphertexts with uint64[n, 2, ring], each number taken mod q."""
        starts = range(0, len(coefficients), _TOGETHER)
        parts = (self._read(coefficients[first : first + _TOGETHER]) for first in starts)
        return [ciphertext for part in parts for ciphertext in part]

    def _read(self, coefficients: NDArray[np.uint64]) -> list[Any]:
        """At most _TOGETHER of them."""
        data, fhe = bytearray(self._template), openfhe()
        residues = (coefficients % np.uint64(self.modulus)).astype("<u8").reshape(-1, self._ring)
        for place, polynomial in zip(self._places, residues, strict=False):
            data[place : place + self._ring * _WORD] = polynomial.tobytes()
        read = fhe.DeserializeCiphertextString(bytes(data), fhe.BINARY).GetElements()
        # What is read brings parameters of its own, with which every sum takes five times as long.
        return [
            self._context.EvalAdd(self._nothing, self._holding(read[each : each + 2]))
            for each in range(0, len(residues), 2)
        ]
