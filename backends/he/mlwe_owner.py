"""The owner's half of the module-LWE cipher on CPU: encrypt to digit planes, decrypt results.

For one block of T <= 256 tokens, with a fresh ternary secret s and error e:

    u = A*s + e + round(alpha_t * x * q/p)  mod q      coefficient t of row k carries token t
    B = round(u * p/q)  mod p                          public rounding
    planes = signed base-256 digits of B               int8[limbs, T, K]: the GEMM operand

What travels are the bits of B that are in use (`wire.py`). From the worker's answer
Y' = round(Y / 2^delta), for output row j:

    y = Y'_j * 2^delta - round((p/q) * (H_j*s mod q))  mod p, centred
    result = y / alpha_t * out_scale_j

The meaning is defined by `reference.py`; a test holds the two bit for bit. How the two roundings
by p/q are computed is said in `epilogue.py`; `docs/cipher.md` has the whole scheme, with proofs.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from backends import jit
from backends.he.check import Expected, IntegrityCheck
from backends.he.entropy import Entropy, Keystream, OsEntropy, RequestKeys
from backends.he.epilogue import open_row, seal_row
from backends.he.hedge import MessageHash, hash_rows, scheme_tag
from backends.he.interface import (
    Encrypted,
    Exactness,
    Float32Array,
    OwnerCipher,
    OwnerMatrix,
    Payload,
    UnguardedError,
    Values,
    check_input,
    require_finite,
    unchecked,
)
from backends.he.packing import pack_request, unpack_answer
from backends.he.params import RING_DEGREE, Parameters
from backends.he.public import PublicMatrix
from backends.he.repair import (
    ENOUGH,
    FEW,
    Gains,
    Repairs,
    astray,
    edge,
    held,
    in_parts,
    tolerance,
    unwrap,
    wipe,
)
from backends.he.ring import first_coefficient_kernel, inverse_tables, mask_tile_kernel
from backends.he.secret import BlockSecret
from backends.he.vector import LANES
from backends.threads import run_split

_D = RING_DEGREE
WIDE = 128
"""Rows whose masks are computed before their epilogue: whole cache lines of every operand."""
_TILES_WORTH = 4
"""Wide tiles of one block that are worth a thread."""
_VALUES_AT_ONCE = 1 << 16
"""Inputs that are summed up and then hashed while they are still in a core's cache."""
ERROR_BYTES = 5
"""Random bytes of one error, 40 fair bits."""


# Reassociation lets LLVM sum in vectors; `_scale_tokens` makes the order of the sum immaterial, but
# for norms within rounding of a 20-bit number.
@jit.reassociating
def _token_norms(x: Any, in_scale: Any, norms: Any, first: int, last: int) -> None:
    """norms[t] = ||x_t * in_scale||_2 in float64; not finite exactly when an input is not."""
    for t in range(first, last):
        total = 0.0
        row = x[t]
        for k in range(len(row)):
            v = np.float64(row[k]) * np.float64(in_scale[k])
            total += v * v
        norms[t] = np.sqrt(total)


# A kernel, because every step of it by numpy would leave an array of scales behind.
@jit.kernel
def _scale_tokens(norms: Any, amplitude: float, ratio: float, factor: Any, inverse: Any) -> None:
    for t in range(len(norms)):
        # Float32 inputs are zero or above 1e-45; the bound only keeps the division finite.
        if norms[t] < 1e-200:
            factor[t], inverse[t] = ratio, 0.0
        else:
            # Up to 20 significant bits. A norm's last bits depend on the order of summation; these
            # do not, and rounding up keeps the promise that nothing wraps.
            mantissa, exponent = math.frexp(norms[t])
            up = math.ldexp(np.ceil(mantissa * 2.0**20) / 2.0**20, exponent)
            factor[t], inverse[t] = amplitude / up * ratio, up / amplitude


@njit(nogil=True, inline="always")
def _spread(buffer: Any, wide: Any, column: int, tokens: int) -> None:
    """Lay a tile's first `tokens` coefficients, [256][16], at a column of [256][WIDE]."""
    for t in range(tokens):
        for lane in range(LANES):
            wide[t * WIDE + column + lane] = buffer[t * LANES + lane]


