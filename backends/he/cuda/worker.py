"""The worker's half of the module-LWE cipher on a GPU: resident int8 weights, one launch a call.

This module holds no key and imports nothing that could: a test walks its imports.

A request that comes from the host goes through page-locked memory on a stream of its thread, so
that copies of one thread overlap the products of another. A request that is already on the device
is computed there on the current stream, after whatever put it there, and so is its answer.
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
from backends.he.cuda.tiling import token_class
from backends.he.cuda.tuner import Tuner
from backends.he.interface import AnyPayload, WorkerCipher
from backends.he.mlwe_worker import check_request_bytes
from backends.he.params import Parameters
from backends.threads import run_split

MAX_INPUTS = (1 << 31) // (128 * 127)
"""Inputs whose int32 sums of int8 products cannot overflow."""
_COPY_GRAIN_BYTES = 1 << 20  # a memcpy worth a thread


@dataclass(frozen=True)
class DeviceMatrix:
    """One direction of a weight on the device.

    weight    int8[N, K rounded up to ALIGNMENT], the columns past K zero
    inputs    K
    products  by it so far, by class of tokens, ready to be launched again
    """

    weight: torch.Tensor = field(repr=False)
    inputs: int
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

    def __init__(self, parameters: Parameters, gpu: Gpu, fused: bool = True) -> None:
        self._parameters = parameters
        self._gpu = gpu
        self._fused = fused
        self._tuner = Tuner(gpu)
        self._streams = threading.local()

    @property
    def tuner(self) -> Tuner:
        """Which tilings were chosen, for reports."""
        return self._tuner

    def load(self, weight: NDArray[np.int8], forward: bool) -> DeviceMatrix:
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
        return DeviceMatrix(resident, inputs)

    def multiply(self, payload: AnyPayload, tokens: int, matrix: DeviceMatrix) -> Any:
        """Answer bytes, where the request was: numpy uint8 on the host, else a uint8 tensor."""
        if isinstance(payload, torch.Tensor):
            request = self._device_digits(payload, tokens, matrix), tokens
            return self._answer_device([request], matrix)[0]
        return self.multiply_many([(payload, tokens)], matrix)[0]

    def multiply_many(
        self, requests: Sequence[tuple[AnyPayload, int]], matrix: DeviceMatrix
    ) -> list[Any]:
        """Answers to several (payload, tokens) of any owners, in one launch a place they are in.

        Raises ValueError when any payload has the wrong number of bytes or is on another device.
        """
        there: dict[int, tuple[torch.Tensor, int]] = {}
        here: dict[int, NDArray[np.int8]] = {}
        for index, (payload, tokens) in enumerate(requests):
            if isinstance(payload, torch.Tensor):
                there[index] = self._device_digits(payload, tokens, matrix), tokens
            else:
                digits = np.frombuffer(payload, np.int8)
                here[index] = digits.reshape(self._shape(digits.size, tokens, matrix))
        answers: dict[int, Any] = {}
        if here:
            answers |= zip(here, self._answer_host(list(here.values()), matrix), strict=True)
        if there:
            answers |= zip(there, self._answer_device(list(there.values()), matrix), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _shape(self, size: int, tokens: int, matrix: DeviceMatrix) -> tuple[int, int, int]:
        limbs, inputs = self._parameters.limbs, matrix.inputs
        check_request_bytes(size, limbs, tokens, inputs)
        return limbs, tokens, inputs

    def _device_digits(
        self, payload: torch.Tensor, tokens: int, matrix: DeviceMatrix
    ) -> torch.Tensor:
        """The payload, contiguous. Raises ValueError for what is no request here."""
        if payload.device != self._gpu.device or payload.dtype != torch.uint8:
            raise ValueError(
                f"a request on {payload.device} of {payload.dtype}; this worker takes uint8 on "
                f"{self._gpu.device}, or bytes"
            )
        self._shape(payload.numel(), tokens, matrix)
        return payload.contiguous()

    def _product(self, digits: torch.Tensor, tokens: int, matrix: DeviceMatrix) -> torch.Tensor:
        """uint8[2*T*N] from the bytes of int8[limbs, T, padded K]."""
        limbs, dropped_bits = self._parameters.limbs, self._parameters.dropped_bits
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
        """Answers to (digits, tokens), on the current stream. A single aligned request is not
        copied.
        """
        digits, tokens = requests[0]
        width, inputs = matrix.weight.shape[1], matrix.inputs
        if len(requests) == 1 and width == inputs and not digits.data_ptr() % ALIGNMENT:
            return [self._product(digits, tokens, matrix)]
        limbs, sizes = self._parameters.limbs, [tokens for _, tokens in requests]
        shape = (limbs, sum(sizes), width)
        planes = torch.zeros(shape, dtype=torch.uint8, device=self._gpu.device)
        views = [digits.view(limbs, tokens, inputs) for digits, tokens in requests]
        torch.cat(views, dim=1, out=planes[:, :, :inputs])
        product = self._product(planes, shape[1], matrix)
        return [product[part] for part in _parts([2 * matrix.outputs * size for size in sizes])]

    def _answer_host(
        self, requests: list[NDArray[np.int8]], matrix: DeviceMatrix
    ) -> list[NDArray[np.uint8]]:
        """Answers on the host, complete when this returns."""
        tokens = [request.shape[1] for request in requests]
        limbs, total, width = len(requests[0]), sum(tokens), matrix.weight.shape[1]
        staged = self._gpu.pinned(limbs * total * width).view(torch.int8).view(limbs, total, width)
        with self._own_stream() as stream:
            planes = torch.empty(staged.shape, dtype=torch.int8, device=self._gpu.device)
            with self._gpu.clock.span("copy"):
                for request, part in zip(requests, _parts(tokens), strict=True):
                    for limb in range(limbs):
                        # Each piece is on its way to the device while the next is copied here.
                        _copy_rows(request[limb], staged[limb, part].numpy())
                        planes[limb, part].copy_(staged[limb, part], non_blocking=True)
            product = self._product(planes, total, matrix)
            answers = self._gpu.pinned(product.numel())
            with self._gpu.clock.span("copy"):
                answers.copy_(product, non_blocking=True)
            if stream is not None:
                stream.synchronize()
        return [answers[p].numpy() for p in _parts([2 * matrix.outputs * n for n in tokens])]

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


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Slices of these sizes, one after the other."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _copy_rows(source: NDArray[np.int8], target: NDArray[np.int8]) -> None:
    """source int8[T, K] into target int8[T, K or more], whose other columns become zero."""
    inputs = source.shape[1]
    target[:, inputs:] = 0
    run_split(
        lambda first, last: np.copyto(target[first:last, :inputs], source[first:last]),
        len(source),
        grain=max(1, _COPY_GRAIN_BYTES // inputs),
    )
