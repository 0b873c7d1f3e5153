"""The owner's half of the module-LWE cipher on a GPU: the arithmetic of `mlwe_owner.py`, same bits.

Given the same secrets and errors, requests and results are those of the CPU owner bit for bit;
only the stream that secrets and errors are drawn from differs (ChaCha20, see `kernels/owner.cu`).
Keys come from the operating system; they and the secrets they expand to are in device memory and
in the driver's launch queue while in use, so the GPU belongs to the owner. They carry a tag of the
parameters and of A, but none of the message, which is on the device: where the operating system's
generator repeats, only session, count and clock of `OsEntropy` keep two messages apart. All keys of
a request are made of one (`RequestKeys`), so what repeats, repeats with its errors.

Everything is queued on torch's current stream, which must be the same for a request and its
answer. The host waits once in `encrypt` (are the inputs finite?), for a flag with the next kernels
queued behind, and once in `decrypt` (is the answer right?), for the sums of its check; and for
copies, where payloads or values are on the host. On an H100 a request of one token takes some
0.17 ms to encrypt, and one of 2,048 no more but for the widest matrices: what a call costs whatever
is in it is most of it (docs/design.md has the table).

Requests are packed and answers unpacked on the device (`packing.py`); results that wrapped are
repaired there (`repair.py`). None of that, which only `thin` formats need, has run on a GPU yet:
those figures are of the `exact` preset's format.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.check import Comparison, DeviceCheck, Expected
from backends.he.cuda.device import Gpu
from backends.he.cuda.launch import Kernels, kernels
from backends.he.cuda.packing import Request, unpack_answer
from backends.he.cuda.repair import TOKENS_AT_ONCE, astray, unwrap
from backends.he.cuda.resident import Residents
from backends.he.cuda.streams import Flag, Flags
from backends.he.entropy import Entropy, RequestKeys
from backends.he.interface import (
    AnyPayload,
    Encrypted,
    OwnerMatrix,
    Values,
    check_input,
    require_finite,
)
from backends.he.mlwe_owner import RingOwner
from backends.he.params import RING_DEGREE, Parameters
from backends.he.public import PublicMatrix
from backends.he.repair import edge, tolerance
from backends.he.ring import tiles_of
from backends.he.secret import UseOnce
from backends.he.wire import EXACT, Format

_KEY_WORDS = struct.Struct("<4Q")
_TILES_EACH = 2  # tiles that one thread block of the kernels works on
_BLOCKS_PER_MULTIPROCESSOR = 8
"""Thread blocks to have before they take several secrets each: enough to even out the ends."""


def key_words(key: bytearray) -> tuple[int, int, int, int]:
    """32 bytes of key as four little-endian 64-bit words, as the kernels take them.

    The bytes are overwritten; Python's numbers and the launch queue's cannot be.
    """
    words = _KEY_WORDS.unpack(key)
    key[:] = bytes(len(key))
    return words


class RequestSecrets(UseOnce):
    """The ternary secrets of one request's blocks, in device memory. `draw` them first."""

    def __init__(self, blocks: int, rank: int, gpu: Gpu) -> None:
        super().__init__()
        shape = (blocks, rank, RING_DEGREE)
        self._words = torch.empty(shape, dtype=torch.int32, device=gpu.device)

    def draw(self, compiled: Kernels, key: bytearray) -> None:
        """Independent secrets from one fresh key of 32 bytes, which is overwritten."""
        blocks, rank, _ = self._words.shape
        compiled.launch("draw_secrets", (blocks, rank), self._words, *key_words(key))

    def seal(self) -> torch.Tensor:
        """int32[blocks, rank, 256], NTT domain, to encrypt the request's only message.

        Raises SecretReuseError the second time.
        """
        self.begin_sealing()
        return self._words

    @contextmanager
    def opened(self) -> Iterator[torch.Tensor]:
        """The same words, to decrypt the answer; wiped at the end, still sealed after an error.

        Raises SecretReuseError unless they have sealed a message and opened none.
        """
        with self.opening():
            yield self._words

    def _erase(self) -> None:
        # Queued behind the kernels that read them.
        self._words.zero_()


