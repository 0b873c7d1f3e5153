"""The slow, readable module-LWE scheme: the definition the fast backends are held to.

Written with whole-polynomial numpy and no shortcut: the inverse NTT is a matrix of powers of
psi, reductions are `%`, digits are divided out. A test compares ciphertexts, worker answers
and decrypted values with the fast backend bit for bit, from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy, Keystream, OsEntropy, RequestKeys
from backends.he.epilogue import FOLD, FOLD_SHIFT
from backends.he.interface import (
    Encrypted,
    Float32Array,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    UnguardedError,
    WorkerCipher,
    check_input,
    unchecked,
)
from backends.he.mlwe_owner import (
    ERROR_BYTES,
    WIDE,
    token_scales,
)
from backends.he.params import ERROR_BOUND, MODULUS_BITS, NTT_PRIME, RING_DEGREE, Parameters
from backends.he.public import PublicMatrix
from backends.he.ring import EVALUATION_EXPONENTS, PSI
from backends.he.secret import UseOnce, ternary
from backends.he.wire import Format
from protocol.errors import WrongAnswerError

_D, _Q = RING_DEGREE, NTT_PRIME


def evaluation_matrix() -> NDArray[np.int64]:
    """int64[256, 256]: slot i of the NTT of a is sum_j a_j * psi^(e_i * j) mod q."""
    powers = [pow(PSI, n, _Q) for n in range(2 * _D)]
    return np.array([[powers[e * j % (2 * _D)] for j in range(_D)] for e in EVALUATION_EXPONENTS])


def inverse_evaluation_matrix() -> NDArray[np.int64]:
    """int64[256, 256], the inverse of `evaluation_matrix` mod q."""
    powers = [pow(PSI, -n, _Q) for n in range(2 * _D)]
    d_inverse = pow(_D, -1, _Q)
    return np.array(
        [
            [powers[e * j % (2 * _D)] * d_inverse % _Q for e in EVALUATION_EXPONENTS]
            for j in range(_D)
        ]
    )


def matmul_mod(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """a @ b mod q for residues below 2^28, reduced after every product."""
    out = np.zeros((a.shape[0], b.shape[1]), np.int64)
    for k in range(a.shape[1]):
        out = (out + a[:, k : k + 1] * b[k : k + 1, :] % _Q) % _Q
    return out


def negacyclic_product(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """a*b in Z_q[X]/(X^256 + 1), schoolbook."""
    out = [0] * _D
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            sign = 1 if i + j < _D else -1
            out[(i + j) % _D] = (out[(i + j) % _D] + sign * x * y) % _Q
    return np.array(out, np.int64)


def rows_of_tiles(tiles: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """int64[count, rank, 256] in [0, q): a tiled public matrix, row by row."""
    rows = tiles.transpose(0, 3, 1, 2).reshape(-1, tiles.shape[1], _D)
    return rows[:count].astype(np.int64) % _Q


class _Sealed(UseOnce):
    """Secrets, one a block, int64[rank, 256] in the NTT domain; 1/alpha; and what was sent."""

    def __init__(
        self, secrets: list[NDArray[np.int64]], inverse_alpha: NDArray[np.float64],
        sent: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        super().__init__()
        self.secrets, self.inverse_alpha, self.sent = secrets, inverse_alpha, sent
        self.begin_sealing()

    def _erase(self) -> None:
        for secret in self.secrets:
            secret[...] = 0
        self.inverse_alpha[...] = 0


class ReferenceOwner(OwnerCipher):
    """Owner half, slow and readable. Its keys take no tag of the message: for tests only."""

    def __init__(
        self, parameters: Parameters, public: PublicMatrix, entropy: Entropy | None = None,
        unverified: bool = False,
    ) -> None:  # fmt: skip
        self._parameters = parameters
        self._unverified = unverified
        self._public = public
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._evaluate = evaluation_matrix()
        self._interpolate = inverse_evaluation_matrix()
        self._guarded: dict[str, ReferenceMatrix] = {}

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        return unchecked(self._unverified, self._guarded, matrices)

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._guarded[matrix.name] = ReferenceWorker().load(weight, forward, matrix.plan.format)

    def _verify(self, sealed: _Sealed, payload: Payload, matrix: OwnerMatrix) -> None:
        """The plainest check there is: multiply again, and compare every bit."""
        operand = self._guarded.get(matrix.name)
        if operand is None:
            if self._unverified:
                return
            raise UnguardedError(matrix.name)
        tokens = len(sealed.inverse_alpha)
        right = ReferenceWorker().multiply(sealed.sent, tokens, operand)
        if right.tobytes() != np.frombuffer(payload, np.uint8).tobytes():
            raise WrongAnswerError(f"{matrix.name}: the answer is not the product")

    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return tokens * matrix.plan.format.up_bytes(matrix.in_features)

    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return tokens * matrix.plan.format.down_bytes(matrix.out_features)

    def _mask(
        self, tiles: NDArray[np.int32], rows: int, secret: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Coefficients of row . s for each row: int64[256, rows] in [0, q)."""
        slots = np.zeros((rows, _D), np.int64)
        for k in range(self._parameters.rank):
            slots = (slots + rows_of_tiles(tiles, rows)[:, k] * secret[k] % _Q) % _Q
        return matmul_mod(self._interpolate, slots.T)

    def _rounded(self, u: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
        """round(u * 2^bits / q)."""
        drop = MODULUS_BITS - bits
        return (u + (u * FOLD >> FOLD_SHIFT) + (1 << (drop - 1))) >> drop

    def encrypt(self, x: Float32Array, matrix: OwnerMatrix) -> Encrypted:
        check_input(x, matrix)
        rank = self._parameters.rank
        tokens, inputs = x.shape
        wide = x.astype(np.float64) * matrix.in_scale.astype(np.float64)
        norms = np.sqrt(np.sum(wide**2, axis=1))
        factors, inverse = np.empty(tokens), np.empty(tokens)
        token_scales(norms, matrix, self._parameters, 1.0, factors, inverse)
        keys = RequestKeys(self._entropy)
        stream = Keystream(keys.secrets)
        blocks = -(-tokens // _D)
        drawn = ternary(stream, blocks * rank * _D).reshape(blocks, rank, _D).astype(np.int64)
        secrets = [matmul_mod(s % _Q, self._evaluate.T.copy()) for s in drawn]
        error = _errors(Keystream(keys.errors), tokens, inputs)
        form = matrix.plan.format
        values = np.empty((tokens, inputs), np.int64)
        for block, secret in enumerate(secrets):
            part = slice(block * _D, min(tokens, (block + 1) * _D))
            mask = self._mask(self._public.rows(inputs), inputs, secret)[: part.stop - part.start]
            message = np.rint(wide[part] * factors[part, None]).astype(np.int64)
            u = (mask + error[part] + message) % _Q
            values[part] = self._rounded(u, form.up_bits) % 2**form.up_bits
        payload = request_bytes(values, form)
        return Encrypted(payload, _Sealed(secrets, inverse, payload))

    def decrypt(
        self, sealed: Any, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        form = matrix.plan.format
        tokens, outputs = len(sealed.inverse_alpha), matrix.out_features
        if matrix.hint is None:
            raise ValueError(f"{matrix.name}: no hint; run the preparation first")
        answer = answer_values(payload, tokens, outputs, form)
        with sealed.opening():
            self._verify(sealed, payload, matrix)
            return self._opened(sealed, answer, matrix)

    def _opened(
        self, sealed: _Sealed, answer: NDArray[np.int64], matrix: OwnerMatrix
    ) -> Float32Array:
        """float32[T, N] of an answer's values int64[T, N]."""
        form = matrix.plan.format
        p, (tokens, outputs) = form.modulus, answer.shape
        assert matrix.hint is not None
        out = np.empty((tokens, outputs), np.float32)
        for block, secret in enumerate(sealed.secrets):
            part = slice(block * _D, min(tokens, (block + 1) * _D))
            mask = self._mask(matrix.hint, outputs, secret)[: part.stop - part.start]
            opened = answer[part] * 2**form.dropped_bits - self._rounded(mask, 8 * form.limbs)
            y = (opened - form.unit // 2) % p
            y = np.where(y >= p // 2, y - p, y)
            scaled = y.astype(np.float64) * sealed.inverse_alpha[part, None]
            out[part] = (scaled * matrix.out_scale.astype(np.float64)).astype(np.float32)
        return out

    def discard(self, sealed: Any) -> None:
        sealed.wipe()


@dataclass(frozen=True)
class ReferenceMatrix:
    """int64[K, N], and how its requests and answers travel."""

    operand: NDArray[np.int64]
    form: Format


class ReferenceWorker(WorkerCipher):
    """Worker half, exact 64-bit integers."""

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> ReferenceMatrix:
        return ReferenceMatrix((weight.T if forward else weight).astype(np.int64), format)

    def multiply(self, payload: Payload, tokens: int, matrix: ReferenceMatrix) -> NDArray[np.uint8]:
        form = matrix.form
        values = request_values(payload, tokens, len(matrix.operand), form)
        y = values * form.unit @ matrix.operand
        delta = form.dropped_bits
        rounded = ((y + 2**delta // 2) >> delta) % 2**form.down_bits
        return answer_bytes(rounded, form)


def _spelled(rows: Iterable[Iterable[int]], bits: int) -> bytes:
    """Numbers of 2, 4 or 8 bits, each row from the lowest bits of its first byte on."""
    out = b""
    for row in rows:
        joined = sum(int(number) << (bits * i) for i, number in enumerate(row))
        out += joined.to_bytes(-(-len(list(row)) * bits // 8), "little")
    return out


def _read(data: bytes, rows: int, columns: int, bits: int) -> NDArray[np.int64]:
    """int64[rows, columns] of what `_spelled` wrote."""
    size = -(-columns * bits // 8)
    found = np.zeros((rows, columns), np.int64)
    for i in range(rows):
        joined = int.from_bytes(data[i * size : (i + 1) * size], "little")
        found[i] = [joined >> (bits * k) & ((1 << bits) - 1) for k in range(columns)]
    return found


def request_bytes(values: NDArray[np.int64], form: Format) -> NDArray[np.uint8]:
    """uint8 payload of values int64[T, K], each below 2^up_bits, as `wire.py` lays them out."""
    rest, digits = values * form.unit, []
    for _ in range(form.limbs):
        digits.append((rest + 128) % 256 - 128)
        rest = (rest - digits[-1]) // 256
    whole = digits if form.unit == 1 else digits[1:]
    out = b"".join(digit.astype(np.int8).tobytes() for digit in whole)
    if form.unit > 1:
        out += _spelled((digits[0] % 256 // form.unit).tolist(), 8 - form.unused_bits)
    return np.frombuffer(out, np.uint8)


def request_values(payload: Payload, tokens: int, inputs: int, form: Format) -> NDArray[np.int64]:
    """int64[T, K] of a request: congruent mod 2^up_bits to what was encrypted."""
    data = np.frombuffer(payload, np.uint8).tobytes()
    size, total = tokens * inputs, np.zeros((tokens, inputs), np.int64)
    if len(data) != tokens * form.up_bytes(inputs):
        raise ValueError("a request of another size")
    first = 1 if form.unit > 1 else 0
    for place in range(first, form.limbs):
        part = data[(place - first) * size : (place - first + 1) * size]
        digit = np.frombuffer(part, np.int8).astype(np.int64).reshape(tokens, inputs)
        total += 256**place * digit
    if form.unit > 1:
        rest = data[(form.limbs - 1) * size :]
        bits = 8 - form.unused_bits
        low = _read(rest, tokens, inputs, bits)
        total += form.unit * np.where(low >= 2 ** (bits - 1), low - 2**bits, low)
    return total // form.unit


def answer_bytes(values: NDArray[np.int64], form: Format) -> NDArray[np.uint8]:
    """uint8 payload of results int64[T, N], each below 2^down_bits."""
    if form.down_bits == 16:
        return values.astype("<u2").reshape(-1).view(np.uint8)
    extra = form.down_bits - 8
    out = (values >> extra).astype(np.uint8).tobytes()
    out += _spelled((values % 2**extra).tolist(), extra)
    return np.frombuffer(out, np.uint8)


def answer_values(payload: Payload, tokens: int, outputs: int, form: Format) -> NDArray[np.int64]:
    """int64[T, N] of an answer."""
    data = np.frombuffer(payload, np.uint8).tobytes()
    if len(data) != tokens * form.down_bytes(outputs):
        raise ValueError("an answer of another size")
    if form.down_bits == 16:
        return np.frombuffer(data, "<u2").astype(np.int64).reshape(tokens, outputs)
    extra, size = form.down_bits - 8, tokens * outputs
    upper = np.frombuffer(data[:size], np.uint8).astype(np.int64).reshape(tokens, outputs)
    return upper << extra | _read(data[size:], tokens, outputs, extra)


def _errors(stream: Keystream, tokens: int, inputs: int) -> NDArray[np.int64]:
    """int64[T, K] of popcount(40 bits) - 20.

    Drawn in column groups of WIDE: four bytes for every value of the group, then one for each.
    """
    out = np.empty((tokens, inputs), np.int64)
    for k0 in range(0, inputs, WIDE):
        width = min(inputs, k0 + WIDE) - k0
        raw = stream.take(ERROR_BYTES * tokens * width)
        four, one = raw[: 4 * tokens * width].reshape(-1, 4), raw[4 * tokens * width :, None]
        bits = np.unpackbits(np.concatenate([four, one], axis=1), axis=1).sum(axis=1)
        out[:, k0 : k0 + width] = bits.reshape(tokens, width)
    return out - ERROR_BOUND