# What `specialised` puts into the loops below, for one module rank.
_mask: Any = None
_first: Any = None
_wide_mask: Any = None


def _lay_masks(
    matrix: Any, tile: int, tiles: int, secret: Any, tokens: int, buffer: Any, wide: Any,
    z: Any, zs: Any,
) -> None:  # fmt: skip
    for part in range(tiles):
        if tokens == 1:
            _first(matrix, tile + part, secret, buffer)
        else:
            _mask(matrix, tile + part, secret, buffer, z, zs)
        _spread(buffer, wide, part * LANES, tokens)


def _encrypt_groups(
    public: Any, secrets: Any, x: Any, in_scale: Any, factor: Any, noise: Any,
    planes: Any, unused: int, z: Any, zs: Any, first: int, last: int,
) -> None:  # fmt: skip
    limbs, tokens, inputs = planes.shape
    values, flat = x.reshape(-1), planes.reshape(-1)
    buffer = np.empty(_D * LANES, np.uint32)
    wide = np.empty(_D * WIDE, np.uint32)
    for group in range(first, last):
        k0 = group * WIDE
        k1 = min(inputs, k0 + WIDE)
        for block in range(len(secrets)):
            t0 = block * _D
            t1 = min(tokens, t0 + _D)
            _wide_mask(
                public, k0 // LANES, (k1 - k0 + LANES - 1) // LANES, secrets[block], t1 - t0,
                buffer, wide, z, zs,
            )  # fmt: skip
            before = ERROR_BYTES * tokens * (k0 - first * WIDE)
            for t in range(t0, t1):
                seal_row(
                    wide, (t - t0) * WIDE, values, t * inputs + k0, in_scale, k0, k1 - k0,
                    factor[t], noise, before + 4 * t * (k1 - k0),
                    before + (4 * tokens + t) * (k1 - k0), flat, tokens * inputs, limbs, unused,
                )  # fmt: skip
    # A mask gives its secret away to whoever can solve linear equations.
    buffer[:] = 0
    wide[:] = 0


def _decrypt_groups(
    hint: Any, secrets: Any, answer: Any, inverse: Any, out_scale: Any, out: Any,
    dropped_bits: int, limbs: int, unused: int, z: Any, zs: Any, first: int, last: int,
) -> None:  # fmt: skip
    tokens, outputs = out.shape
    values, results = answer.reshape(-1), out.reshape(-1)
    buffer = np.empty(_D * LANES, np.uint32)
    wide = np.empty(_D * WIDE, np.uint32)
    for group in range(first, last):
        j0 = group * WIDE
        j1 = min(outputs, j0 + WIDE)
        for block in range(len(secrets)):
            t0 = block * _D
            t1 = min(tokens, t0 + _D)
            _wide_mask(
                hint, j0 // LANES, (j1 - j0 + LANES - 1) // LANES, secrets[block], t1 - t0,
                buffer, wide, z, zs,
            )  # fmt: skip
            for t in range(t0, t1):
                open_row(
                    wide, (t - t0) * WIDE, values, t * outputs + j0, inverse[t], out_scale, j0,
                    j1 - j0, dropped_bits, limbs, unused, results,
                )  # fmt: skip
    buffer[:] = 0
    wide[:] = 0


