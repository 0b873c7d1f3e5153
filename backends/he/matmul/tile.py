"""One tile of a product in registers, written as LLVM vectors for numba.

A tile is `rows` rows of a request times the outputs of one panel. Its sums stay in registers over a
slice of inputs, and in the nearest cache between slices. At the end all digits of a token are
recombined, rounded and stored as 16 bits; or the 32-bit sums are stored.

Packed operands, as `tiled.py` makes them:

  request  uint32[steps][rows]: the words of a step beside each other; each is broadcast
  panel    int8[steps][outputs][step]: a step's weights, two or more registers of them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backends.he.matmul.isa import I8, I16, I32, InstructionSet

_AHEAD, _LINE = 8192, 64
"""Bytes: how far ahead weights are asked for, and what the memory gives at once. Products of 1 to
16 tokens with 4,096 by 16,384 weights, more than a cache holds, take 0.4 to 0.8 of the time so."""


class Emit:
    """The few operations a tile is made of."""

    def __init__(
        self, isa: InstructionSet, context: Any, builder: ir.IRBuilder, widened: bool = False
    ) -> None:
        self.isa = isa
        self.widened = widened
        self.context = context
        self.b = builder
        if isa.attribute:
            # llvmlite's own `add` takes attributes of LLVM's list only, not those with a value.
            attributes = builder.function.attributes
            set.add(attributes, f'"target-features"="{isa.attribute}"')

    def pointer(self, array_type: Any, array: Any, index: Any) -> Any:
        """The address of a flat array's element."""
        base = self.context.make_array(array_type)(self.context, self.b, array).data
        return self.b.gep(base, [index])

    def broadcast(self, value: Any) -> Any:
        """A register with a word in every lane."""
        undefined = ir.Constant(self.isa.vector, ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.isa.lanes), [0] * self.isa.lanes)
        return self.b.shuffle_vector(first, undefined, zeros)

    def load(self, pointer: Any, kind: Any, index: Any, count: int) -> list[Any]:
        """`count` vectors of type `kind` in a row, the first one at place `index`."""
        base = self.b.bitcast(pointer, kind.as_pointer())
        places = [self.b.add(index, ir.Constant(index.type, i)) for i in range(count)]
        return [self.b.load(self.b.gep(base, [place]), align=1) for place in places]

    def weights(self, panel: Any, step: Any) -> list[Any]:
        """A step's weights, as wide as the digits: registers of 32-bit lanes."""
        isa = self.isa
        halves = ir.VectorType(I16, isa.lanes * isa.step)
        stored = halves if self.widened else ir.VectorType(I8, isa.lanes * isa.step)
        first = self.b.mul(step, ir.Constant(step.type, isa.registers))
        loaded = self.load(panel, stored, first, isa.registers)
        if isa.digit_bytes == 2 and not self.widened:
            loaded = [self.b.sext(vector, halves) for vector in loaded]
        return [self.b.bitcast(vector, isa.vector) for vector in loaded]

    def prefetch(self, panel: Any, step: Any) -> None:
        """Ask the memory for the weights of a later step.

        A product of few rows is done with a step before the next one's weights have come, and what
        the processor foresees by itself is not far enough. Harmless past the end of a panel.
        """
        size, index = self.isa.width * self.isa.step, step.type
        base = self.b.bitcast(panel, I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        ask = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        begin = self.b.add(self.b.mul(step, ir.Constant(index, size)), ir.Constant(index, _AHEAD))
        reading, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        for line in range(0, size, _LINE):
            at = self.b.gep(base, [self.b.add(begin, ir.Constant(index, line))])
            self.b.call(ask, [at, reading, keep, data])

    def products(self, sums: list[list[Any]], operand: Any, panel: Any, steps: Any) -> list[Any]:
        """`sums`, a list of registers a row, plus the products of rows and panel over `steps`."""
        b, index = self.b, steps.type
        entry, loop = b.block, b.append_basic_block("steps")
        done = b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        step = b.phi(index)
        step.add_incoming(ir.Constant(index, 0), entry)
        totals = []
        for registers in sums:
            phis = [b.phi(self.isa.vector) for _ in registers]
            for phi, register in zip(phis, registers, strict=True):
                phi.add_incoming(register, entry)
            totals.append(phis)
        weights = self.weights(panel, step)
        if not self.widened:  # those are in the nearest cache
            self.prefetch(panel, step)
        first = b.mul(step, ir.Constant(index, len(sums)))
        for row, phis in enumerate(totals):
            word = b.load(b.gep(operand, [b.add(first, ir.Constant(index, row))]))
            words = self.broadcast(word)
            for phi, weight in zip(phis, weights, strict=True):
                phi.add_incoming(self.isa.dot(b, phi, words, weight), loop)
        following = b.add(step, ir.Constant(index, 1))
        step.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, steps), loop, done)
        b.position_at_end(done)
        return [[phi.incomings[1][0] for phi in phis] for phis in totals]

    def add_products(self, rows: int, operand: Any, panel: Any, steps: Any, target: Any) -> None:
        """Add the products of `rows` rows and a panel to the sums at `target`, registers by row."""
        each, index = self.isa.registers, steps.type
        before = self.load(target, self.isa.vector, ir.Constant(index, 0), rows * each)
        after = self.products(
            [before[row * each : (row + 1) * each] for row in range(rows)], operand, panel, steps
        )
        base = self.b.bitcast(target, self.isa.vector.as_pointer())
        for i, value in enumerate(value for row in after for value in row):
            self.b.store(value, self.b.gep(base, [ir.Constant(index, i)]), align=4)

    def recombined(self, digits: list[Any], offset: Any) -> Any:
        """sum_d 2^(8 * digit_bytes * d) * digits[d] + offset."""
        total = offset
        for place, digit in enumerate(digits):
            shift = 8 * self.isa.digit_bytes * place
            shifts = ir.Constant(self.isa.vector, [shift] * self.isa.lanes)
            total = self.b.add(total, self.b.shl(digit, shifts))
        return total

    def rounded(self, total: Any, shift: Any, mask: Any) -> Any:
        """(total >> shift) & mask as 16-bit lanes."""
        kept = self.b.and_(self.b.lshr(total, shift), mask)
        return self.b.trunc(kept, ir.VectorType(I16, self.isa.lanes))


