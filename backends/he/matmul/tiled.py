"""A fused product of int8 weights for one instruction set: packing, loops, and cores.

    answer[t, j] = ((sum_l 256^l sum_k planes[l, t, k] * M[k, j] + 2^(delta-1)) >> delta) & mask

All sums are taken mod 2^32 and p divides 2^32, so nothing can overflow, whatever the number of
inputs. Where the instruction wants unsigned digits, a digit d is fed in as d + 128 (one XOR) and
128 * sum_l 256^l * sum_k M[k, j] is taken off again; the column sums are made when a weight is
packed.

Layout. A weight is packed once per direction, into as many bytes as it has, as panels of `width`
outputs: int8[panels][ceil(inputs/step)][width][step], zero where ragged, so that a step is a few
registers and a product reads a panel from front to back. A request is packed on every call as
uint32[blocks][ceil(inputs/step)][rows]: a word is one row's digits of one step.

With many tokens each core takes a range of blocks and packs its own, a few at a time, so that
they stay in its L2 while the panels pass by once for each few; with few tokens each core takes
a range of panels and packs all blocks itself. Either way the cores meet only at the end.

Floor: digits * tokens * inputs * outputs over the multiply-adds a cycle in `isa.py`, on one core.
With one token, reading the weight bytes once bounds the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.matmul import tile as tile_module
from backends.he.matmul.interface import Digits, Kernel, check_planes, check_values, check_weight
from backends.he.matmul.isa import InstructionSet
from backends.threads import core_count, run_split

_BLOCKS_A_CORE = 8  # fewer would read the weight too often: then split over the outputs
_CHUNK_BYTES = 1 << 19  # packed request a core works on: about half an L2, at most 3/4
_ALIGNMENT = 64

_ENOUGH_TO_WIDEN = 4  # blocks that make it pay to widen a slice of weights to 16 bits first

# What `specialised` puts into the loops below, for one instruction set and tile.
_pack: Any = None
_tile: Any = None
_wide_tile: Any = None
_widen: Any = None
_finish: Any = None
_four: Any = None
_two: Any = None
_WIDEN = False
_DIGITS = _TOKENS = _WIDTH = _STEP = _SLICE = _FLIP = 0


@dataclass(frozen=True)
class PackedWeight:
    """One direction of an int8 weight, as a kernel reads it."""

    panels: NDArray[np.int8]
    """int8[panels * steps * width * step], flat and aligned to 64 bytes."""
    column_sums: NDArray[np.uint32]
    """uint32[panels * width]: sum_k M[k, j] mod 2^32; zero past `outputs`."""
    inputs: int
    outputs: int


def _aligned(size: int, dtype: type[Any]) -> NDArray[Any]:
    width = np.dtype(dtype).itemsize
    raw = np.empty(size * width + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size * width].view(dtype)


def _pack_words(words: Any, operand: Any, first: int, last: int, begin: int, end: int) -> None:
    """Token blocks first..last of words uint32[digits, T, steps], steps begin..end -> `operand`."""
    _, tokens, steps = words.shape
    rows = _DIGITS * _TOKENS
    flat = words.reshape(-1)
    source = np.empty(rows, np.intp)
    count = end - begin
    for block in range(first, last):
        for row in range(rows):
            # Rows past the last token repeat it; nobody reads their results.
            token = min(block * _TOKENS + row // _DIGITS, tokens - 1)
            source[row] = ((row % _DIGITS) * tokens + token) * steps + begin
        start = (block - first) * count * rows
        row = 0
        while row < rows:
            done = 0
            together = 1
            if rows - row >= 4:
                together = 4
                four = (source[row], source[row + 1], source[row + 2], source[row + 3])
                for s in range(0, count - 3, 4):
                    at = (four[0] + s, four[1] + s, four[2] + s, four[3] + s)
                    _four(flat, at, operand, start + s * rows + row, rows)
                done = count - count % 4
            elif rows - row >= 2:
                together = 2
                two = (source[row], source[row + 1])
                for s in range(0, count - 3, 4):
                    pair = (two[0] + s, two[1] + s)
                    _two(flat, pair, operand, start + s * rows + row, rows)
                done = count - count % 4
            for s in range(done, count):
                for i in range(row, row + together):
                    operand[start + s * rows + i] = flat[source[i] + s] ^ np.uint32(_FLIP)
            row += together


def _pack_planes(planes: Any, operand: Any, first: int, last: int, begin: int, end: int) -> None:
    """The same from planes int8[limbs, T, K], cut into 16-bit digits on the way."""
    limbs, tokens, inputs = planes.shape
    count = end - begin
    halves = np.zeros((_DIGITS, _TOKENS, 2 * count), np.int16)
    words = halves.view(np.uint32)
    k0 = 2 * begin
    size = min(inputs, 2 * end) - k0
    for block in range(first, last):
        for i in range(_TOKENS):
            t = min(block * _TOKENS + i, tokens - 1)
            low, middle = planes[0, t, k0 : k0 + size], planes[1, t, k0 : k0 + size]
            digit = halves[0, i]
            for k in range(size):
                digit[k] = np.int16(np.int32(low[k]) + (np.int32(middle[k]) << 8))
            if limbs == 3:
                # Digits are signed: the upper one takes what the lower one's sign took away.
                high, digit = planes[2, t, k0 : k0 + size], halves[_DIGITS - 1, i]
                for k in range(size):
                    value = np.int32(low[k]) + (np.int32(middle[k]) << 8)
                    carry = (value - np.int32(np.int16(value))) >> 16
                    digit[k] = np.int16(np.int32(high[k]) + carry)
        at = (block - first) * count * _DIGITS * _TOKENS
        _pack_words(words, operand[at:], 0, 1, 0, count)


def _products(
    request: Any, steps: int, panels: Any, offsets: Any, rounding: Any, out: Any, chunk: int,
    blocks: Any, columns: Any,
) -> None:  # fmt: skip
    """out[T, outputs] for a range of token blocks, packed `chunk` at a time, and of panels.

    request  what `_pack` reads
    """
    tokens, outputs = out.shape
    flat = out.reshape(-1)
    rows = _DIGITS * _TOKENS
    tile = rows * _WIDTH  # sums of a tile
    most = min(chunk, blocks[1] - blocks[0])
    longest = min(steps, _SLICE)
    scratch = np.empty(_TOKENS * _WIDTH, out.dtype)
    wide = np.empty(_WIDTH * longest * _STEP if _WIDEN else 0, np.int16)
    sums = np.empty(most * tile, np.uint32)
    operand = np.empty(most * rows * steps, np.uint32)
    for first in range(blocks[0], blocks[1], chunk):
        last = min(blocks[1], first + chunk)
        count = last - first
        for begin in range(0, steps, _SLICE):
            end = min(steps, begin + _SLICE)
            part = operand[begin * rows * count : end * rows * count]
            _pack(request, part, first, last, begin, end)
        widen = _WIDEN and count >= _ENOUGH_TO_WIDEN
        for panel in range(columns[0], columns[1]):
            sums[: count * tile] = 0
            for begin in range(0, steps, _SLICE):
                length = min(steps, begin + _SLICE) - begin
                at_panel = (panel * steps + begin) * _WIDTH * _STEP
                at_words = begin * rows * count
                if widen:
                    for step in range(length):
                        _widen(panels, at_panel, step, wide)
                for block in range(count):
                    a = at_words + block * rows * length
                    if widen:
                        _wide_tile(operand, a, wide, 0, length, sums, block * tile)
                    else:
                        _tile(operand, a, panels, at_panel, length, sums, block * tile)
            j = panel * _WIDTH
            for block in range(count):
                t = (first + block) * _TOKENS
                if j + _WIDTH <= outputs and t + _TOKENS <= tokens:
                    at = t * outputs + j
                    _finish(sums, block * tile, offsets, j, rounding, flat, at, outputs)
                else:
                    _finish(sums, block * tile, offsets, j, rounding, scratch, 0, _WIDTH)
                    for row in range(min(_TOKENS, tokens - t)):
                        for lane in range(min(_WIDTH, outputs - j)):
                            out[t + row, j + lane] = scratch[row * _WIDTH + lane]


@cache
def _loops(isa: InstructionSet, digits: int, tokens: int, rounded: bool) -> Callable[..., None]:
    """`_products` with tiles of `tokens` tokens of `digits` rows, for one instruction set.

    They read the planes of a request where `rounded` and digits have 16 bits, words otherwise.
    """
    case = f"{isa.name}-{digits}x{tokens}"
    shape = {"_DIGITS": digits, "_TOKENS": tokens, "_FLIP": isa.flip}
    pack = jit.specialised(
        _pack_words, case, **shape,
        _four=tile_module.transpose(isa, 4), _two=tile_module.transpose(isa, 2),
    )  # fmt: skip
    wide = isa.digit_bytes == 2
    if wide and rounded:
        pack = jit.specialised(_pack_planes, case, **shape, _pack_words=pack)
    return jit.specialised(
        _products, f"{case}-{'rounded' if rounded else 'sums'}", **shape, _pack=pack,
        _tile=tile_module.tile(isa, digits * tokens, False),
        _wide_tile=tile_module.tile(isa, digits * tokens, wide),
        _widen=tile_module.widen(isa),
        _finish=tile_module.finish(isa, digits, tokens, rounded),
        _WIDEN=wide, _WIDTH=isa.width, _STEP=isa.step, _SLICE=isa.slice_steps,
    )  # fmt: skip


@jit.kernel
def _pack_panels(matrix: Any, panels: Any, column_sums: Any, first: int, last: int) -> None:
    """matrix int8[outputs, inputs] -> panels first..last of int8[panels, steps, width, step]."""
    outputs, inputs = matrix.shape
    _, steps, width, step = panels.shape
    sums = np.empty(width, np.int32)
    for panel in range(first, last):
        start = panel * width
        count = min(width, outputs - start)
        target = panels[panel]
        if count < width or steps * step > inputs:
            target[:] = 0
        sums[:] = 0
        for s in range(inputs // step):
            for lane in range(count):
                for i in range(step):
                    value = matrix[start + lane, s * step + i]
                    target[s, lane, i] = value
                    sums[lane] += value
        for k in range(inputs - inputs % step, inputs):
            for lane in range(count):
                target[steps - 1, lane, k % step] = matrix[start + lane, k]
                sums[lane] += matrix[start + lane, k]
        for lane in range(width):
            column_sums[start + lane] = np.uint32(sums[lane])


@jit.kernel
def _digits_of(values: Any, bits: int, out: Any, first: int, last: int) -> None:
    """Signed digits of `bits` bits of int32[M, K] -> out [digits, M, K], rows first..last."""
    half = np.int64(1) << np.int64(bits - 1)
    for row in range(first, last):
        for k in range(values.shape[1]):
            v = np.int64(values[row, k])
            for digit in range(out.shape[0]):
                d = ((v + half) & (2 * half - 1)) - half
                out[digit, row, k] = d
                v = (v - d) >> np.int64(bits)


@jit.kernel
def _joined(sums: Any, bits: int, out: Any, first: int, last: int) -> None:
    """out int64[M, N] = sum_d 2^(bits * d) * sums[d], of int32[digits, M, N], rows first..last.

    A sum is more than -2^31 and at most 2^31 (`digits_of`), where it has wrapped to -2^31.
    """
    for row in range(first, last):
        for j in range(out.shape[1]):
            total = np.int64(0)
            for digit in range(sums.shape[0]):
                one_less = np.int32(np.uint32(sums[digit, row, j]) - np.uint32(1))
                total += (np.int64(one_less) + np.int64(1)) << np.int64(bits * digit)
            out[row, j] = total


class TiledKernel(Kernel):
    """The product with the tiles of one instruction set."""

    def __init__(self, isa: InstructionSet) -> None:
        self._isa = isa
        self.name = isa.name
        self.warning = ""

    def pack(self, weight: NDArray[np.int8], forward: bool) -> PackedWeight:
        check_weight(weight)
        matrix = weight.view() if forward else weight.T
        matrix.flags.writeable = False  # mapped weights are: one compilation for all
        outputs, inputs = matrix.shape
        width, step = self._isa.width, self._isa.step
        count, steps = -(-outputs // width), -(-inputs // step)
        panels = _aligned(count * steps * width * step, np.int8)
        column_sums = np.empty(count * width, np.uint32)
        shaped = panels.reshape(count, steps, width, step)
        run_split(lambda a, b: _pack_panels(matrix, shaped, column_sums, a, b), count)
        return PackedWeight(panels, column_sums, inputs, outputs)

    def answer(
        self, planes: NDArray[np.int8], packed: PackedWeight, dropped_bits: int
    ) -> NDArray[np.uint16]:
        check_planes(planes, packed.inputs)
        limbs, tokens, _ = planes.shape
        digits = self._isa.digits(limbs)
        places = np.arange(digits, dtype=np.uint32) * np.uint32(8 * self._isa.digit_bytes)
        rounding = np.array([dropped_bits, (1 << (8 * limbs - dropped_bits)) - 1], np.uint32)
        half = np.uint32((1 << dropped_bits) >> 1)
        offsets = half - self._compensation(packed, (np.uint32(1) << places).sum())
        out = np.empty((tokens, packed.outputs), np.uint16)
        height = self._height(tokens, digits)
        request = planes.view() if self._isa.digit_bytes == 2 else self._words(planes)
        self._run(request, digits, packed, offsets, rounding, height, out)
        return out

    def digits_of(self, values: NDArray[np.int32]) -> Digits:
        check_values(values)
        rows, inputs = values.shape
        step = self._isa.step
        dtype = (np.int8, np.int16)[self._isa.digit_bytes - 1]
        # Sums of digit * weight reach 2^31 only where all digits are -2^(bits-1) and all weights
        # -128; nothing reaches -2^31.
        bits = min(8 * self._isa.digit_bytes, 25 - max(1, inputs - 1).bit_length())
        digits = np.zeros((-(-32 // bits), rows, -(-inputs // step) * step), dtype)
        run_split(lambda a, b: _digits_of(values, bits, digits, a, b), rows)
        return Digits(digits, inputs, bits)

    def exact(self, digits: Digits, packed: PackedWeight) -> NDArray[np.int64]:
        if digits.inputs != packed.inputs:
            raise ValueError(f"{digits.inputs} inputs do not fit a weight with {packed.inputs}")
        count, rows, _ = digits.values.shape
        words = digits.values.reshape(1, count * rows, -1).view(np.uint32)
        sums = np.empty((count * rows, packed.outputs), np.int32)
        offsets = -self._compensation(packed, np.uint32(1))
        self._run(words, 1, packed, offsets, np.zeros(2, np.uint32), self._isa.rows, sums)
        out = np.empty((rows, packed.outputs), np.int64)
        shaped = sums.reshape(count, rows, packed.outputs)
        run_split(lambda a, b: _joined(shaped, digits.bits, out, a, b), rows)
        return out

    def _height(self, tokens: int, digits: int) -> int:
        """Tokens of a tile: as many as its registers take, or fewer where two tiles fit better.

        Each height is a compilation of its own, so there are only three. A second tile costs what a
        first one does, however few tokens it has.
        """
        most = self._isa.rows // digits
        fewer = 3 * most // 4
        if tokens == 1:
            return 1
        return fewer if most < tokens <= 2 * fewer else most

    def _words(self, planes: NDArray[np.int8]) -> NDArray[np.uint32]:
        """uint32[limbs, T, steps]: planes int8[limbs, T, K] as they are, where they allow it."""
        limbs, tokens, inputs = planes.shape
        step = self._isa.step
        if inputs % step or not planes.flags.c_contiguous or planes.ctypes.data % step:
            padded = np.zeros((limbs, tokens, -(-inputs // step) * step), np.int8)
            padded[:, :, :inputs] = planes
            planes = padded
        return planes.view(np.uint32)

    def _compensation(self, packed: PackedWeight, factor: np.uint32) -> NDArray[np.uint32]:
        """What flipping all digits of a token added: 128 * factor * column sums mod 2^32."""
        return packed.column_sums * np.uint32(128 * bool(self._isa.flip)) * np.uint32(factor)

    def _run(
        self,
        request: NDArray[Any],
        digits: int,
        packed: PackedWeight,
        offsets: NDArray[np.uint32],
        rounding: NDArray[np.uint32],
        height: int,
        out: NDArray[Any],
    ) -> None:
        """Fill out[T, outputs] on all cores, in tiles of `height` tokens."""
        request.flags.writeable = False  # as those off the wire are: one compilation for all
        loops = _loops(self._isa, digits, height, out.dtype == np.uint16)
        steps = -(-packed.inputs // self._isa.step)
        blocks, count = -(-len(out) // height), len(offsets) // self._isa.width
        spread = blocks >= _BLOCKS_A_CORE * core_count()
        share = -(-blocks // core_count()) if spread else blocks
        most = max(_BLOCKS_A_CORE, _CHUNK_BYTES // (4 * height * digits * steps))
        # Chunks of one size: a last one of a single block would read all weights for it alone.
        chunk = -(-share // max(1, round(share / most)))

        def work(some: tuple[int, int], columns: tuple[int, int]) -> None:
            loops(request, steps, packed.panels, offsets, rounding, out, chunk, some, columns)

        if spread:
            run_split(lambda a, b: work((a, b), (0, count)), blocks)
        else:
            run_split(lambda a, b: work((0, blocks), (a, b)), count)
