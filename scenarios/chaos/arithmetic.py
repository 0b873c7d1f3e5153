"""The arithmetic of a chaos run: ciphers under watch, honest products, and believable lies."""

from __future__ import annotations

import hashlib
import random

import numpy as np
from numpy.typing import NDArray

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.entropy import SeededEntropy
from backends.he.interface import OwnerCipher, OwnerMatrix, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.packing import pack_answer, unpack_answer
from protocol.catalogue import Catalogue
from protocol.events import MultiplyCiphertext
from scenarios.chaos.checks import require
from scenarios.chaos.model import Subject
from scenarios.chaos.secrecy import Secrets

_MLWE_ERROR_MOST = 2e-4
"""Of a delivered value, relative to its bound by Cauchy-Schwarz. The cipher errs by a few 1e-5."""


class WatchedEntropy(SeededEntropy):
    """Seeded, and every key is shown to the checks."""

    def __init__(self, seed: int, secrets: Secrets) -> None:
        super().__init__(seed)
        self._secrets = secrets

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        key = super().fresh_key(tag)
        self._secrets.key_drawn(bytes(key))
        return key


class Arithmetic:
    """One model under one cipher, both sides of it.

    catalogue   what owner and workers agree on
    """

    def __init__(self, subject: Subject, cipher: str, seed: int, secrets: Secrets) -> None:
        self.encrypted = cipher == "mlwe"
        self._subject = subject
        self._prepared = subject.prepared(cipher)
        self._seed = seed
        self._secrets = secrets
        self.matrices: list[OwnerMatrix] = self._prepared.owner_matrices()
        self.catalogue: Catalogue = self._prepared.catalogue()
        parameters = self._prepared.parameters
        self._worker: WorkerCipher = ClearWorker() if parameters is None else MlweWorker()
        self._formats = self._prepared.manifest.formats
        self._operands = [
            self._worker.load(subject.weights[index // 2], index % 2 == 0, form)
            for index, form in enumerate(self._formats)
        ]

    def owner_cipher(self, incarnation: int) -> OwnerCipher:
        """The owner's half for one life of its process; every answer will be checked."""
        text = f"{self._seed}:{incarnation}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        entropy = WatchedEntropy(seed, self._secrets)
        parameters = self._prepared.parameters
        cipher: OwnerCipher
        if parameters is None:
            cipher = ClearOwner(entropy)
        else:
            cipher = MlweOwner(parameters, self._prepared.public_matrix(), entropy)
        for index, matrix in enumerate(self.matrices):
            cipher.guard(matrix, self._subject.weights[index // 2], forward=index % 2 == 0)
        return cipher

    def require_right(self, matrix: int, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Raise Violation unless y is x times the matrix: bit by bit in clear."""
        right = self._subject.product(matrix, x)
        if not self.encrypted:
            require(y.tobytes() == right.tobytes(), "a lane was given a wrong product")
            return
        facts = self.matrices[matrix]
        size = np.linalg.norm(x * facts.in_scale, axis=1) * facts.plan.max_norm
        error = (np.abs(y - right) / facts.out_scale).max(axis=1)
        close = bool((error <= _MLWE_ERROR_MOST * size).all())
        require(close, "a lane was given a wrong product")

    def multiply(self, work: MultiplyCiphertext) -> bytes:
        """The honest product."""
        operand = self._operands[work.matrix]
        return self._worker.multiply(work.payload, work.tokens, operand).tobytes()

    def is_wrong(self, work: MultiplyCiphertext, right: bytes, told: bytes) -> bool:
        """Whether an answer differs by more than any rounding could."""
        if self.encrypted or told == right:
            return told != right
        facts = self.catalogue.matrices[work.matrix]
        x = np.frombuffer(work.payload, np.float32).reshape(-1, facts.in_features)
        length = np.linalg.norm(x.astype(np.float64), axis=1)
        weight = self._subject.weights[work.matrix // 2].astype(np.float64)
        # Four times what float32 sums of so many products may differ by, all outputs together.
        bound = 2.0**-18 * np.sqrt(facts.in_features) * np.linalg.norm(weight) * length
        with np.errstate(invalid="ignore", over="ignore"):
            mine, other = (
                np.frombuffer(data, np.float32).reshape(len(x), -1).astype(np.float64)
                for data in (right, told)
            )
            far = np.abs(mine - other).max(axis=1)
        return not bool((far <= bound).all())

    def crafted(self, rng: random.Random, way: str, matrix: int, product: bytes) -> bytes:
        """A product with a lie of `sim.faults.CRAFTED`, little but more than a check may tolerate.

        one value      off by some multiple of what is certainly seen
        top bits       turned over, of an even number of values of one token
        constant bias  the last output of every token is off by the same
        """
        outputs = self.catalogue.matrices[matrix].out_features
        form = self._formats[matrix]
        if self.encrypted:
            tokens = len(product) // form.down_bytes(outputs)
            values = unpack_answer(np.frombuffer(product, np.uint8), tokens, outputs, form).copy()
            top, least = 1 << (form.down_bits - 1), self._seen_steps(matrix)
        else:
            values = np.frombuffer(product, "<u4").copy().reshape(-1, outputs)
            top, least = 1 << 31, 0
        token = rng.randrange(len(values))
        if way == "top bits":
            count = 2 * rng.randint(1, outputs // 2)
            values[token, rng.sample(range(outputs), count)] ^= values.dtype.type(top)
            return pack_answer(values, form).tobytes() if self.encrypted else values.tobytes()
        place, many = (slice(None), -1), 4
        if way == "one value":
            place = (slice(token, token + 1), rng.randrange(outputs))
            many = rng.randint(2, 20) * rng.choice((-1, 1))
        if self.encrypted:
            most = 1 << (form.down_bits - 2)
            step = max(-most, min(many * least, most))
            values[place] = (values[place] + step) % (1 << form.down_bits)
            return pack_answer(values, form).tobytes()
        floats = values.view(np.float32)
        floats[place] += np.float32(rng.uniform(0.01, 1.0) * np.abs(floats).max())
        return values.tobytes()

    def _seen_steps(self, matrix: int) -> int:
        """An error of one value that no check may miss, in units of an encrypted answer.

        Whatever the coefficients (at most 1, at least 1/2), the noise of a sum over all outputs
        deviates by no more than the noises of all outputs do together; an error is seen when half
        of it is over 8 deviations of tolerance and 8 of noise.
        """
        weight = self._subject.weights[matrix // 2].astype(np.float64)
        form = self._formats[matrix]
        norms = np.linalg.norm(weight, axis=1 if matrix % 2 == 0 else 0)
        step = 2.0**form.dropped_bits
        deviation = np.hypot(0.3 * form.unit * norms.sum(), 0.3 * step * len(norms))
        return int(2 * 16 * deviation / step) + 2
