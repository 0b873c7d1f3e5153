"""The worker's product as one fused AVX-512 VNNI kernel, written as LLVM vectors for numba.

    answer[t, j] = ((sum_l 256^l sum_k planes[l, t, k] * M[k, j] + 2^(delta-1)) >> delta) & mask

vpdpbusd multiplies unsigned by signed bytes, so a digit d is fed in as d + 128 (one XOR) and

    compensation[j] = 128 * sum_l 256^l * sum_k M[k, j]   (mod 2^32)

is taken off again. It depends on the weight only and is made when the weight is packed, for three
limbs: with two, p = 2^16 divides what the third adds. All sums
are taken mod 2^32 and p divides 2^32, so nothing can overflow, whatever the number of inputs.

Layout. A weight is packed once per direction, into as many bytes as it has, as panels of 32
outputs: int8[panels][ceil(inputs/4)][32][4], zero where ragged, so that a step of four inputs is
two aligned registers and a product reads a panel from front to back. A request is packed on
every call as uint32[blocks][ceil(inputs/4)][rows], rows = 12 (token, limb) pairs: a word is the
four digits of one step, and the kernel broadcasts it.

A tile is 12 rows x 32 outputs: 24 accumulators, 2 weight registers and the broadcasts just fit
in 32 registers, and 24 multiplications need 14 loads. All limbs of an output lie in one tile,
so they are recombined, rounded and stored as 16 bits without an int32 reaching memory.

With many tokens each core takes a range of blocks and packs its own, a few at a time, so that
they stay in its L2 while the panels pass by once for each few; with few tokens each core takes
a range of panels and packs all blocks itself. Either way the cores meet only at the end.

Floor: limbs * tokens * inputs * outputs / 64 cycles on one core (vpdpbusd on 512 bits: 64
multiply-adds, one a cycle). With one token, reading the weight bytes once bounds the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from backends.threads import core_count, run_split

WIDTH = 32
"""Outputs of one panel: two registers of sixteen 32-bit lanes."""

_LANES = 16
_STEP = 4  # inputs of one multiply-add
_ROWS = 12  # (token, limb) pairs of one tile
_FLIP = 0x80808080  # adds 128 to each of four digits
_BLOCKS_A_CORE = 8  # fewer would read the weight too often: then split over the outputs
_CHUNK_BYTES = 1 << 19  # packed request a core works on: about half an L2
_ALIGNMENT = 64
_NEEDED = ("avx512f", "avx512bw", "avx512vnni")

_I32 = ir.IntType(32)
_V16 = ir.VectorType(_I32, _LANES)
_V4 = ir.VectorType(_I32, 4)
_HALVES = ir.VectorType(ir.IntType(16), _LANES)
_ZERO = ir.Constant(_V16, [0] * _LANES)


def supported() -> bool:
    """Whether this machine has AVX-512 VNNI and numba generates code for this very machine."""
    if config.CPU_NAME not in (None, "", binding.get_host_cpu_name()) or config.CPU_FEATURES:
        return False
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:
        return False
    return all(features.get(name, False) for name in _NEEDED)


@dataclass(frozen=True)
class PackedWeight:
    """One direction of an int8 weight, as the kernel reads it."""

    panels: NDArray[np.int8]
    """int8[panels * steps * 32 * 4], flat and aligned to 64 bytes."""
    compensation: NDArray[np.uint32]
    """uint32[panels * 32]: 128 * (1 + 256 + 65536) * column sum; zero past `outputs`."""
    inputs: int
    outputs: int


def _aligned(size: int, dtype: type[Any]) -> NDArray[Any]:
    width = np.dtype(dtype).itemsize
    raw = np.empty(size * width + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size * width].view(dtype)


class _Emit:
    """The few operations the tile is made of."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context = context
        self.b = builder
        # LLVM before 22 wants these types; later ones read the declaration as bytes themselves.
        self.dot = builder.module.declare_intrinsic(
            "llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(_V16, [_V16] * 3)
        )

    def pointer(self, array_type: Any, array: Any, index: Any) -> Any:
        base = self.context.make_array(array_type)(self.context, self.b, array).data
        return self.b.gep(base, [index])

    def broadcast(self, value: Any) -> Any:
        undefined = ir.Constant(_V16, ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, undefined, _ZERO)

    def vectors(self, pointer: Any, index: Any, count: int) -> list[Any]:
        base = self.b.bitcast(pointer, _V16.as_pointer())
        places = [self.b.add(index, ir.Constant(index.type, i)) for i in range(count)]
        return [self.b.load(self.b.gep(base, [place]), align=4) for place in places]

    def products(self, rows: int, operand: Any, panel: Any, steps: Any) -> list[list[Any]]:
        """The int32 sums of `rows` packed rows with the 32 outputs of a panel."""
        b, index = self.b, steps.type
        entry, loop = b.block, b.append_basic_block("steps")
        done = b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        step = b.phi(index)
        step.add_incoming(ir.Constant(index, 0), entry)
        sums = [[b.phi(_V16) for _ in range(2)] for _ in range(rows)]
        weights = self.vectors(panel, b.mul(step, ir.Constant(index, 2)), 2)
        first = b.mul(step, ir.Constant(index, rows))
        for row, pair in enumerate(sums):
            word = b.load(b.gep(operand, [b.add(first, ir.Constant(index, row))]))
            digits = self.broadcast(word)
            for total, weight in zip(pair, weights, strict=True):
                total.add_incoming(_ZERO, entry)
                total.add_incoming(b.call(self.dot, [total, digits, weight]), loop)
        following = b.add(step, ir.Constant(index, 1))
        step.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, steps), loop, done)
        b.position_at_end(done)
        return [[total.incomings[1][0] for total in pair] for pair in sums]

    def recombined(self, limbs: list[Any], offset: Any, shift: Any, mask: Any) -> Any:
        """((sum_l 256^l limbs[l] + offset) >> shift) & mask, as sixteen 16-bit lanes."""
        total = offset
        for exponent, limb in enumerate(limbs):
            places = ir.Constant(_V16, [8 * exponent] * _LANES)
            total = self.b.add(total, self.b.shl(limb, places))
        return self.b.trunc(self.b.and_(self.b.lshr(total, shift), mask), _HALVES)


