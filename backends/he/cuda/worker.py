"""The worker's half of the module-LWE cipher on a GPU: resident int8 weights, one launch a call.

This module holds no key and imports nothing that could: a test walks its imports.

A request that comes from the host goes through page-locked memory on a stream of its thread, so
that copies of one thread overlap the products of another. A request that is already on the device
is computed there on the current stream, after whatever put it there, and so is its answer.

Requests and answers that are packed (`wire.py`) are unpacked and packed on the device, between the
copies and the product. Their speed on a GPU has not been measured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu, GpuError
from backends.he.cuda.gemm import ALIGNMENT, Product, library_product
from backends.he.cuda.packing import pack_answer, unpack_request, whole_bytes
from backends.he.cuda.tiling import token_class
from backends.he.cuda.tuner import Tuner
from backends.he.interface import AnyPayload, WorkerCipher
from backends.he.wire import Format
from backends.threads import run_split

MAX_INPUTS = (1 << 31) // (128 * 127)
"""Inputs whose int32 sums of int8 products cannot overflow."""
_COPY_GRAIN_BYTES = 1 << 20  # a memcpy worth a thread


@dataclass(frozen=True)
class DeviceMatrix:
    """One direction of a weight on the device.

    weight    int8[N, K rounded up to ALIGNMENT], the columns past K zero
    inputs    K
    format    how its requests and answers travel
    products  by it so far, by class of tokens, ready to be launched again
    """

    weight: torch.Tensor = field(repr=False)
    inputs: int
    format: Format
    products: dict[int, Product] = field(default_factory=dict, repr=False, compare=False)

    @property
    def outputs(self) -> int:
        """N."""
        return len(self.weight)


class CudaWorker(WorkerCipher):
    """Worker half on `gpu`; the same bits as every other worker.

    fused  the Triton kernel; else the library's product, which is its reference
    """

    launches = 2
    """Launches worth having under way: one computes while the other's bytes are copied."""

    def __init__(self, gpu: Gpu, fused: bool = True) -> None:
        self._gpu = gpu
        self._fused = fused
        self._tuner = Tuner(gpu)
        self._streams = threading.local()

    @property
    def tuner(self) -> Tuner:
        """Which tilings were chosen, for reports."""
        return self._tuner

    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> DeviceMatrix:
        """A copy of int8[N, K] on the device, ready when this returns; K runs along its rows.

        Raises GpuError when it does not fit, ValueError when a sum could leave int32.
        """
        outputs, inputs = weight.shape if forward else weight.shape[::-1]
        if inputs > MAX_INPUTS:
            raise ValueError(f"{inputs} inputs overflow int32; at most {MAX_INPUTS}")
        padded = inputs + -inputs % ALIGNMENT
        host = torch.from_numpy(np.array(weight, order="C"))  # a copy: it may be a read-only map
        try:
            stored = host.to(self._gpu.device)
            resident = torch.zeros((outputs, padded), dtype=torch.int8, device=self._gpu.device)
            resident[:, :inputs] = stored if forward else stored.T
        except torch.OutOfMemoryError:
            raise GpuError(
                f"{self._gpu.name}: no memory left for a matrix of {outputs}x{padded} bytes; "
                f"{self._gpu.free_bytes() >> 20} MiB are free"
            ) from None
        self._gpu.synchronize()
        return DeviceMatrix(resident, inputs, format)

    def multiply(self, payload: AnyPayload, tokens: int, matrix: DeviceMatrix) -> Any:
        """Answer bytes, where the request was: numpy uint8 on the host, else a uint8 tensor."""
        if isinstance(payload, torch.Tensor):
            return self._answer_device([(self._sound(payload, tokens, matrix), tokens)], matrix)[0]
        return self.multiply_many([(payload, tokens)], matrix)[0]

    def multiply_many(
        self, requests: Sequence[tuple[AnyPayload, int]], matrix: DeviceMatrix
    ) -> list[Any]:
        """Answers to several (payload, tokens) of any owners, in one launch a place they are in.

        Raises ValueError when any payload has the wrong number of bytes or is on another device.
        """
        there: dict[int, tuple[torch.Tensor, int]] = {}
        here: dict[int, tuple[NDArray[np.uint8], int]] = {}
        for index, (payload, tokens) in enumerate(requests):
            if isinstance(payload, torch.Tensor):
                there[index] = self._sound(payload, tokens, matrix), tokens
            else:
                received = np.frombuffer(payload, np.uint8)
                matrix.format.require_request(received.size, tokens, matrix.inputs)
                here[index] = received, tokens
        answers: dict[int, Any] = {}
        if here:
            answers |= zip(here, self._answer_host(list(here.values()), matrix), strict=True)
        if there:
            answers |= zip(there, self._answer_device(list(there.values()), matrix), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _sound(self, payload: torch.Tensor, tokens: int, matrix: DeviceMatrix) -> torch.Tensor:
        """The payload, contiguous. Raises ValueError for what is no request here."""
        if payload.device != self._gpu.device or payload.dtype != torch.uint8:
            raise ValueError(
                f"a request on {payload.device} of {payload.dtype}; this worker takes uint8 on "
                f"{self._gpu.device}, or bytes"
            )
        matrix.format.require_request(payload.numel(), tokens, matrix.inputs)
        return payload.contiguous()

    def _product(self, digits: torch.Tensor, tokens: int, matrix: DeviceMatrix) -> torch.Tensor:
        """uint8[2*T*N], results of two bytes, from the bytes of int8[limbs, T, padded K]."""
        limbs, dropped_bits = matrix.format.limbs, matrix.format.dropped_bits
        if not self._fused:
            planes = digits.view(torch.int8).view(limbs, tokens, -1)
            return library_product(planes, matrix.weight, dropped_bits).view(-1).view(torch.uint8)
        product = matrix.products.get(token_class(tokens))
        if product is None:
            tiling = self._tuner.tiling(limbs, tokens, matrix.weight, dropped_bits)
            product = Product(matrix.weight, limbs, dropped_bits, tiling)
            matrix.products[token_class(tokens)] = product
        with self._gpu.clock.span("worker"):
            return product(digits, tokens)

    def _answer_device(
        self, requests: list[tuple[torch.Tensor, int]], matrix: DeviceMatrix
    ) -> list[torch.Tensor]:
        """Answers to (payload, tokens), on the current stream. A single aligned request of whole
        bytes is not copied.
        """
        payload, tokens = requests[0]
        sizes = [tokens for _, tokens in requests]
        width, inputs, wire = matrix.weight.shape[1], matrix.inputs, matrix.format
        ready = whole_bytes(wire) and width == inputs and not payload.data_ptr() % ALIGNMENT
        if len(requests) == 1 and ready:
            return _told(self._product(payload, tokens, matrix), sizes, matrix)
        shape = (wire.limbs, sum(sizes), width)
        planes = torch.zeros(shape, dtype=torch.uint8, device=self._gpu.device)
        for (payload, _), part in zip(requests, _parts(sizes), strict=True):
            unpack_request(payload, wire, planes[:, part, :inputs])
        return _told(self._product(planes, shape[1], matrix), sizes, matrix)

    def _answer_host(
        self, requests: list[tuple[NDArray[np.uint8], int]], matrix: DeviceMatrix
    ) -> list[NDArray[np.uint8]]:
        """Answers on the host, complete when this returns."""
        sizes = [matrix.format.down_bytes(matrix.outputs) * tokens for _, tokens in requests]
        with self._own_stream() as stream:
            if whole_bytes(matrix.format):
                answers = self._answer_digits(requests, matrix)
            else:
                answers = self._answer_device(self._moved(requests), matrix)
            told = self._gpu.pinned(sum(sizes))
            with self._gpu.clock.span("copy"):
                for answer, part in zip(answers, _parts(sizes), strict=True):
                    told[part].copy_(answer, non_blocking=True)
            if stream is not None:
                stream.synchronize()
        return [told[part].numpy() for part in _parts(sizes)]

    def _answer_digits(
        self, requests: list[tuple[NDArray[np.uint8], int]], matrix: DeviceMatrix
    ) -> list[torch.Tensor]:
        """Answers on the device to requests of whole bytes, whose rows are padded on their way."""
        tokens = [tokens for _, tokens in requests]
        limbs, total, width = matrix.format.limbs, sum(tokens), matrix.weight.shape[1]
        staged = self._gpu.pinned(limbs * total * width).view(limbs, total, width)
        planes = torch.empty(staged.shape, dtype=torch.uint8, device=self._gpu.device)
        with self._gpu.clock.span("copy"):
            for (payload, count), part in zip(requests, _parts(tokens), strict=True):
                digits = payload.reshape(limbs, count, matrix.inputs)
                for limb in range(limbs):
                    # Each piece is on its way to the device while the next is copied here.
                    _copy_rows(digits[limb], staged[limb, part].numpy())
                    planes[limb, part].copy_(staged[limb, part], non_blocking=True)
        return _told(self._product(planes, total, matrix), tokens, matrix)

    def _moved(
        self, requests: list[tuple[NDArray[np.uint8], int]]
    ) -> list[tuple[torch.Tensor, int]]:
        """The same requests on the device, byte for byte."""
        sizes = [payload.size for payload, _ in requests]
        staged = self._gpu.pinned(sum(sizes))
        there = torch.empty(staged.shape, dtype=torch.uint8, device=self._gpu.device)
        with self._gpu.clock.span("copy"):
            for (payload, _), part in zip(requests, _parts(sizes), strict=True):
                _copy_rows(payload[:, None], staged[part, None].numpy())
                there[part].copy_(staged[part], non_blocking=True)
        return [
            (there[part], tokens) for (_, tokens), part in zip(requests, _parts(sizes), strict=True)
        ]

    @contextlib.contextmanager
    def _own_stream(self) -> Any:
        """Make this thread's own stream current; None where the device has no streams."""
        if self._gpu.device.type != "cuda":
            yield None
            return
        if not hasattr(self._streams, "mine"):
            self._streams.mine = torch.cuda.Stream(self._gpu.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.mine):
            yield self._streams.mine


def _told(product: torch.Tensor, tokens: Sequence[int], matrix: DeviceMatrix) -> list[torch.Tensor]:
    """The answers of so many tokens each, as they travel, from results of two bytes."""
    if matrix.format.down_bits == 16:
        return [product[part] for part in _parts([2 * matrix.outputs * n for n in tokens])]
    values = product.view(torch.int16).view(-1, matrix.outputs)
    return [pack_answer(values[part], matrix.format) for part in _parts(tokens)]


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Slices of these sizes, one after the other."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _copy_rows(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """source uint8[T, K] into target uint8[T, K or more], whose other columns become zero."""
    inputs = source.shape[1]
    target[:, inputs:] = 0
    run_split(
        lambda first, last: np.copyto(target[first:last, :inputs], source[first:last]),
        len(source),
        grain=max(1, _COPY_GRAIN_BYTES // inputs),
    )
