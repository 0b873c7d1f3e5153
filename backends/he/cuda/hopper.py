"""The worker's product for Hopper, with tensor cores that never wait for their own results.

Triton keeps an int8 product's accumulator synchronous: every step of its loop waits for the
tensor cores to drain. Written in Gluon, Triton's lower level, one step's products stay under way
while the next is issued, and a program that has finished a tile already has the next one's data
on its way while it stores results. What is computed is `gemm.py`'s, bit for bit.

Gluon has no interpreter: without a GPU this file is compiled, and its schedule run on a model of
the machine, by tests. On a GPU the tuner uses it only where it gives the library's bits. On an H100
it is the tuner's choice for every shape of Llama-3.2-1B in requests of 2,048 tokens, and does 70 to
78 % of what the tensor cores do alone with 4,096.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from backends.he.cuda.tiling import Tiling


def operand_layout(tiling: Tiling) -> Any:
    """How a tile of either operand lies in shared memory: swizzled, as the tensor cores want it."""
    return gl.NVMMASharedLayout(min(tiling.inputs, 128), element_bitwidth=8, rank=2)


def async_operands(planes: torch.Tensor, weight: torch.Tensor, tiling: Tiling) -> tuple[Any, Any]:
    """What the bulk copy engine is told of planes int8[limbs, T, K] and weight int8[N, K]."""
    rows, layout = planes.reshape(-1, planes.shape[-1]), operand_layout(tiling)
    return (
        TensorDescriptor.from_tensor(rows, [tiling.tokens, tiling.inputs], layout),
        TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.inputs], layout),
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _origin(  # type: ignore[no-untyped-def]
    tile, tokens, outputs, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr
):
    """First token and first output of a tile; GROUP tiles of tokens run side by side."""
    token_tiles = gl.cdiv(tokens, BM)
    output_tiles = gl.cdiv(outputs, BN)
    first_tile = tile // (GROUP * output_tiles) * GROUP
    height = gl.maximum(gl.minimum(token_tiles - first_tile, GROUP), 1)  # past the last tile too
    place = tile % (GROUP * output_tiles)
    return (first_tile + place % height) * BM, place // height * BN


@gluon.jit  # type: ignore[untyped-decorator]
def _fetch(  # type: ignore[no-untyped-def]
    planes, weight, a, b, ready, step, steps, tokens, outputs, tiles,
    LIMBS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of this program's step number `step`, if it has so many."""
    tile = gl.program_id(0) + step // steps * gl.num_programs(0)
    there = tile < tiles
    token, output = _origin(tile, tokens, outputs, BM, BN, GROUP)
    k = step % steps * BK
    stage = step % STAGES
    barrier = ready.index(stage)
    mbarrier.expect(barrier, (LIMBS * BM + BN) * BK, pred=there)
    tma.async_copy_global_to_shared(weight, [output, k], barrier, b.index(stage), pred=there)
    for limb in gl.static_range(LIMBS):
        # Rows past the last token are the next limb's; they are multiplied and never stored.
        tma.async_copy_global_to_shared(
            planes, [limb * tokens + token, k], barrier, a.index(stage * LIMBS + limb), pred=there
        )


@gluon.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def async_kernel(  # type: ignore[no-untyped-def]
    planes, weight, out, tokens, outputs, inputs,
    LIMBS: gl.constexpr, SHIFT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """planes int8[LIMBS*tokens, inputs] x weight int8[outputs, inputs] -> out [tokens, outputs].

    Both operands are tensor descriptors. As many programs run as fit the device; each goes
    through its tiles, and through `inputs` for each, in one ring of STAGES buffers.
    """
    # A warp group takes 64 rows of the tile, or shares them by columns where there are only 64.
    ROWS: gl.constexpr = 4 * (BM // 64)
    COLUMNS: gl.constexpr = num_warps // ROWS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS, COLUMNS], [16, BN // COLUMNS, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    a = gl.allocate_shared_memory(gl.int8, [STAGES * LIMBS, BM, BK], planes.layout)
    b = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    fence_async_shared()

    steps = gl.cdiv(inputs, BK)
    tiles = gl.cdiv(tokens, BM) * gl.cdiv(outputs, BN)
    for ahead in gl.static_range(STAGES - 1):
        _fetch(
            planes, weight, a, b, ready, ahead, steps, tokens, outputs, tiles,
            LIMBS, BM, BN, BK, GROUP, STAGES,
        )  # fmt: skip

    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc0 = gl.zeros((BM, BN), gl.int32, MMA)
        acc1 = gl.zeros((BM, BN), gl.int32, MMA)
        acc2 = gl.zeros((BM, BN), gl.int32, MMA)
        for _ in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            w = b.index(stage).permute((1, 0))
            acc0 = warpgroup_mma(a.index(stage * LIMBS), w, acc0, is_async=True)
            acc1 = warpgroup_mma(a.index(stage * LIMBS + 1), w, acc1, is_async=True)
            if LIMBS == 3:
                acc2 = warpgroup_mma(a.index(stage * LIMBS + 2), w, acc2, is_async=True)
                acc0, acc1, acc2 = warpgroup_mma_wait(LIMBS, deps=[acc0, acc1, acc2])
            else:
                acc0, acc1 = warpgroup_mma_wait(LIMBS, deps=[acc0, acc1])
            # Only this step's products are under way, so the buffers of the last one are free.
            _fetch(
                planes, weight, a, b, ready, step + STAGES - 1, steps, tokens, outputs, tiles,
                LIMBS, BM, BN, BK, GROUP, STAGES,
            )  # fmt: skip
            step += 1
        if LIMBS == 3:
            acc0, acc1, acc2 = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2])
        else:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])

        y = acc0 + (acc1 << 8) + ((1 << SHIFT) >> 1)
        if LIMBS == 3:
            y += acc2 << 16
        y = (y >> SHIFT) & ((1 << (8 * LIMBS - SHIFT)) - 1)
        values = gl.convert_layout(y.to(gl.int16), STORE)
        token, output = _origin(tile, tokens, outputs, BM, BN, GROUP)
        rows = token + gl.arange(0, BM, gl.SliceLayout(1, STORE))
        columns = output + gl.arange(0, BN, gl.SliceLayout(0, STORE))
        target = out + rows.to(gl.int64)[:, None] * outputs + columns[None, :]
        gl.store(target, values, mask=(rows[:, None] < tokens) & (columns[None, :] < outputs))
