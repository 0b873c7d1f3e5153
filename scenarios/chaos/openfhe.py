"""The arithmetic of a chaos run under OpenFHE: its real ciphertexts, and lies in them.

OpenFHE draws keys and noise by itself: the same seed has the same events and faults, but other
bytes, and only what this project draws, the check's rows, is watched for what is drawn twice.
"""

from __future__ import annotations

import random

import numpy as np

from backends.he.entropy import Entropy
from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.openfhe.owner import OpenFheOwner
from backends.he.openfhe.scheme import BFV_PLAIN, RING, scheme
from backends.he.openfhe.worker import OpenFheWorker
from scenarios.chaos.arithmetic import Arithmetic
from scenarios.chaos.model import Subject
from scenarios.chaos.secrecy import Secrets

_TOP = np.uint64(1 << 52)


class OpenFheArithmetic(Arithmetic):
    """As `Arithmetic`, under one of OpenFHE's schemes. Raises OpenFheError where there is none."""

    def __init__(self, subject: Subject, cipher: str, seed: int, secrets: Secrets) -> None:
        self._scheme = scheme(cipher)
        super().__init__(subject, cipher, seed, secrets)

    def _worker_half(self, cipher: str) -> WorkerCipher:
        return OpenFheWorker(cipher)

    def _owner_half(self, seed: int, entropy: Entropy) -> OwnerCipher:
        return OpenFheOwner(self._scheme.name, entropy)

    def crafted(self, rng: random.Random, way: str, matrix: int, product: bytes) -> bytes:
        """A product with a lie of `sim.faults.CRAFTED`.

        Polynomials travel as their values at the roots of unity, so a constant added to all values
        of the first one is added to every token's result.

        one value      one number of one output is another
        top bits       turned over, of an even number of values of one output
        constant bias  the last output of every token is off by the same, by little more than noise
        """
        values = np.frombuffer(product, "<u8").copy().reshape(-1, 2, RING)
        output, modulus = rng.randrange(len(values)), self._scheme.form.modulus
        if way == "constant bias":
            values[-1, 0] = (values[-1, 0] + np.uint64(self._seen(matrix))) % np.uint64(modulus)
        elif way == "top bits":
            values[output, 0, rng.sample(range(RING), 2 * rng.randint(1, 100))] ^= _TOP
        else:
            place = (output, rng.randrange(2), rng.randrange(RING))
            values[place] = (int(values[place]) + rng.randrange(1, modulus)) % modulus
        return values.tobytes()

    def _seen(self, matrix: int) -> int:
        """What no check may miss when every token's result of one output is off by it.

        A coefficient is at least 1/2; tolerated are 8 deviations of the noise of all outputs.
        """
        weight = self._subject.weights[matrix // 2].astype(np.float64)
        units = 64 * (1 + self._scheme.noise * float(np.linalg.norm(weight)))
        unit = self._scheme.form.modulus // BFV_PLAIN if self._scheme.noise == 0 else 1
        return int(units) * unit
