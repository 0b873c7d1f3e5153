"""How far the CPU kernels are from what the processor could do, in cycles of one core.

    python -m benchmarks.floors --json FILE

A cycle is a quarter of a 64-bit multiplication and an XOR that wait for each other, timed beside
each kernel. The floors are
counted from the operations of the algorithm for 256-bit vectors (AVX2), four a cycle of which two
multiply, as AMD's Zen 3 and 4 do; on other processors read them as a yardstick only.

  worker   a multiply-add of a 24-bit value and an int8 weight: two of 32 that vpmaddwd does a cycle
  fp32     the same in clear: one of 16 that two fused multiply-adds do
  ring     a row of a mask, rank 5: 8 x 128 butterflies of 15 operations, 256 x 5 products of 5, 256
           reductions of 12, eight lanes an operation
  seal     a value: scale, add 40 bits' error, reduce, round, cut into digits
  open     a value: round, subtract, centre, scale
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from numba import njit

from backends.he.epilogue import open_row, seal_row
from backends.he.matmul.choice import chosen_kernel
from backends.he.mlwe_owner import ERROR_BYTES
from backends.he.params import preset
from backends.he.ring import inverse_tables, mask_tile_kernel, secret_to_ntt
from backends.he.vector import LANES
from backends.machine import cpu_flags
from backends.options import TIMES, Parser
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel

FLOORS = {"worker": 2 / 32, "fp32": 1 / 16, "ring": 776.0, "seal": 2.0, "open": 1.0}
_PARAMETERS = preset("exact")
_TOKENS, _WIDTH = 192, 2048
_MASK_TILES = 64


@njit(nogil=True)
def _multiplications(count: int) -> Any:
    """`count` times a multiplication (three cycles) and an XOR (one) that wait for each other."""
    value = np.uint64(3)
    for _ in range(count):
        value = value * value ^ np.uint64(0x9E3779B97F4A7C15)
    return value


def _seconds(action: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def worker_and_clear() -> dict[str, tuple[Callable[[], Any], int]]:
    """(what to run, multiply-adds) of the worker's product and of the clear one."""
    generator = np.random.default_rng(0)
    planes = generator.integers(-128, 128, (3, _TOKENS, _WIDTH), np.int8)
    weight = generator.integers(-127, 128, (_WIDTH, _WIDTH), np.int8)
    kernel = chosen_kernel()
    packed = kernel.pack(weight, True)
    x, w = torch.randn(_TOKENS, _WIDTH), torch.randn(_WIDTH, _WIDTH)
    work = _TOKENS * _WIDTH * _WIDTH
    return {
        "worker": (lambda: kernel.answer(planes, packed, 8), work),
        "fp32": (lambda: torch.nn.functional.linear(x, w), work),
    }


def ring() -> tuple[Callable[[], Any], int]:
    """(what to run, rows of masks)."""
    generator = np.random.default_rng(1)
    mask = mask_tile_kernel(_PARAMETERS.rank)
    size = _MASK_TILES * _PARAMETERS.dimension * LANES
    half = _PARAMETERS.modulus // 2
    tiles = generator.integers(-half, half, size, np.int32)
    small = generator.integers(-1, 2, (_PARAMETERS.rank, _PARAMETERS.degree)).astype(np.int8)
    secret, out = secret_to_ntt(small).reshape(-1), np.empty(_PARAMETERS.degree * LANES, np.uint32)

    @njit(nogil=True)
    def rows(tiles: Any, secret: Any, out: Any, zeta: Any, shoup: Any) -> None:
        for tile in range(_MASK_TILES):
            mask(tiles, tile, secret, out, zeta, shoup)

    return (lambda: rows(tiles, secret, out, *inverse_tables())), _MASK_TILES * LANES


@njit(nogil=True)
def _seal_all(mask: Any, x: Any, scale: Any, noise: Any, planes: Any, tokens: int) -> None:
    width = len(mask)
    for t in range(tokens):
        seal_row(mask, 0, x, t * width, scale, 0, width, 1e3, noise, 0, 4 * width, planes,
                 tokens * width, 3)  # fmt: skip


@njit(nogil=True)
def _open_all(mask: Any, answer: Any, scale: Any, out: Any, tokens: int) -> None:
    width = len(mask)
    for t in range(tokens):
        open_row(mask, 0, answer, t * width, 1e-3, scale, 0, width, 8, 3, out)


def values() -> dict[str, tuple[Callable[[], Any], int]]:
    """(what to run, values) of sealing and of opening."""
    generator = np.random.default_rng(2)
    size = _TOKENS * _WIDTH
    x, scale = generator.standard_normal(size).astype(np.float32), np.ones(_WIDTH, np.float32)
    mask = generator.integers(0, _PARAMETERS.modulus, _WIDTH).astype(np.uint32)
    noise = generator.integers(0, 256, ERROR_BYTES * _WIDTH, np.uint8)
    planes, out = np.empty(3 * size, np.int8), np.empty(size, np.float32)
    answer = generator.integers(0, 1 << 16, size).astype(np.uint16)

    return {
        "seal": (lambda: _seal_all(mask, x, scale, noise, planes, _TOKENS), size),
        "open": (lambda: _open_all(mask, answer, scale, out, _TOKENS), size),
    }


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Cycles of each kernel, its floor, and their ratio; medians."""
    kernels = worker_and_clear() | {"ring": ring()} | values()
    chain = 1_000_000
    cycles: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(rounds + 2):
        for name, (action, units) in kernels.items():
            hertz = 4 * chain / _seconds(lambda: _multiplications(chain))
            cores = torch.get_num_threads() if name in ("worker", "fp32") else 1
            spent = _seconds(action) * hertz * cores / units
            if turn >= 2:  # the first rounds compile
                cycles[name].append(spent)
    found = {name: median(each) for name, each in cycles.items()}
    return {
        name: {"cycles": spent, "floor": FLOORS[name], "over_floor": spent / FLOORS[name]}
        for name, spent in found.items()
    }


def main() -> None:
    parser = Parser(__doc__, "benchmarks.floors")
    parser.add_argument("--rounds", type=TIMES, default=31, help="rounds (31)")
    add_kernel_option(parser)
    record.add_json_option(parser)
    args = parser.parse()
    with clean_exit():
        kernel = use_kernel(args.kernel)
        found = measure(args.rounds)
    for name, figures in found.items():
        print(f"{name:<8} {figures['cycles']:9.4g} cycles, floor {figures['floor']:8.4g}: "
              f"{figures['over_floor']:.2f} x")  # fmt: skip
    record.write(args.json, {"kernel": kernel.name, "cpu_flags": cpu_flags(), "kernels": found})


if __name__ == "__main__":
    main()