@intrinsic(prefer_literal=True)
def _tile(
    _context: Any, limbs: Any, tokens: Any, operand: Any, at_operand: Any, panels: Any,
    at_panel: Any, steps: Any, offsets: Any, at_offset: Any, rounding: Any, out: Any,
    at_out: Any, stride: Any,
) -> Any:  # fmt: skip
    """out[at_out + t*stride + lane] for `tokens` tokens and 32 lanes, from flat arrays.

    `limbs` and `tokens` are literals; rounding is uint32[2]: delta and the mask.
    """
    place = types.intp
    signature = types.void(
        limbs, tokens, operand, place, panels, place, place, offsets, place, rounding, out,
        place, place,
    )  # fmt: skip
    digits, count = limbs.literal_value, tokens.literal_value

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        e = _Emit(context, builder)
        index = args[3].type
        words = e.pointer(sig.args[2], args[2], args[3])
        panel = e.pointer(sig.args[4], args[4], args[5])
        sums = e.products(digits * count, words, panel, args[6])
        zero = ir.Constant(index, 0)
        offset = e.vectors(e.pointer(sig.args[7], args[7], args[8]), zero, 2)
        shift, mask = (
            e.broadcast(builder.load(e.pointer(sig.args[9], args[9], ir.Constant(index, i))))
            for i in range(2)
        )
        for token in range(count):
            rows = sums[token * digits : (token + 1) * digits]
            for half in range(2):
                lane = builder.add(args[11], builder.mul(args[12], ir.Constant(index, token)))
                lane = builder.add(lane, ir.Constant(index, half * _LANES))
                where = e.pointer(sig.args[10], args[10], lane)
                value = e.recombined([row[half] for row in rows], offset[half], shift, mask)
                builder.store(value, builder.bitcast(where, _HALVES.as_pointer()), align=2)
        return context.get_dummy_value()

    return signature, build