def tile(isa: InstructionSet, rows: int, widened: bool) -> Callable[..., None]:
    """The intrinsic that adds a tile's products over some steps to its sums.

    It takes (operand, at_operand, panel, at_panel, steps, sums, at_sums), all arrays flat, and adds
    to sums uint32[rows][outputs of a panel]. With `widened` the panel's weights are int16 already.
    """

    @intrinsic
    def one_tile(
        _context: Any, operand: Any, at_operand: Any, panel: Any, at_panel: Any, steps: Any,
        sums: Any, at_sums: Any,
    ) -> Any:  # fmt: skip
        place = types.intp
        signature = types.void(operand, place, panel, place, place, sums, place)

        def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            e = Emit(isa, context, builder, widened)
            words = e.pointer(sig.args[0], args[0], args[1])
            weights = e.pointer(sig.args[2], args[2], args[3])
            target = e.pointer(sig.args[5], args[5], args[6])
            e.add_products(rows, words, weights, args[4], target)
            return context.get_dummy_value()

        return signature, build

    return one_tile


def finish(isa: InstructionSet, digits: int, tokens: int, rounded: bool) -> Callable[..., None]:
    """The intrinsic that stores the results of a tile of `tokens` tokens with `digits` rows each.

    It takes (sums, at_sums, offsets, at_offset, rounding, out, at_out, stride), arrays flat, and
    stores out[at_out + t*stride + lane]: with `rounded` the 16 bits
    ((total + offset) >> rounding[0]) & rounding[1], else the 32 bits total + offset.
    """

    @intrinsic
    def store_tile(
        _context: Any, sums: Any, at_sums: Any, offsets: Any, at_offset: Any, rounding: Any,
        out: Any, at_out: Any, stride: Any,
    ) -> Any:  # fmt: skip
        place = types.intp
        signature = types.void(sums, place, offsets, place, rounding, out, place, place)

        def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            e = Emit(isa, context, builder)
            index = args[1].type
            zero = ir.Constant(index, 0)
            first = e.pointer(sig.args[2], args[2], args[3])
            added = e.load(first, isa.vector, zero, isa.registers)
            source = e.pointer(sig.args[0], args[0], args[1])
            totals = e.load(source, isa.vector, zero, digits * tokens * isa.registers)
            shift, mask = (
                e.broadcast(builder.load(e.pointer(sig.args[4], args[4], ir.Constant(index, i))))
                for i in range(2)
            )
            for token in range(tokens):
                begin = builder.add(args[6], builder.mul(args[7], ir.Constant(index, token)))
                for part in range(isa.registers):
                    rows = range(token * digits, (token + 1) * digits)
                    registers = [totals[row * isa.registers + part] for row in rows]
                    value = e.recombined(registers, added[part])
                    if rounded:
                        value = e.rounded(value, shift, mask)
                    lane = builder.add(begin, ir.Constant(index, part * isa.lanes))
                    where = e.pointer(sig.args[5], args[5], lane)
                    builder.store(value, builder.bitcast(where, value.type.as_pointer()), align=2)
            return context.get_dummy_value()

        return signature, build

    return store_tile