@cache
def _kernels(rank: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(encrypt, decrypt) over a range of wide tiles, compiled for one module rank."""
    case = f"rank{rank}"
    masks = jit.specialised(
        _lay_masks, case, _mask=mask_tile_kernel(rank), _first=first_coefficient_kernel(rank)
    )
    return (
        jit.specialised(_encrypt_groups, case, _wide_mask=masks),
        jit.specialised(_decrypt_groups, case, _wide_mask=masks),
    )


@dataclass
class Sealed:
    """The owner's private record of one encrypted request: secrets, token scales, and its check."""

    secrets: list[BlockSecret] = field(repr=False)
    inverse_alpha: NDArray[np.float64] = field(repr=False)
    expected: Expected | None = field(repr=False)
    x: Float32Array = field(repr=False)  # the caller's, who waits for the answer
    gain: float = field(repr=False)

    def wipe(self) -> None:
        """Overwrite all of it."""
        for secret in self.secrets:
            secret.wipe()
        self.inverse_alpha[...] = 0
        self.x = self.x[:0]
        self.gain = 0.0
        if self.expected is not None:
            self.expected.wipe()


class RingOwner(OwnerCipher):
    """What every owner half of the module-LWE backend has, wherever it computes.

    Counters `blocks` (encrypted) and `secrets_drawn` must always be equal.

    repairs     of results that wrapped, under `thin` parameters
    unverified  decrypt answers for matrices that were never guarded, too
    """

    def __init__(
        self, parameters: Parameters, public: PublicMatrix, entropy: Entropy | None,
        unverified: bool,
    ) -> None:  # fmt: skip
        self._parameters = parameters
        self._scheme_tag = scheme_tag(parameters, public)
        self._unverified = unverified
        self._entropy = entropy if entropy is not None else OsEntropy()
        self._count_lock = threading.Lock()
        self._gains = Gains()
        self.repairs = Repairs()
        self.blocks = 0
        self.secrets_drawn = 0

    @property
    def simulated_randomness(self) -> bool:
        return self._entropy.simulated

    def start_over(self) -> None:
        self._gains.forget()
        self.repairs = Repairs()

    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        return unchecked(self._unverified, self._guarded(), matrices)

    @abstractmethod
    def _guarded(self) -> Collection[str]:
        """Names of the matrices whose answers are checked."""

    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return matrix.plan.format.up_bytes(matrix.in_features) * tokens

    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        return matrix.plan.format.down_bytes(matrix.out_features) * tokens

    def exactness(self, matrices: Sequence[OwnerMatrix]) -> Exactness:
        parameters = self._parameters
        errors = {
            matrix.name: matrix.plan.predicted_error(
                parameters, self._gains.of(matrix.name) if parameters.thin else 1.0
            )
            for matrix in matrices
            if self._gains.known(matrix.name) or not parameters.thin
        }
        if not errors:
            return Exactness(0.0, 0.0, "nothing yet", 0)
        where = max(errors, key=errors.__getitem__)
        middle = float(np.median(list(errors.values())))
        return Exactness(middle, errors[where], where, self.repairs.wraps)

    def _gain(self, x: Values, matrix: OwnerMatrix) -> float:
        """That of a request made now. A matrix's first is told by some tokens' products in clear.

        Without it a session's first gradients would be all noise, and later ones rest on them.
        """
        if not self._parameters.thin:
            return 1.0
        first = len(x) >= ENOUGH and not self._gains.known(matrix.name)
        if first and matrix.name in self._guarded():
            shares = self._shares(x, matrix)
            if np.any(shares > 0):  # else the next request tells
                self._gains.learn(matrix.name, shares, 1.0)
        return self._gains.of(matrix.name)

    def _shares(self, x: Values, matrix: OwnerMatrix) -> NDArray[np.float64]:
        """float64[n]: the largest |result| of ENOUGH tokens over p/2, were the gain 1.

        Tokens of zeros, as a last one's gradient is, tell nothing; without enough others n is 0.
        """
        live = np.flatnonzero(torch.as_tensor(x).any(dim=1).cpu().numpy())
        if len(live) < ENOUGH:
            return np.zeros(0)
        some = live[np.linspace(0, len(live) - 1, ENOUGH).astype(np.int64)]
        values = torch.as_tensor(x[some]).cpu().numpy().astype(np.float64) * matrix.in_scale
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        try:
            with np.errstate(invalid="ignore"):
                values /= norms  # what is not finite is refused when it is encrypted
            largest = self._clear_peaks(values, matrix)
            form = matrix.plan.format
            return largest * (matrix.plan.amplitude(self._parameters) / (form.modulus / 2))
        finally:
            wipe(values, norms)

    @abstractmethod
    def _clear_peaks(self, values: NDArray[np.float64], matrix: OwnerMatrix) -> NDArray[np.float64]:
        """float64[T], the largest |result| of each of float64[T, K], multiplied in clear."""

    def _learn(
        self, matrix: OwnerMatrix, gain: float, peaks: NDArray[np.float64], tokens: int, wraps: int
    ) -> None:
        """Learn from an accepted answer: float64[T] largest |y|, tokens seen to, results moved."""
        if self._parameters.thin:
            self.repairs.add(tokens, wraps)
            self._gains.learn(matrix.name, peaks / (matrix.plan.format.modulus / 2), gain)

    def _require_check(self, expected: object | None, matrix: OwnerMatrix) -> None:
        """Raise UnguardedError for a request that has none, unless that was asked for."""
        if expected is None and not self._unverified:
            raise UnguardedError(matrix.name)

    def _count(self, blocks: int = 0, secrets_drawn: int = 0) -> None:
        with self._count_lock:
            self.blocks += blocks
            self.secrets_drawn += secrets_drawn


class MlweOwner(RingOwner):
    """Owner half of the module-LWE backend on CPU: numba ring kernels, AES-CTR randomness."""

    def __init__(
        self, parameters: Parameters, public: PublicMatrix, entropy: Entropy | None = None,
        unverified: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameters, public, entropy, unverified)
        self._public = public
        self._encrypt, self._decrypt = _kernels(parameters.rank)
        self._checks: dict[str, IntegrityCheck] = {}
        self._hash = MessageHash(self._entropy, self._scheme_tag)
        self._local = threading.local()

    def _guarded(self) -> Collection[str]:
        return self._checks.keys()

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._checks[matrix.name] = IntegrityCheck(
            matrix, weight, forward, self._entropy, self._parameters
        )

    def _clear_peaks(self, values: NDArray[np.float64], matrix: OwnerMatrix) -> NDArray[np.float64]:
        small = values.astype(np.float32)
        found = self._checks[matrix.name].products(small)
        peaks = np.abs(found).max(axis=1).astype(np.float64)
        wipe(small, found)
        return peaks

    def encrypt(self, x: Float32Array, matrix: OwnerMatrix) -> Encrypted:
        check_input(x, matrix)
        tokens = len(x)
        norms, factor, inverse = (np.zeros(tokens) for _ in range(3))
        sums = np.zeros((tokens, 2), np.uint64)
        gain = self._gain(x, matrix)
        sealed = Sealed([], inverse, None, x, gain)
        try:  # from here on there is something to overwrite, whatever happens
            self._fill_norms_and_sums(x, matrix, norms, sums)
            token_scales(norms, matrix, self._parameters, gain, factor, inverse)
            tag = self._hash.tag(sums, factor, matrix.in_scale)
            with RequestKeys(self._entropy, tag) as keys:
                sealed.secrets = self._fresh_secrets(-(-tokens // _D), keys)
                check = self._checks.get(matrix.name)
                if check is not None:
                    sealed.expected = Expected(check, tokens, keys.rows)
                planes = self._seal(x, matrix, sealed, factor, keys)
            return Encrypted(pack_request(planes, matrix.plan.format), sealed)
        except BaseException:
            sealed.wipe()
            raise
        finally:
            norms[...] = 0
            factor[...] = 0
            sums[...] = 0

    def _fill_norms_and_sums(
        self, x: Float32Array, matrix: OwnerMatrix, norms: NDArray[np.float64],
        sums: NDArray[np.uint64],
    ) -> None:  # fmt: skip
        """norms float64[T] of x * in_scale, and sums uint64[T, 2] that tell this x from others."""
        tokens, inputs = x.shape
        words, key = x.view(np.uint32), self._hash.key(inputs)
        step = max(1, _VALUES_AT_ONCE // inputs)

        def part(first: int, last: int) -> None:
            for a in range(first, last, step):
                b = min(last, a + step)
                _token_norms(x, matrix.in_scale, norms, a, b)
                if key is not None:
                    hash_rows(words, key, sums, a, b)

        run_split(part, tokens, grain=64)

    def _seal(
        self, x: Float32Array, matrix: OwnerMatrix, sealed: Sealed,
        factor: NDArray[np.float64], keys: RequestKeys,
    ) -> NDArray[np.int8]:  # fmt: skip
        """int8[limbs, T, K], the digit planes of a request; errors are drawn here and wiped."""
        tokens, inputs = x.shape
        form = matrix.plan.format
        planes = np.empty((form.limbs, tokens, inputs), np.int8)
        public = self._public.rows(inputs).reshape(-1)
        secrets, expected = sealed.secrets, sealed.expected
        sealing = np.zeros((len(secrets), self._parameters.dimension), np.int32)
        errors = Keystream(keys.errors)

        def part(first: int, last: int) -> None:
            # Each thread expands the error bits of its own columns, at their place in the stream.
            begin, end = (
                ERROR_BYTES * tokens * min(inputs, g * WIDE) for g in (first, last)
            )  # fmt: skip
            noise = self._scratch(end - begin)
            try:
                errors.add(noise, begin)
                self._encrypt(
                    public, sealing, x, matrix.in_scale, factor, noise, planes, form.unused_bits,
                    *inverse_tables(), first, last,
                )  # fmt: skip
            finally:
                noise[...] = 0
            if expected is not None:
                columns = first * WIDE, min(inputs, last * WIDE)
                expected.add_inputs(x, matrix.in_scale, factor, *columns)

        try:
            for row, secret in zip(sealing, secrets, strict=True):
                row[...] = secret.seal().reshape(-1)
            self._count(blocks=len(sealing))
            run_split(part, -(-inputs // WIDE), grain=_grain(len(sealing)))
        finally:
            errors.wipe()
            sealing[...] = 0
        return planes

    def _fresh_secrets(self, count: int, keys: RequestKeys) -> list[BlockSecret]:
        stream = Keystream(keys.secrets)
        self._count(secrets_drawn=count)
        try:
            return BlockSecret.draw(stream, count, self._parameters.rank, _D)
        finally:
            stream.wipe()

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """This thread's buffer for error bits, all zero before and after use.

        Fresh pages each time would cost more than AES.
        """
        buffer: NDArray[np.uint8] | None = getattr(self._local, "noise", None)
        if buffer is None or buffer.size < size:
            buffer = self._local.noise = np.zeros(size, np.uint8)
        return buffer[:size]

    def decrypt(
        self, sealed: Sealed, payload: Payload, matrix: OwnerMatrix, worker: str = ""
    ) -> Float32Array:
        tokens = len(sealed.inverse_alpha)
        outputs = matrix.out_features
        form = matrix.plan.format
        answer = unpack_answer(np.frombuffer(payload, np.uint8), tokens, outputs, form)
        hint = matrix.hint
        if hint is None:
            raise ValueError(f"{matrix.name}: no hint; run the preparation first")
        expected = sealed.expected
        self._require_check(expected, matrix)
        inverse, out_scale = sealed.inverse_alpha, matrix.out_scale
        if expected is not None:
            # The check takes centred integers, which float32 holds exactly, and scales them.
            inverse, out_scale = np.ones(tokens), np.ones(outputs, np.float32)
        out = np.empty((tokens, outputs), np.float32)
        opening = np.zeros((len(sealed.secrets), self._parameters.dimension), np.int32)
        flat = hint.reshape(-1)

        def part(first: int, last: int) -> None:
            self._decrypt(
                flat, opening, answer, inverse, out_scale, out, form.dropped_bits,
                form.limbs, form.unused_bits, *inverse_tables(), first, last,
            )  # fmt: skip
            if expected is not None:
                columns = first * WIDE, min(outputs, last * WIDE)
                expected.add_outputs(out, sealed.inverse_alpha, matrix.out_scale, *columns)

        with ExitStack() as stack:  # a failed check leaves the secrets sealed
            secrets = [stack.enter_context(secret.opened()) for secret in sealed.secrets]
            try:
                for row, secret in zip(opening, secrets, strict=True):
                    row[...] = secret.reshape(-1)
                run_split(part, -(-outputs // WIDE), grain=_grain(len(opening)))
                if expected is not None:
                    repaired = self._repair(sealed, expected, matrix, out)
                    expected.require(worker)
                    expected.peaks[sealed.inverse_alpha == 0] = 0  # noise, of no input
                    self._learn(matrix, sealed.gain, expected.peaks, *repaired)
            except BaseException:
                # What is no honest answer decrypts to itself less the mask, and from its mask a
                # secret can be solved for that may yet open the answer of another worker.
                out[...] = 0
                if expected is not None:
                    expected.forget_outputs()
                raise
            finally:
                opening[...] = 0
        sealed.wipe()
        return out

    def _repair(
        self, sealed: Sealed, expected: Expected, matrix: OwnerMatrix, out: Float32Array
    ) -> tuple[int, int]:
        """Move results that wrapped back to where they belong.

        Returns the numbers of tokens looked at and of results moved. Raises WrongAnswerError for a
        result of those tokens that no noise explains.
        """
        if not self._parameters.thin:
            return 0, 0
        p, live = matrix.plan.format.modulus, sealed.inverse_alpha > 0
        most = edge(p, sealed.gain)
        near = np.flatnonzero((expected.peaks > most) & live)
        wraps, unsettled = 0, live.copy()
        for tokens in in_parts(near):
            moved, whole = self._repair_tokens(sealed, expected, matrix, out, tokens, most)
            wraps += moved
            unsettled[tokens] = not whole
        found = expected.suspicious()
        # Not twice: one that float32 cannot hold would be moved by its sign alone once more.
        for tokens in in_parts(found[unsettled[found]]):
            wraps += self._repair_tokens(sealed, expected, matrix, out, tokens, 0.0)[0]
        return len(np.union1d(near, found[live[found]])), wraps

    def _repair_tokens(
        self, sealed: Sealed, expected: Expected, matrix: OwnerMatrix, out: Float32Array,
        tokens: NDArray[np.int64], most: float,
    ) -> tuple[int, bool]:  # fmt: skip
        """Of a few tokens, results beyond `most`, one by one where they are few; or all of them.

        Returns how many were moved, and whether all were looked at.
        """
        p, check = matrix.plan.format.modulus, expected.check
        inverse = sealed.inverse_alpha[tokens, None]
        ratio = self._parameters.modulus / p
        wide = sealed.x[tokens].astype(np.float64) * matrix.in_scale / inverse * ratio
        np.rint(wide, out=wide)  # the message: what rounding it does to a result is no noise
        wide /= ratio
        scaled, scale = wide.astype(np.float32), inverse * matrix.out_scale
        with np.errstate(over="ignore"):
            values = out[tokens] / scale
        # From 0 on, all: what wrapped may have come back as 0, or be too small for float32.
        places = np.nonzero(np.abs(values) >= most)
        whole = len(places[0]) > FEW * len(tokens) or not held(values, p * scale)
        if not whole:
            right = values.astype(np.float32)
            right[places] = check.results(scaled[places[0]], places[1])
        else:
            right = check.products(scaled)
        turns = unwrap(out, tokens, right, p, scale)
        wrong = astray(out, tokens, right, tolerance(matrix.plan, self._parameters), scale)
        expected.add_turns(tokens, turns, p)
        expected.peaks[tokens] = np.abs(right).max(axis=1)
        wraps = int(np.count_nonzero(turns))
        wipe(wide, scaled, scale, values, right, turns)
        if wrong:
            raise check.judge.wrong_result()
        return wraps, whole

    def discard(self, sealed: Sealed) -> None:
        sealed.wipe()


def _grain(blocks: int) -> int:
    """Wide tiles that are worth a thread: to wake one takes as long as one or two of one block."""
    return max(1, _TILES_WORTH // blocks)


def token_scales(
    norms: NDArray[np.float64], matrix: OwnerMatrix, parameters: Parameters, gain: float,
    factor: NDArray[np.float64], inverse: NDArray[np.float64],
) -> None:  # fmt: skip
    """For each token, factor float64[T] = q/p * alpha_t and inverse float64[T] = 1/alpha_t.

    An all-zero token is encrypted like any other (alpha 1), but its result is exactly zero, not
    noise at an arbitrary scale: its inverse is 0.

    Raises NonFiniteInputError when a norm is not finite; nothing is written then.
    """
    require_finite(np.isfinite(norms), matrix)
    ratio = parameters.modulus / matrix.plan.format.modulus
    _scale_tokens(norms, matrix.plan.amplitude(parameters, gain), ratio, factor, inverse)