@dataclass
class Sealed:
    """The owner's private record of one encrypted request."""

    secrets: RequestSecrets = field(repr=False)
    inverse_alpha: torch.Tensor = field(repr=False)  # float64[T]
    expected: Expected | None = field(repr=False)
    x: Values = field(repr=False)  # the caller's, who waits for the answer
    gain: float = field(repr=False)

    def wipe(self) -> None:
        """Queue the overwriting of all of it, behind the kernels that read it."""
        self.secrets.wipe()
        self.inverse_alpha.zero_()
        self.x = self.x[:0]
        self.gain = 0.0
        if self.expected is not None:
            self.expected.wipe()


class CudaOwner(RingOwner):
    """Owner half of the module-LWE backend on a GPU.

    local       payloads are uint8 tensors on the device, for a worker in this process on this GPU;
                else arrays on the host
    hint_bytes  the most device memory hints may take; None: half of what is free now

    Raises GpuError when the kernels cannot be compiled.
    """

    def __init__(
        self, parameters: Parameters, public: PublicMatrix, gpu: Gpu,
        entropy: Entropy | None = None, local: bool = False, hint_bytes: int | None = None,
        unverified: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameters, public, entropy, unverified)
        self._gpu = gpu
        self._wire = not local
        self._kernels: dict[int, Kernels] = {}  # by limbs
        for form in (Format(up_bits=16), EXACT) if parameters.thin else (EXACT,):
            self._compiled(form)
        self._residents = Residents(gpu, public, hint_bytes)
        self._flags = Flags(gpu)
        self._checks: dict[str, DeviceCheck] = {}

    def _compiled(self, form: Format) -> Kernels:
        """The kernels for values of so many limbs."""
        found = self._kernels.get(form.limbs)
        if found is None:
            found = kernels(self._gpu, self._parameters.rank, form.limbs)
            self._kernels[form.limbs] = found
        return found

    def _guarded(self) -> Collection[str]:
        return self._checks.keys()

    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        self._checks[matrix.name] = DeviceCheck(
            self._gpu, self._compiled(matrix.plan.format), matrix, weight, forward, self._entropy,
            self._parameters,
        )  # fmt: skip

    def _clear_peaks(self, values: NDArray[np.float64], matrix: OwnerMatrix) -> NDArray[np.float64]:
        there = torch.from_numpy(values).to(self._gpu.device)
        found = self._checks[matrix.name].products(there)
        peaks: NDArray[np.float64] = found.abs().amax(dim=1).cpu().numpy()
        there.zero_()
        found.zero_()
        return peaks

    def encrypt(self, x: Values, matrix: OwnerMatrix) -> Encrypted:
        """Encrypt float32[T, K], an array or a tensor on the device.

        Raises NonFiniteInputError for NaN or infinity, ValueError for a wrong shape or place.
        """
        values = self._values(x, matrix)
        tokens, inputs = values.shape
        device, form = self._gpu.device, matrix.plan.format
        compiled = self._compiled(form)
        in_scale, _ = self._residents.scales(matrix)
        rows = self._residents.public_rows(inputs)
        blocks, tiles = -(-tokens // RING_DEGREE), tiles_of(inputs)
        grid, each = self._grid(blocks, tiles)
        norms, factor, inverse = (
            torch.empty(tokens, dtype=torch.float64, device=device) for _ in range(3)
        )
        request = Request(tokens, inputs, form, device)
        secrets = RequestSecrets(blocks, self._parameters.rank, self._gpu)
        gain = self._gain(x, matrix)
        sealed = Sealed(secrets, inverse, None, x, gain)
        try:  # from here on there is something to overwrite, whatever happens
            with (
                RequestKeys(self._entropy, self._scheme_tag) as keys,
                self._gpu.clock.span("owner"),
            ):
                bad = self._scale_tokens(values, in_scale, matrix, gain, norms, factor, inverse)
                secrets.draw(compiled, keys.secrets)
                words = secrets.seal()
                compiled.launch(
                    "encrypt", grid, rows, words, values, in_scale, factor, request.planes, tokens,
                    inputs, tiles, each, form.unused_bits, *key_words(keys.errors),
                )  # fmt: skip
                raw = request.payload()
                check = self._checks.get(matrix.name)
                if check is not None:
                    sealed.expected = check.expect(values, in_scale, factor, keys.rows)
            if bad.read():
                require_finite(torch.isfinite(norms).cpu().numpy(), matrix)
                raise AssertionError("a norm is not finite")
            payload = _to_host(raw, self._gpu) if self._wire else raw
        except BaseException:
            sealed.wipe()
            raise
        finally:
            # Queued behind what reads them.
            norms.zero_()
            factor.zero_()
        self._count(blocks=blocks, secrets_drawn=words.shape[0])
        return Encrypted(payload, sealed)

    def decrypt(
        self, sealed: Sealed, payload: AnyPayload, matrix: OwnerMatrix, worker: str = ""
    ) -> Values:
        """float32[T, N], an array or a tensor as the input was, once the check has passed."""
        tokens, outputs = sealed.inverse_alpha.shape[0], matrix.out_features
        answer = self._answer(payload, tokens, matrix)
        if matrix.hint is None:
            raise ValueError(f"{matrix.name}: no hint; run the preparation first")
        self._require_check(sealed.expected, matrix)
        out = torch.empty((tokens, outputs), dtype=torch.float32, device=self._gpu.device)
        try:
            with sealed.secrets.opened() as words, self._gpu.clock.span("owner"):
                inverse, (_, out_scale) = sealed.inverse_alpha, self._residents.scales(matrix)
                if sealed.expected is None:
                    self._open(words, answer, inverse, out_scale, matrix, out)
                else:
                    # The check takes centred integers, which float32 holds exactly, and scales
                    # them.
                    ones = torch.ones_like(inverse), torch.ones_like(out_scale)
                    self._open(words, answer, *ones, matrix, out)
                    comparison = sealed.expected.compare(out, inverse, out_scale)
                    try:
                        repaired = self._repair(sealed, comparison, matrix, out)
                        comparison.require(worker)
                        if len(comparison.peaks):  # of thin ciphertexts
                            zeros = (inverse == 0).cpu().numpy()
                            comparison.peaks[zeros] = 0  # noise, of no input
                        self._learn(matrix, sealed.gain, comparison.peaks, *repaired)
                    finally:
                        comparison.wipe()
        except BaseException:
            out.zero_()  # see `MlweOwner.decrypt`
            raise
        sealed.wipe()
        if isinstance(sealed.x, torch.Tensor):
            return out
        return (
            _to_host(out.view(-1).view(torch.uint8), self._gpu).view(np.float32).reshape(out.shape)
        )

    def discard(self, sealed: Sealed) -> None:
        sealed.wipe()

    def _open(
        self, words: torch.Tensor, answer: torch.Tensor, inverse: torch.Tensor,
        out_scale: torch.Tensor, matrix: OwnerMatrix, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Queue the decryption of all outputs, a slab of the hint at a time."""
        tokens, outputs = out.shape
        form = matrix.plan.format
        compiled = self._compiled(form)
        for first_row, slab in self._residents.slabs(matrix):
            blocks, tiles = words.shape[0], slab.shape[0]
            grid, each = self._grid(blocks, tiles)
            compiled.launch(
                "decrypt", grid, slab, words, answer, inverse, out_scale, out,
                tokens, outputs, first_row, tiles, each, form.dropped_bits, form.unit // 2,
            )  # fmt: skip

    def _repair(
        self, sealed: Sealed, comparison: Comparison, matrix: OwnerMatrix, out: torch.Tensor
    ) -> tuple[int, int]:
        """Move results that wrapped back to where they belong: see `MlweOwner`."""
        if not self._parameters.thin:
            return 0, 0
        tokens = wraps = 0
        suspicious = comparison.suspicious(edge(matrix.plan.format.modulus, sealed.gain))
        if len(suspicious):
            at = torch.from_numpy(suspicious).to(self._gpu.device)
            for part in torch.split(at[sealed.inverse_alpha[at] > 0], TOKENS_AT_ONCE):
                tokens += len(part)
                wraps += self._repair_tokens(part, sealed, comparison, matrix, out)
        return tokens, wraps

    def _repair_tokens(
        self, at: torch.Tensor, sealed: Sealed, comparison: Comparison, matrix: OwnerMatrix,
        out: torch.Tensor,
    ) -> int:  # fmt: skip
        """The same of a few tokens, int64[n] on the device; returns how many results moved."""
        expected, p, tokens = sealed.expected, matrix.plan.format.modulus, at.cpu().numpy()
        assert expected is not None
        in_scale, out_scale = self._residents.scales(matrix)
        inverse = sealed.inverse_alpha[at, None]
        if isinstance(sealed.x, torch.Tensor):
            x = sealed.x[at]
        else:
            x = torch.from_numpy(sealed.x[tokens]).to(self._gpu.device)
        ratio = self._parameters.modulus / p
        # The message: what rounding it does to a result is no noise.
        scaled = (x.double() * in_scale / inverse * ratio).round_().div_(ratio)
        right = expected.check.products(scaled)
        scale = inverse * out_scale
        turns = unwrap(out, at, right, p, scale)
        wrong = astray(out, at, right, tolerance(matrix.plan, self._parameters), scale)
        comparison.add_turns(tokens, turns, p)
        comparison.peaks[tokens] = right.abs().amax(dim=1).cpu().numpy()
        wraps = int(torch.count_nonzero(turns))
        for private in (x, scaled, right, turns, inverse, scale):
            private.zero_()
        if wrong:
            raise expected.check.judge.wrong_result()
        return wraps

    def _grid(self, blocks: int, tiles: int) -> tuple[tuple[int, int], int]:
        """(grid, secrets each thread block works through) for a matrix of so many tiles.

        Thread blocks of the same rows are neighbours, so that a row comes from memory once; one
        takes several secrets where there are plenty of thread blocks without.
        """
        pairs = -(-tiles // _TILES_EACH)
        plenty = _BLOCKS_PER_MULTIPROCESSOR * self._gpu.multiprocessors
        each = min(blocks, max(1, blocks * pairs // plenty))
        return (-(-blocks // each), pairs), each

    def _values(self, x: Values, matrix: OwnerMatrix) -> torch.Tensor:
        """x as a tensor on the device. Raises ValueError like `check_input`."""
        check_input(x, matrix)
        if not isinstance(x, torch.Tensor):
            with self._gpu.clock.span("copy"):
                return torch.from_numpy(x).to(self._gpu.device)
        if x.device != self._gpu.device:
            raise ValueError(f"{matrix.name}: takes a tensor on {self._gpu.device}, got {x.device}")
        return x

    def _scale_tokens(
        self, x: torch.Tensor, in_scale: torch.Tensor, matrix: OwnerMatrix, gain: float,
        norms: torch.Tensor, factor: torch.Tensor, inverse: torch.Tensor,
    ) -> Flag:  # fmt: skip
        """Queue what `mlwe_owner.token_scales` computes, for x float32[T, K]; float64[T] each.

        The flag tells, when it can be read, whether a norm is not finite.
        """
        form, q = matrix.plan.format, self._parameters.modulus
        tokens, inputs = x.shape
        bad = self._flags.take()
        self._compiled(form).launch(
            "token_scales", (tokens, 1), x, in_scale, norms, factor, inverse, bad.cell,
            inputs, matrix.plan.amplitude(self._parameters, gain), q / form.modulus,
        )  # fmt: skip
        bad.fetch()
        return bad

    def _answer(self, payload: AnyPayload, tokens: int, matrix: OwnerMatrix) -> torch.Tensor:
        """uint16[T, N] on the device. Raises ValueError on a wrong size."""
        form, outputs = matrix.plan.format, matrix.out_features
        if isinstance(payload, torch.Tensor):
            if payload.dtype != torch.uint8 or payload.ndim != 1:
                raise ValueError(f"an answer is uint8[n], got {payload.dtype}")
            form.require_answer(payload.numel(), tokens, outputs)
            raw = payload.to(self._gpu.device)
        else:
            values = np.frombuffer(payload, np.uint8)
            form.require_answer(values.size, tokens, outputs)
            raw = self._gpu.pinned(values.size)
            raw.numpy()[...] = values
            with self._gpu.clock.span("copy"):
                raw = raw.to(self._gpu.device, non_blocking=True)
        return unpack_answer(raw, tokens, outputs, form)


def _to_host(raw: torch.Tensor, gpu: Gpu) -> NDArray[np.uint8]:
    """uint8[n] of the device in page-locked host memory, when it has arrived."""
    host = gpu.pinned(raw.numel())
    with gpu.clock.span("copy"):
        host.copy_(raw)
    return host.numpy()
