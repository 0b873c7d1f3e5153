"""The worker's product on a GPU: int8 tensor cores, recombined mod p and rounded in registers.

    Y[t, n] = sum_l 256^l * (planes[l, t] . weight[n])  mod 2^32, and p = 2^(8*limbs) divides 2^32
    out[t, n] = round(Y / 2^dropped_bits) mod 2^(8*limbs - dropped_bits)

One program owns a tile of tokens x outputs and keeps one int32 accumulator a limb, so a tile of
the weight is read once for all limbs. The limb products are four bytes a limb and value, twelve
for three limbs against two bytes of result: writing them and reading them back would move
24*T*N bytes, more than everything else together, so they never leave the registers.

The floor, for T tokens, N outputs, K inputs: 2*limbs*T*N*K operations at the card's int8 peak,
or limbs*T*K + N*K + 2*T*N bytes at its memory bandwidth, whichever is the longer.

On Hopper tiles arrive by the bulk copy engine (TMA), elsewhere by asynchronous copies through
pointers; `hopper.py` has a second kernel for Hopper. `tuner.py` chooses among them and their
tile shapes.

No speed of this file has been measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from backends.he.cuda.hopper import async_kernel, async_operands
from backends.he.cuda.tiling import Kernel, Tiling

ALIGNMENT = 16
"""Bytes: what the bulk copy engine asks of addresses and row lengths, so K is padded to it."""

_ONE_LAUNCH = threading.Lock()
_PRODUCT_BYTES = 1 << 28  # int32 products the library path holds at a time


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def fused_kernel(  # type: ignore[no-untyped-def]
    planes,
    weight,
    out,
    tokens,
    outputs,
    inputs,
    LIMBS: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BULK: tl.constexpr,
):
    """planes int8[LIMBS, tokens, inputs] x weight int8[outputs, inputs] -> out [tokens, outputs].

    `planes` and `weight` are tensor descriptors when BULK, else pointers; `inputs` is a multiple
    of 16. Tiles past an edge are read as zeros or as other rows, and never stored.
    """
    token_tiles = tl.cdiv(tokens, BM)
    output_tiles = tl.cdiv(outputs, BN)
    program = tl.program_id(0)
    first_tile = program // (GROUP * output_tiles) * GROUP
    height = tl.minimum(token_tiles - first_tile, GROUP)
    place = program % (GROUP * output_tiles)
    first_token = (first_tile + place % height) * BM
    first_output = place // height * BN
    rows = first_token + tl.arange(0, BM)
    columns = first_output + tl.arange(0, BN)

    acc0 = tl.zeros((BM, BN), tl.int32)
    acc1 = tl.zeros((BM, BN), tl.int32)
    acc2 = tl.zeros((BM, BN), tl.int32)
    if BULK:
        for k in range(0, inputs, BK):
            w = weight.load([first_output, k]).T
            acc0 = tl.dot(
                planes.load([0, first_token, k]).reshape(BM, BK), w, acc0, out_dtype=tl.int32
            )
            acc1 = tl.dot(
                planes.load([1, first_token, k]).reshape(BM, BK), w, acc1, out_dtype=tl.int32
            )
            if LIMBS == 3:
                acc2 = tl.dot(
                    planes.load([2, first_token, k]).reshape(BM, BK), w, acc2, out_dtype=tl.int32
                )
    else:
        depth = tl.arange(0, BK)
        plane = tokens.to(tl.int64) * inputs
        a = planes + (rows % tokens).to(tl.int64)[:, None] * inputs + depth[None, :]
        b = weight + (columns % outputs).to(tl.int64)[None, :] * inputs + depth[:, None]
        for k in range(0, inputs, BK):
            inside = depth < inputs - k
            w = tl.load(b + k, mask=inside[:, None], other=0)
            acc0 = tl.dot(
                tl.load(a + k, mask=inside[None, :], other=0), w, acc0, out_dtype=tl.int32
            )
            acc1 = tl.dot(
                tl.load(a + plane + k, mask=inside[None, :], other=0), w, acc1, out_dtype=tl.int32
            )
            if LIMBS == 3:
                acc2 = tl.dot(
                    tl.load(a + 2 * plane + k, mask=inside[None, :], other=0),
                    w,
                    acc2,
                    out_dtype=tl.int32,
                )

    y = acc0 + (acc1 << 8) + ((1 << SHIFT) >> 1)
    if LIMBS == 3:
        y += acc2 << 16
    y = (y >> SHIFT) & ((1 << (8 * LIMBS - SHIFT)) - 1)
    target = out + rows.to(tl.int64)[:, None] * outputs + columns[None, :]
    inside_out = (rows[:, None] < tokens) & (columns[None, :] < outputs)
    tl.store(target, y.to(tl.int16), mask=inside_out)


def bulk_operands(planes: torch.Tensor, weight: torch.Tensor, tiling: Tiling) -> tuple[Any, Any]:
    """What the bulk copy engine is told of both operands, for `fused_kernel`."""
    return (
        TensorDescriptor.from_tensor(planes, [1, tiling.tokens, tiling.inputs]),
        TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.inputs]),
    )


def fused_product(
    planes: torch.Tensor, weight: torch.Tensor, dropped_bits: int, tiling: Tiling
) -> torch.Tensor:
    """int16[T, N], the bits of the uint16 answers, queued on the current stream.

    planes  int8[limbs, T, K], contiguous, K a multiple of ALIGNMENT
    weight  int8[N, K], contiguous, on the same device
    """
    limbs, tokens, inputs = planes.shape
    outputs = len(weight)
    out = torch.empty((tokens, outputs), dtype=torch.int16, device=planes.device)
    programs = triton.cdiv(tokens, tiling.tokens) * triton.cdiv(outputs, tiling.outputs)
    shape = {"LIMBS": limbs, "SHIFT": dropped_bits, "GROUP": tiling.group}
    shape |= {"BM": tiling.tokens, "BN": tiling.outputs, "BK": tiling.inputs}
    with _launching_on(planes.device):
        if tiling.kernel is Kernel.ASYNC:
            operands = async_operands(planes, weight, tiling)
            programs = min(programs, tiling.programs * _multiprocessors(planes.device))
            async_kernel[(programs,)](
                *operands, out, tokens, outputs, inputs,
                **shape, STAGES=tiling.stages, num_warps=tiling.warps,
            )  # fmt: skip
        else:
            bulk = tiling.kernel is Kernel.BULK
            operands = bulk_operands(planes, weight, tiling) if bulk else (planes, weight)
            fused_kernel[(programs,)](
                *operands, out, tokens, outputs, inputs,
                **shape, BULK=bulk, num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
    return out


def library_product(planes: torch.Tensor, weight: torch.Tensor, dropped_bits: int) -> torch.Tensor:
    """What `fused_product` computes, by the library's int8 product and plain tensor arithmetic.

    The reference on the device: its int32 products do go through memory, a slice of outputs at a
    time.
    """
    limbs, tokens, inputs = planes.shape
    outputs = len(weight)
    # cuBLASLt takes no fewer than 17 rows, and columns in eights.
    rows = _at_least(17, planes.reshape(limbs * tokens, inputs))
    columns = _at_least(outputs + -outputs % 8, weight)
    width = max(8, _PRODUCT_BYTES // (4 * len(rows)) // 8 * 8)
    out = torch.empty((tokens, outputs), dtype=torch.int16, device=planes.device)
    for start in range(0, outputs, width):
        stop = min(outputs, start + width)
        products = torch._int_mm(rows, columns[start : start + width].t())
        limb_products = products[: limbs * tokens, : stop - start].view(limbs, tokens, -1)
        out[:, start:stop] = _recombined(limb_products, dropped_bits)
    return out


def _at_least(count: int, rows: torch.Tensor) -> torch.Tensor:
    """The matrix itself, or with rows of zeros below it."""
    missing = count - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def _recombined(products: torch.Tensor, dropped_bits: int) -> torch.Tensor:
    """products int32[limbs, T, N] -> int16[T, N]; int32 wraps, as it should."""
    limbs = len(products)
    y = products[0] + ((1 << dropped_bits) >> 1)
    for limb in range(1, limbs):
        y += products[limb] << (8 * limb)
    return ((y >> dropped_bits) & ((1 << (8 * limbs - dropped_bits)) - 1)).to(torch.int16)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def _launching_on(device: torch.device) -> Iterator[None]:
    """One launch at a time, on this device: Triton compiles at the first, and promises nothing to
    several threads; its interpreter keeps its state in its modules.
    """
    there = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _ONE_LAUNCH, there:
        yield
