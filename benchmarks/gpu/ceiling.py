"""What the int8 tensor cores do alone: a loop of nothing but products, whose operands never move.

The ceiling that the worker's kernels are set against, so it shares no code with them and needs
torch and Triton only. A program fetches one tile of each operand, multiplies them again and again
into the same accumulators, and writes those once at the end, so that the work can be checked. On
Hopper these are `wgmma`, in Gluon, with operands in shared memory, as the instruction wants them;
elsewhere `mma.sync`, with operands in registers, which is the fastest there is up to Ada and on
consumer Blackwell (data-centre Blackwell has a faster one that nothing here uses).

Random operands that stay the same draw less power than new ones: it is a ceiling, not an aim.
Compiled by a test, which looks at the loop. `wgmma` has run on an H100 (1,958 TOP/s in the fastest
round), `mma.sync` on no GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benchmarks.gpu.task import Figures, Task
from benchmarks.gpu.timing import device_ms

_HOPPER = (9, 0)
_PROGRAMS = 4  # for each multiprocessor: how many of them fit one does not matter then
_REPEATS = 3


@dataclass(frozen=True)
class Probe:
    """The tile of one program.

    rows, columns  of results
    depth          of one step of the loop
    warps          of 32 threads
    """

    rows: int
    columns: int
    depth: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """What its kernel is compiled for."""
        return {"M": self.rows, "N": self.columns, "K": self.depth}


WGMMA = Probe(128, 256, 128, 8)
MMA = Probe(128, 128, 64, 8)


@gluon.jit  # type: ignore[untyped-decorator]
def _operands(  # type: ignore[no-untyped-def]
    a, b, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, num_warps: gl.constexpr
):
    """a int8[M, K] and b int8[N, K], in registers."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // K, K // 16], [num_warps, 1], [1, 0])
    depth = gl.arange(0, K, gl.SliceLayout(0, LOAD))[None, :]
    rows = gl.arange(0, M, gl.SliceLayout(1, LOAD))[:, None]
    columns = gl.arange(0, N, gl.SliceLayout(1, LOAD))[:, None]
    return gl.load(a + rows * K + depth), gl.load(b + columns * K + depth)


@gluon.jit  # type: ignore[untyped-decorator]
def _store(out, acc, M: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr):  # type: ignore[no-untyped-def]
    """This program's part of out int32[programs, M, N]."""
    rows = gl.arange(0, M, gl.SliceLayout(1, MMA))[:, None]
    columns = gl.arange(0, N, gl.SliceLayout(0, MMA))[None, :]
    gl.store(out + gl.program_id(0) * (M * N) + rows * N + columns, acc)


@gluon.jit  # type: ignore[untyped-decorator]
def mma_kernel(  # type: ignore[no-untyped-def]
    a, b, out, steps, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, num_warps: gl.constexpr
):
    """steps * a int8[M, K] x b int8[N, K], transposed, -> out int32[programs, M, N]."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps // 2, 2], [16, 8])
    x, y = _operands(a, b, M, N, K, num_warps)
    left = gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 4))
    right = gl.convert_layout(y.permute((1, 0)), gl.DotOperandLayout(1, MMA, 4))
    acc = gl.zeros((M, N), gl.int32, MMA)
    for _ in range(steps):
        acc = mma_v2(left, right, acc)
    _store(out, acc, M, N, MMA)


@gluon.jit  # type: ignore[untyped-decorator]
def wgmma_kernel(  # type: ignore[no-untyped-def]
    a, b, out, steps, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, num_warps: gl.constexpr
):
    """As `mma_kernel`; one step's products are under way while the next one's are issued."""
    # Of a tile's powers of two, 128 columns are the most that Triton's int8 instruction takes.
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 128, 32])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(K, element_bitwidth=8, rank=2)
    x, y = _operands(a, b, M, N, K, num_warps)
    left = gl.allocate_shared_memory(gl.int8, [M, K], SHARED, x)
    right = gl.allocate_shared_memory(gl.int8, [N, K], SHARED, y).permute((1, 0))
    fence_async_shared()
    # The first product waits until all threads have written the operands: none in the loop does.
    acc = warpgroup_mma(left, right, gl.zeros((M, N), gl.int32, MMA))
    for _ in range(steps - 1):
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    _store(out, warpgroup_mma_wait(0, deps=[acc]), M, N, MMA)


def multiply(probe: Probe, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, steps: int) -> None:
    """Each program's out int32[M, N] = steps * a int8[M, K] x b int8[N, K], transposed."""
    kernel = wgmma_kernel if probe is WGMMA else mma_kernel
    kernel[(len(out),)](a, b, out, steps, **probe.constants, num_warps=probe.warps)


def ceiling(task: Task) -> Figures:
    """int8 operations a second of the tensor cores alone, two for each multiply-add.

    The fastest round counts. Raises ArithmeticError when a program's results are wrong.
    """
    gpu, steps = task.gpu, task.scale.probe_steps
    probe = WGMMA if gpu.capability == _HOPPER else MMA
    a, b = (
        torch.randint(-127, 128, (size, probe.depth), dtype=torch.int8, device=gpu.device)
        for size in (probe.rows, probe.columns)
    )
    shape = (_PROGRAMS * gpu.multiprocessors, probe.rows, probe.columns)
    out = torch.zeros(shape, dtype=torch.int32, device=gpu.device)
    multiply(probe, a, b, out, steps)
    # Random operands: 17 standard deviations of a sum fit int32.
    if not torch.equal(out, (steps * (a.double() @ b.double().T)).int().expand(shape)):
        raise ArithmeticError("the tensor cores' sums are wrong: what ran is not what is counted")
    times = [
        device_ms(gpu, lambda: multiply(probe, a, b, out, steps), _REPEATS)
        for _ in range(task.scale.rounds)
    ]
    operations = 2 * steps * out.numel() * probe.depth
    return {
        "instruction": "wgmma" if probe is WGMMA else "mma.sync",
        "int8_ops_per_s": operations / min(times) * 1e3,
        "median_int8_ops_per_s": operations / median(times) * 1e3,
    }