def widen(isa: InstructionSet) -> Callable[..., None]:
    """The intrinsic `widen(panel, at, step, out)`: a step's weights, sign-extended to 16 bits.

    They go to the same step of out int16[steps][outputs][step].
    """

    @intrinsic
    def widen_step(_context: Any, panel: Any, at: Any, step: Any, out: Any) -> Any:
        signature = types.void(panel, types.intp, types.intp, out)

        def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            e = Emit(isa, context, builder)
            zero = ir.Constant(args[1].type, 0)
            weights = e.weights(e.pointer(sig.args[0], args[0], args[1]), args[2])
            target = e.pointer(sig.args[3], args[3], zero)
            base = builder.bitcast(target, isa.vector.as_pointer())
            first = builder.mul(args[2], ir.Constant(args[2].type, isa.registers))
            for i, register in enumerate(weights):
                place = builder.add(first, ir.Constant(first.type, i))
                builder.store(register, builder.gep(base, [place]), align=2)
            return context.get_dummy_value()

        return signature, build

    return widen_step


def transpose(isa: InstructionSet, rows: int) -> Callable[..., None]:
    """The intrinsic that packs four steps of `rows` rows (at most four) of words.

    It takes (words, sources, operand, at, stride) and stores
    operand[at + s*stride + i] = words[sources[i] + s] ^ flip for i < rows, s < 4.
    """
    four = ir.VectorType(I32, 4)

    @intrinsic
    def four_steps(
        _context: Any, words: Any, sources: Any, operand: Any, at: Any, stride: Any
    ) -> Any:
        signature = types.void(
            words, types.UniTuple(types.intp, rows), operand, types.intp, types.intp
        )

        def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            e = Emit(isa, context, builder)

            def load(i: int) -> Any:
                source = e.pointer(sig.args[0], args[0], builder.extract_value(args[1], i))
                word = builder.load(builder.bitcast(source, four.as_pointer()), align=4)
                return builder.xor(word, ir.Constant(four, [isa.flip] * 4))

            def join(x: Any, y: Any, lanes: list[int]) -> Any:
                return builder.shuffle_vector(
                    x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
                )

            def store(value: Any, step: int) -> None:
                where = builder.add(args[3], builder.mul(args[4], ir.Constant(args[4].type, step)))
                target = e.pointer(sig.args[2], args[2], where)
                builder.store(value, builder.bitcast(target, value.type.as_pointer()), align=4)

            loaded = [load(i) for i in range(rows)]
            for half, lanes in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                pairs = [join(loaded[i], loaded[i + 1], lanes) for i in range(0, rows, 2)]
                for odd in range(2):
                    step = 2 * half + odd
                    if rows == 2:
                        store(join(pairs[0], pairs[0], [2 * odd, 2 * odd + 1]), step)
                    else:
                        at = [2 * odd, 2 * odd + 1, 4 + 2 * odd, 5 + 2 * odd]
                        store(join(pairs[0], pairs[1], at), step)
            return context.get_dummy_value()

        return signature, build

    return four_steps
