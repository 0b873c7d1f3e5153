"""The instruction sets that the tiled kernel is written for, and their one multiplying step.

A kernel multiplies *words*. A word is 32 bits of one row of a request: four 8-bit digits, or two
16-bit digits, of as many consecutive inputs. The step `dot` multiplies the digits of a word by the
int8 weights of the same inputs, sums the products and adds them to a 32-bit lane of an accumulator,
one lane an output. Everything wraps at 2^32.

| name       | instruction        | digit | a cycle and core | found in                           |
| ---------- | ------------------ | ----- | ---------------- | ---------------------------------- |
| avx512vnni | vpdpbusd, 512 bits | 8     | 64               | Intel Ice Lake, AMD Zen 4 and later |
| avxvnni    | vpdpbusd, 256 bits | 8     | 64               | Intel Alder Lake, AMD Zen 5         |
| avx2       | vpmaddwd + vpaddd  | 16    | 32               | any x86 since about 2013           |
| neon       | sdot               | 8     | 64 to 128        | Apple M1, Graviton 2 and later     |

"A cycle and core" are multiply-adds; fp32 with AVX2 does 16. A value of 24 bits has three 8-bit
digits or two of 16 bits, so a private multiply-add takes 3/64 or 2/32 cycles, one in fp32 1/16; a
value of 16 bits has two digits or one, and takes 2/64 or 1/32.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba import config

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

Dot = Callable[[ir.IRBuilder, Any, Any, Any], Any]
"""(builder, sums, words, weights) -> sums, all vectors of 32-bit lanes."""


@dataclass(frozen=True)
class InstructionSet:
    """What a tile needs to know of a processor.

    features      LLVM's names of what the processor must have
    attribute     LLVM's features of a function that uses it, where those of the processor that
                  numba compiles for may not name them
    lanes         32-bit lanes of a register
    registers     registers of outputs in a tile: a panel holds lanes * registers outputs
    rows          rows (token, digit) of a tile; its rows * registers accumulators, the weights and
                  the broadcasts just fit the register file
    digit_bytes   1 or 2: how a request is cut
    slice_steps   steps of a slice of inputs whose weights and words stay in the L1
    flip          XORed to every word: 0x80808080 where the instruction wants unsigned digits, which
                  adds 128 to each; `tiled.py` takes that off again
    """

    name: str
    architecture: str
    features: tuple[str, ...]
    lanes: int
    registers: int
    rows: int
    digit_bytes: int
    slice_steps: int
    flip: int
    dot: Dot
    attribute: str = ""

    @property
    def width(self) -> int:
        """Outputs of a panel."""
        return self.lanes * self.registers

    @property
    def step(self) -> int:
        """Inputs of a word."""
        return 4 // self.digit_bytes

    @property
    def vector(self) -> ir.VectorType:
        """A register of 32-bit lanes."""
        return ir.VectorType(I32, self.lanes)

    def digits(self, limbs: int) -> int:
        """Digits, hence rows, that a token of `limbs` int8 limbs has."""
        return limbs if self.digit_bytes == 1 else -(-limbs // 2)

    def supported(self) -> bool:
        """Whether this processor has it, and numba generates code for this very processor."""
        if platform.machine().lower() not in _ALIASES[self.architecture]:
            return False
        if self.architecture == "aarch64":
            return _has_dot_products()
        if config.CPU_NAME not in (None, "", binding.get_host_cpu_name()):
            return False
        if config.CPU_FEATURES is not None:  # "" too: numba then compiles for none at all
            return False
        try:
            features = binding.get_host_cpu_features()
        except RuntimeError:
            return False
        return all(features.get(name, False) for name in self.features)


_ALIASES = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}
_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20  # Linux: asm/hwcap.h


def _has_dot_products() -> bool:
    """Whether this Arm processor has `sdot`: LLVM does not say so (22.1: never on Linux)."""
    if platform.system() == "Darwin":
        return True  # every Mac with an Arm processor
    try:
        capabilities = ctypes.CDLL(None).getauxval(_AT_HWCAP)
    except (OSError, AttributeError):
        return False
    return bool(capabilities & _HWCAP_ASIMDDP)


def _vpdpbusd(name: str) -> Dot:
    # LLVM before 22 wants vectors of 32-bit lanes; later ones read the declaration as bytes.
    def dot(b: ir.IRBuilder, sums: Any, words: Any, weights: Any) -> Any:
        kind = ir.FunctionType(sums.type, [sums.type] * 3)
        return b.call(b.module.declare_intrinsic(name, (), kind), [sums, words, weights])

    return dot


def _vpmaddwd(b: ir.IRBuilder, sums: Any, words: Any, weights: Any) -> Any:
    halves = ir.VectorType(I16, 2 * sums.type.count)
    kind = ir.FunctionType(sums.type, [halves, halves])
    multiply = b.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), kind)
    return b.add(sums, b.call(multiply, [b.bitcast(words, halves), b.bitcast(weights, halves)]))


def _sdot(b: ir.IRBuilder, sums: Any, words: Any, weights: Any) -> Any:
    quarters = ir.VectorType(I8, 4 * sums.type.count)
    kind = ir.FunctionType(sums.type, [sums.type, quarters, quarters])
    multiply = b.module.declare_intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", (), kind)
    return b.call(multiply, [sums, b.bitcast(weights, quarters), b.bitcast(words, quarters)])


AVX512_VNNI = InstructionSet(
    "avx512vnni", "x86_64", ("avx512f", "avx512bw", "avx512vnni"),
    lanes=16, registers=2, rows=12, digit_bytes=1, slice_steps=1 << 20, flip=0x80808080,
    dot=_vpdpbusd("llvm.x86.avx512.vpdpbusd.512"),
)  # fmt: skip
AVX_VNNI = InstructionSet(
    "avxvnni", "x86_64", ("avx2", "avxvnni"),
    lanes=8, registers=2, rows=6, digit_bytes=1, slice_steps=1 << 20, flip=0x80808080,
    dot=_vpdpbusd("llvm.x86.avx512.vpdpbusd.256"),
)  # fmt: skip
AVX2 = InstructionSet(
    "avx2",
    "x86_64",
    ("avx2",),
    lanes=8,
    registers=2,
    rows=6,
    digit_bytes=2,
    slice_steps=256,
    flip=0,
    dot=_vpmaddwd,
)
NEON = InstructionSet(
    "neon", "aarch64", ("neon", "dotprod"), lanes=4, registers=4, rows=6, digit_bytes=1,
    slice_steps=1 << 20, flip=0, dot=_sdot, attribute="+neon,+dotprod",
)  # fmt: skip

ALL = (AVX512_VNNI, AVX_VNNI, AVX2, NEON)
"""Fastest first."""