@intrinsic
def _transpose(_context: Any, words: Any, rows: Any, operand: Any, at: Any, stride: Any) -> Any:
    """operand[at + s*stride + i] = words[rows[i] + s] with flipped signs, for i, s in 0..3."""
    signature = types.void(words, types.UniTuple(types.intp, 4), operand, types.intp, types.intp)

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        e = _Emit(context, builder)

        def load(i: int) -> Any:
            source = e.pointer(sig.args[0], args[0], builder.extract_value(args[1], i))
            word = builder.load(builder.bitcast(source, _V4.as_pointer()), align=4)
            return builder.xor(word, ir.Constant(_V4, [_FLIP] * 4))

        def join(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(_V4, lanes))

        w0, w1, w2, w3 = (load(i) for i in range(4))
        for half, lanes in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
            left, right = join(w0, w1, lanes), join(w2, w3, lanes)
            for odd, pick in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
                step = ir.Constant(args[4].type, 2 * half + odd)
                where = builder.add(args[3], builder.mul(args[4], step))
                target = e.pointer(sig.args[2], args[2], where)
                value = join(left, right, pick)
                builder.store(value, builder.bitcast(target, _V4.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


@njit(nogil=True, cache=True)
def _pack_blocks(words: Any, operand: Any, height: int, first: int, last: int) -> None:
    """Token blocks first..last of words uint32[limbs, T, steps] -> the front of `operand`."""
    limbs, tokens, steps = words.shape
    rows = limbs * height
    flat = words.reshape(-1)
    source = np.empty(rows, np.intp)
    fast = steps - steps % 4 if rows % 4 == 0 else 0
    for block in range(first, last):
        for row in range(rows):
            # Rows past the last token repeat it; nobody reads their results.
            token = min(block * height + row // limbs, tokens - 1)
            source[row] = ((row % limbs) * tokens + token) * steps
        start = (block - first) * steps * rows
        for row in range(0, rows if fast else 0, 4):
            four = (source[row], source[row + 1], source[row + 2], source[row + 3])
            for s in range(0, fast, 4):
                at = (four[0] + s, four[1] + s, four[2] + s, four[3] + s)
                _transpose(flat, at, operand, start + s * rows + row, rows)
        for s in range(fast, steps):
            for row in range(rows):
                operand[start + s * rows + row] = flat[source[row] + s] ^ np.uint32(_FLIP)


@njit(nogil=True, cache=True)
def _products(
    words: Any, panels: Any, offsets: Any, rounding: Any, height: int, out: Any, chunk: int,
    blocks: Any, columns: Any,
) -> None:  # fmt: skip
    """out uint16[T, outputs] for a range of token blocks, packed `chunk` at a time, and panels."""
    limbs, _, steps = words.shape
    tokens, outputs = out.shape
    flat = out.reshape(-1)
    scratch = np.empty(_ROWS * WIDTH, np.uint16)
    operand = np.empty(min(chunk, blocks[1] - blocks[0]) * height * limbs * steps, np.uint32)
    for begin in range(blocks[0], blocks[1], chunk):
        end = min(blocks[1], begin + chunk)
        _pack_blocks(words, operand, height, begin, end)
        for tile in range(columns[0] * (end - begin), columns[1] * (end - begin)):
            panel, block = tile // (end - begin), tile % (end - begin)
            j, b = panel * WIDTH, panel * WIDTH * steps * _STEP
            t, a = (begin + block) * height, block * height * limbs * steps
            whole = j + WIDTH <= outputs and t + height <= tokens
            to = flat if whole else scratch
            at = t * outputs + j if whole else 0
            stride = outputs if whole else WIDTH
            if limbs == 3 and height == 4:
                _tile(3, 4, operand, a, panels, b, steps, offsets, j, rounding, to, at, stride)
            elif limbs == 2 and height == 6:
                _tile(2, 6, operand, a, panels, b, steps, offsets, j, rounding, to, at, stride)
            elif limbs == 3:
                _tile(3, 1, operand, a, panels, b, steps, offsets, j, rounding, to, at, stride)
            else:
                _tile(2, 1, operand, a, panels, b, steps, offsets, j, rounding, to, at, stride)
            if not whole:
                for row in range(min(height, tokens - t)):
                    for lane in range(min(WIDTH, outputs - j)):
                        out[t + row, j + lane] = scratch[row * WIDTH + lane]


@njit(nogil=True, cache=True)
def _pack_panels(matrix: Any, panels: Any, compensation: Any, first: int, last: int) -> None:
    """matrix int8[outputs, inputs] -> panels first..last of uint32[panels, steps, 32], and sums."""
    outputs, inputs = matrix.shape
    whole = inputs // _STEP
    for panel in range(first, last):
        start = panel * WIDTH
        width = min(WIDTH, outputs - start)
        target = panels[panel]
        sums = compensation[start : start + WIDTH]
        sums[:] = 0
        if width < WIDTH or whole * _STEP < inputs:
            target[:] = 0
        for step in range(whole):
            k = step * _STEP
            for lane in range(width):
                a, b = matrix[start + lane, k], matrix[start + lane, k + 1]
                c, d = matrix[start + lane, k + 2], matrix[start + lane, k + 3]
                low = np.uint32(np.uint8(a)) | np.uint32(np.uint8(b)) << np.uint32(8)
                high = np.uint32(np.uint8(c)) | np.uint32(np.uint8(d)) << np.uint32(8)
                target[step, lane] = low | high << np.uint32(16)
                sums[lane] += np.uint32(np.int32(a) + np.int32(b) + np.int32(c) + np.int32(d))
        for k in range(whole * _STEP, inputs):
            for lane in range(width):
                a = matrix[start + lane, k]
                target[whole, lane] |= np.uint32(np.uint8(a)) << np.uint32(8 * (k % _STEP))
                sums[lane] += np.uint32(np.int32(a))
        for lane in range(WIDTH):
            sums[lane] *= np.uint32(128 * (1 + 256 + 65536))


def pack(weight: NDArray[np.int8], forward: bool) -> PackedWeight:
    """Pack weight[N, K] for products with its transpose (forward: K in, N out) or with itself."""
    matrix = weight.view() if forward else weight.T
    matrix.flags.writeable = False  # mapped weights are: one compilation for all
    outputs, inputs = matrix.shape
    count, steps = -(-outputs // WIDTH), -(-inputs // _STEP)
    panels = _aligned(count * steps * WIDTH * _STEP, np.int8)
    compensation = _aligned(count * WIDTH, np.uint32)
    words = panels.view(np.uint32).reshape(count, steps, WIDTH)
    run_split(lambda a, b: _pack_panels(matrix, words, compensation, a, b), count)
    return PackedWeight(panels, compensation, inputs, outputs)


def multiply(
    planes: NDArray[np.int8], packed: PackedWeight, dropped_bits: int
) -> NDArray[np.uint16]:
    """planes int8[limbs, T, inputs] -> the rounded answer uint16[T, outputs]."""
    limbs, tokens, inputs = planes.shape
    if inputs != packed.inputs or limbs not in (2, 3):
        raise ValueError(f"planes {planes.shape} do not fit a weight with {packed.inputs} inputs")
    steps = -(-inputs // _STEP)
    if inputs % _STEP or not planes.flags.c_contiguous or planes.ctypes.data % _STEP:
        padded = np.zeros((limbs, tokens, steps * _STEP), np.int8)
        padded[:, :, :inputs] = planes
        planes = padded
    words = planes.view(np.uint32)
    words.flags.writeable = False  # requests off the wire are: one compilation for all
    height = 1 if tokens == 1 else _ROWS // limbs
    blocks = -(-tokens // height)
    panels = packed.panels
    offsets = np.uint32((1 << dropped_bits) >> 1) - packed.compensation
    rounding = np.array([dropped_bits, (1 << (8 * limbs - dropped_bits)) - 1], np.uint32)
    out = np.empty((tokens, packed.outputs), np.uint16)
    count = len(offsets) // WIDTH
    chunk = max(_BLOCKS_A_CORE, _CHUNK_BYTES // (4 * height * limbs * steps))

    def work(some: tuple[int, int], columns: tuple[int, int]) -> None:
        _products(words, panels, offsets, rounding, height, out, chunk, some, columns)

    if blocks >= _BLOCKS_A_CORE * core_count():
        run_split(lambda a, b: work((a, b), (0, count)), blocks)
    else:
        run_split(lambda a, b: work((0, blocks), (a, b)), count)
    return out
