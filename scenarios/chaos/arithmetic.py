"""The arithmetic of a chaos run: ciphers under watch, honest products, and believable lies."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.entropy import Entropy, SeededEntropy
from backends.he.interface import OwnerCipher, OwnerMatrix, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.packing import pack_answer, unpack_answer
from backends.he.repair import Gains
from backends.he.wire import Format
from protocol.catalogue import Catalogue
from protocol.events import MultiplyCiphertext
from scenarios.chaos.checks import require
from scenarios.chaos.model import Subject
from scenarios.chaos.options import stream
from scenarios.chaos.secrecy import Secrets

_MLWE_ERROR_MOST = 2e-4
"""Of a delivered value, relative to its bound by Cauchy-Schwarz. The cipher errs by a few 1e-5."""
_FORMATS = (Format(16, 8), Format(18, 10), Format(20, 12), Format(24, 16))
_PLANTED_SHARE = 0.3
_PLANTED_GAIN = 3.0, 40.0


class WatchedEntropy(SeededEntropy):
    """Seeded, and every key is shown to the checks."""

    def __init__(self, seed: int, secrets: Secrets) -> None:
        super().__init__(seed)
        self._secrets = secrets

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        key = super().fresh_key(tag)
        self._secrets.key_drawn(bytes(key))
        return key


class PlantedGains(Gains):
    """For a share of the requests, a gain that is far too large: results wrap."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def of(self, matrix: str) -> float:
        if self._rng.random() < _PLANTED_SHARE:
            return self._rng.uniform(*_PLANTED_GAIN)
        return super().of(matrix)


@dataclass(frozen=True)
class Wraps:
    """How many results of a request must wrap, and how many more may, as noise has it."""

    certain: int
    possible: int


class Arithmetic:
    """One model under one cipher, both sides of it.

    catalogue   what owner and workers agree on
    """

    def __init__(self, subject: Subject, cipher: str, seed: int, secrets: Secrets) -> None:
        self.encrypted = cipher != "clear"
        self.thin = cipher == "thin"
        self._subject = subject
        self._prepared = subject.prepared(cipher)
        self._seed = seed
        self._secrets = secrets
        self.matrices: list[OwnerMatrix] = self._prepared.owner_matrices()
        self._worker = self._worker_half(cipher)
        self.catalogue: Catalogue = self._prepared.catalogue(self._worker.packing)
        self._formats = self._prepared.manifest.formats
        if self.thin:
            rng = stream(seed, "formats")
            self._change_formats([rng.choice(_FORMATS) for _ in self.matrices])
        self._operands = [
            self._worker.load(subject.weights[index // 2], index % 2 == 0, form)
            for index, form in enumerate(self._formats)
        ]

    def _worker_half(self, cipher: str) -> WorkerCipher:
        return MlweWorker() if self.encrypted else ClearWorker()

    def _change_formats(self, formats: list[Format]) -> None:
        """Let values travel otherwise than planned: so small a model has but one format."""
        self._formats = formats
        self.matrices = [
            replace(
                matrix,
                plan=replace(matrix.plan, up_bits=form.up_bits, down_bits=form.down_bits),
            )
            for matrix, form in zip(self.matrices, formats, strict=True)
        ]
        shapes = tuple(
            replace(
                shape, up_bytes_per_block=form.up_bytes(shape.in_features),
                down_bytes_per_block=form.down_bytes(shape.out_features),
            )
            for shape, form in zip(self.catalogue.matrices, formats, strict=True)
        )  # fmt: skip
        self.catalogue = replace(self.catalogue, matrices=shapes)

    def owner_cipher(self, incarnation: int) -> OwnerCipher:
        """The owner's half for one life of its process; every answer will be checked."""
        text = f"{self._seed}:{incarnation}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        cipher = self._owner_half(seed, WatchedEntropy(seed, self._secrets))
        for index, matrix in enumerate(self.matrices):
            cipher.guard(matrix, self._subject.weights[index // 2], forward=index % 2 == 0)
        return cipher

    def _owner_half(self, seed: int, entropy: Entropy) -> OwnerCipher:
        parameters = self._prepared.parameters
        if parameters is None:
            return ClearOwner(entropy)
        cipher = MlweOwner(parameters, self._prepared.public_matrix(), entropy)
        if self.thin:
            cipher._gains = PlantedGains(stream(seed, "gains"))
        return cipher

    def require_right(
        self, matrix: int, x: NDArray[np.float32], y: NDArray[np.float32], gain: float
    ) -> None:
        """Raise Violation unless y is x times the matrix: bit by bit in clear.

        gain  of the scale that the request was made at
        """
        right = self._subject.product(matrix, x)
        if not self.encrypted:
            require(y.tobytes() == right.tobytes(), "a lane was given a wrong product")
            return
        facts = self.matrices[matrix]
        size = np.linalg.norm(x * facts.in_scale, axis=1) * facts.plan.max_norm
        error = (np.abs(y - right) / facts.out_scale).max(axis=1)
        most = self._error_most(matrix, gain) if self.thin else _MLWE_ERROR_MOST
        close = bool((error <= most * size).all())
        require(close, "a lane was given a wrong product")

    def _noise_most(self, matrix: int) -> float:
        """Of one result under `thin`, in units of the worker modulus: 9 deviations, as planned.

        The weights are what they are, not what the plan says of them.
        """
        form = self._formats[matrix]
        weight = self._subject.weights[matrix // 2].astype(np.float64)
        longest = float(np.linalg.norm(weight, axis=1 if matrix % 2 == 0 else 0).max())
        step, unit = 2.0**form.dropped_bits, float(form.unit)
        return 9 * float(np.hypot(0.3 * unit * longest, 0.3 * step)) + step

    def _error_most(self, matrix: int, gain: float) -> float:
        """The same relative to a result's bound by Cauchy-Schwarz."""
        room = self._formats[matrix].modulus / 2 - self._noise_most(matrix)
        return self._noise_most(matrix) / (gain * room) + 1e-6

    def wraps(self, matrix: int, x: NDArray[np.float32], inverse: NDArray[np.float64]) -> Wraps:
        """Of the products of float32[T, K], at scales float64[T] (0: a token of zeros)."""
        facts = self.matrices[matrix]
        used = inverse > 0
        product = self._subject.product(matrix, x[used]) / facts.out_scale
        size = np.abs(product / inverse[used, None])
        edge, noise = self._formats[matrix].modulus / 2, self._noise_most(matrix)
        certain = int(np.count_nonzero(size > edge + noise))
        return Wraps(certain, int(np.count_nonzero(size > edge - noise)) - certain)

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
            values[place] = (values[place].astype(np.int64) + step) % (1 << form.down_bits)
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
        if self.thin:  # of a sum over outputs whose noises are independent
            deviation = np.hypot(
                0.3 * form.unit * np.linalg.norm(norms), 0.3 * step * np.sqrt(len(norms))
            )
        return int(2 * 16 * deviation / step) + 2
