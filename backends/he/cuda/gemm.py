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

On an H100 all tilings of this file are exact; the tuner preferred `hopper.py`'s for large requests,
and how fast these are has not been recorded.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from backends.he.cuda.device import on_device
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


class Product:
    """The product by one weight and tiling, ready to be launched again and again.

    The first launch goes through Triton's front door, which looks at every argument and compiles.
    Later ones go to the compiled kernel itself, which looks at none. What Triton would look at is
    therefore fixed here: the weight, its sizes, and that addresses are multiples of 16; it is told
    not to look at the number of tokens.

    weight  int8[N, K], contiguous, K a multiple of ALIGNMENT
    """

    def __init__(self, weight: torch.Tensor, limbs: int, dropped_bits: int, tiling: Tiling) -> None:
        self._weight, self._limbs, self._tiling = weight, limbs, tiling
        self._outputs, self._inputs = weight.shape
        self._across = triton.cdiv(self._outputs, tiling.outputs)
        self._most_programs = 1 << 31
        constants: dict[str, Any] = {"LIMBS": limbs, "SHIFT": dropped_bits, "BM": tiling.tokens}
        constants |= {"BN": tiling.outputs, "BK": tiling.inputs, "GROUP": tiling.group}
        options = {"num_warps": tiling.warps}
        if tiling.kernel is Kernel.ASYNC:
            self._kernel = async_kernel
            constants |= {"STAGES": tiling.stages, "num_warps": tiling.warps}
            self._most_programs = tiling.programs * _multiprocessors(weight.device)
        else:
            self._kernel = fused_kernel
            constants["BULK"] = tiling.kernel is Kernel.BULK
            options["num_stages"] = tiling.stages
        self._options = constants | options
        self._positions = tuple(constants[name] for name in self._kernel.arg_names[6:])
        self._descriptors: tuple[Any, Any] | None = None
        self._compiled: Any = None

    def __call__(self, digits: torch.Tensor, tokens: int) -> torch.Tensor:
        """uint8[2*T*N], the bytes of the uint16 answers [T, N], queued on the current stream.

        digits  bytes of int8[limbs, T, K], contiguous, at a multiple of ALIGNMENT, where the
                weight is: whatever their shape, for every view of them would cost a microsecond
        """
        if digits.numel() != self._limbs * tokens * self._inputs or digits.data_ptr() % ALIGNMENT:
            raise ValueError(f"takes aligned [{self._limbs}, {tokens}, {self._inputs}] digits")
        out = torch.empty(2 * tokens * self._outputs, dtype=torch.uint8, device=digits.device)
        programs = min(-(-tokens // self._tiling.tokens) * self._across, self._most_programs)
        sizes = (tokens, self._outputs, self._inputs)
        # One launch at a time: Triton compiles at the first, and promises nothing to several
        # threads; its interpreter keeps its state in its modules; descriptors are shared.
        with _ONE_LAUNCH, on_device(digits.device):
            if self._compiled is None:
                self._first(digits, out, sizes, programs)
            elif self._descriptors is None:
                self._compiled[(programs, 1, 1)](
                    digits, self._weight, out, *sizes, *self._positions
                )
            else:
                moved, weight = self._descriptors
                self._point(moved, digits, tokens)
                self._compiled[(programs, 1, 1)](moved, weight, out, *sizes, *self._positions)
                moved.base = self._weight  # the request's memory is not kept
        return out

    def _first(
        self, digits: torch.Tensor, out: torch.Tensor, sizes: tuple[int, int, int], programs: int
    ) -> None:
        """Launch with arguments of the types to compile for; the interpreter comes here always."""
        planes = digits.view(torch.int8).view(self._limbs, sizes[0], self._inputs)
        operands: tuple[Any, Any] = planes, self._weight
        if self._tiling.kernel is not Kernel.POINTERS:
            flat = self._tiling.kernel is Kernel.ASYNC
            describe = async_operands if flat else bulk_operands
            operands = describe(planes, self._weight, self._tiling)
        self._compiled = self._kernel[(programs,)](
            *operands, out.view(torch.int16), *sizes, **self._options
        )
        if self._compiled is not None and self._tiling.kernel is not Kernel.POINTERS:
            self._descriptors = operands

    def _point(self, descriptor: Any, digits: torch.Tensor, tokens: int) -> None:
        """Have a descriptor of planes describe another request's."""
        inputs = self._inputs
        descriptor.base = digits
        if self._tiling.kernel is Kernel.ASYNC:
            descriptor.shape, descriptor.strides = (self._limbs * tokens, inputs), (inputs, 1)
        else:
            descriptor.shape = (self._limbs, tokens, inputs)
            descriptor.strides = (tokens * inputs, inputs, 1)


def fused_product(
    planes: torch.Tensor, weight: torch.Tensor, dropped_bits: int, tiling: Tiling
) -> torch.Tensor:
    """One launch of a `Product`: int16[T, N] from planes int8[limbs, T, K], weight int8[N, K]."""
    limbs, tokens, _ = planes.shape
    product = Product(weight, limbs, dropped_bits, tiling)(planes, tokens)
    return product.view(torch.int16).view(tokens, len(weight))


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
