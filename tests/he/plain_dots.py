"""Instruction sets with their one multiplying step spelled out, so that any processor runs them.

What is left of a kernel is all of it but one instruction: packing, layout, loops, compensation.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from llvmlite import ir

from backends.he.matmul.isa import I8, I32, InstructionSet
from backends.he.matmul.tile import Emit


def plain(isa: InstructionSet) -> InstructionSet:
    """`isa` with a `dot` of plain integer arithmetic, in a function of its own."""

    def dot(b: ir.IRBuilder, sums: Any, words: Any, weights: Any) -> Any:
        function = _function(b.module, isa, sums.type)
        return b.call(function, [sums, words, weights])

    # Kernels are cached under this name, and the text of this file is part of their meaning.
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return replace(isa, name=f"{isa.name}-plain-{digest}", dot=dot, attribute="")


def _function(module: ir.Module, isa: InstructionSet, vector: ir.VectorType) -> Any:
    name = f"plain_dot_{isa.name}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(vector, [vector] * 3), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    sums, words, weights = function.args
    total = sums
    bits = 8 * isa.digit_bytes
    for digit in range(isa.step):
        up = ir.Constant(vector, [32 - bits * (digit + 1)] * vector.count)
        down = ir.Constant(vector, [32 - bits] * vector.count)
        # Signed weights; digits are unsigned where the instruction takes them so.
        left = b.shl(words, up)
        value = b.lshr(left, down) if isa.flip else b.ashr(left, down)
        total = b.add(total, b.mul(value, b.ashr(b.shl(weights, up), down)))
    b.ret(total)
    return function


def tile_module(isa: InstructionSet, rows: int) -> ir.Module:
    """A module with nothing but `tile(operand, panel, steps, sums)`, as the kernels emit it."""
    module = ir.Module("tile")
    index = ir.IntType(64)
    kinds = [I32.as_pointer(), I8.as_pointer(), index, I32.as_pointer()]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    operand, panel, steps, sums = function.args
    Emit(isa, None, builder).add_products(rows, operand, panel, steps, sums)
    builder.ret_void()
    return module
