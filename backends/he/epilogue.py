"""The owner's work on every value besides the ring: sealing a mask, opening an answer.

Sixteen values at a time, as LLVM vectors for numba (see `vector.py`); what is left over at the end
of a row takes the plain loops, which are the same arithmetic and show it. Numba's own vectoriser
widens everything to the doubles that the scales need. Arrays are flat and come with places in them,
because cutting a slice of each for every row cost as much as the arithmetic.

Rounding from q to p = 2^(28-n). Since 2^28 = q + 2559, u*p/q is (u + u*2559/q) / 2^n, and

    B = (u + floor(u*FOLD / 2^48) + 2^(n-1)) >> n

is round(u*p/q) for all u in [0, q) but two (with three limbs; none with two), each within 2^-24 of
a tie. Hence |B - u*p/q| <= 1/2 + 2^-24, and over all u the differences average to zero but for
2^-27. B is at most p, and nothing exceeds 2^28 + 2^11. The same holds of n from 8 to 12, without
those two. A request's values may have fewer bits than p (`wire.py`): they are rounded with a larger
n, and shifted left to where p has its bits.

Floor with AVX2, counted from the operations and four vector operations a cycle: 2 cycles to seal a
value, 1 to open it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backends import jit
from backends.he.params import ERROR_BOUND, MODULUS_BITS, NTT_PRIME
from backends.he.vector import LANES, Emit, popcount, splat

FOLD_SHIFT = 48
FOLD = ((1 << MODULUS_BITS) % NTT_PRIME << FOLD_SHIFT) // NTT_PRIME
"""floor(2^48 * 2559/q), 32 bits: multiply by it and shift by 48 for u*2559/q, see `rounded`."""
_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it leaves round(v) in the low bits
_BALANCE = 0x808080  # adding and XORing it turns base-256 digits into signed ones

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def _lanes(kind: Any) -> ir.VectorType:
    return ir.VectorType(kind, LANES)


class _Rows(Emit):
    """Operations on sixteen values of a row."""

    def load_lanes(self, array_type: Any, array: Any, index: Any, kind: Any) -> Any:
        where = self.b.gep(self.data(array_type, array), [index])
        return self.b.load(self.b.bitcast(where, _lanes(kind).as_pointer()), align=1)

    def store_lanes(self, value: Any, array_type: Any, array: Any, index: Any) -> None:
        where = self.b.gep(self.data(array_type, array), [index])
        self.b.store(value, self.b.bitcast(where, value.type.as_pointer()), align=1)

    def spread(self, value: Any) -> Any:
        """A scalar in every lane."""
        return self.broadcast(value, _lanes(value.type))

    def bits_set(self, value: Any) -> Any:
        """Bits set in each lane: llvmlite's own `ctpop` takes scalars only."""
        kind = ir.FunctionType(value.type, [value.type])
        name = f"llvm.ctpop.v{LANES}i{value.type.element.width}"
        return self.b.call(self.b.module.declare_intrinsic(name, (), kind), [value])

    def rounded(self, u: Any, bits: Any) -> Any:
        """`rounded` of sixteen lanes; `bits` is a scalar."""
        b, wide, one = self.b, ir.VectorType(_I64, LANES // 2), ir.Constant(_I32, 1)
        pairs, factor = b.bitcast(u, wide), splat(wide, FOLD)
        even = b.mul(b.and_(pairs, splat(wide, (1 << 32) - 1)), factor)
        odd = b.mul(b.lshr(pairs, splat(wide, 32)), factor)
        folded = b.or_(
            b.lshr(even, splat(wide, FOLD_SHIFT)),
            b.shl(b.lshr(odd, splat(wide, FOLD_SHIFT)), splat(wide, 32)),
        )
        half = self.spread(b.shl(one, b.sub(bits, one)))
        total = b.add(b.add(u, b.bitcast(folded, _lanes(_I32))), half)
        return b.lshr(total, self.spread(bits))


@intrinsic
def _seal_lanes(
    _context: Any, mask: Any, at: Any, x: Any, at_x: Any, in_scale: Any, k: Any, factor: Any,
    noise: Any, four: Any, one: Any, bits: Any, unused: Any, planes: Any, size: Any, high: Any,
    shift: Any,
) -> Any:  # fmt: skip
    """`seal_row` for sixteen values."""
    place = types.intp
    signature = types.void(
        mask, place, x, place, in_scale, place, types.float64, noise, place, place, types.uint32,
        types.uint32, planes, place, place, types.uint32,
    )  # fmt: skip

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        e, b = _Rows(context, builder), builder

        def lanes(array: int, index: Any, kind: Any) -> Any:
            return e.load_lanes(sig.args[array], args[array], index, kind)

        value = b.fmul(
            b.fpext(lanes(2, args[3], _F32), _lanes(_F64)),
            b.fpext(lanes(4, args[5], _F32), _lanes(_F64)),
        )
        magic = ir.Constant(_lanes(_F64), [_MAGIC] * LANES)
        value = b.fadd(b.fmul(value, e.spread(args[6])), magic)
        message = b.trunc(b.bitcast(value, _lanes(_I64)), _lanes(_I32))
        most = e.bits_set(lanes(7, args[8], _I32))
        more = b.zext(e.bits_set(lanes(7, args[9], _I8)), _lanes(_I32))
        noisy = b.sub(b.add(b.add(message, most), more), splat(_lanes(_I32), ERROR_BOUND))
        hidden = b.add(lanes(0, args[1], _I32), e.add_q_if_negative(noisy))
        rounded = e.rounded(e.subtract_q_if_larger(hidden), args[10])
        rounded = b.shl(rounded, e.spread(args[11]))
        balance = splat(_lanes(_I32), _BALANCE)
        digits = b.xor(b.add(rounded, balance), balance)
        # With two limbs the upper plane is the middle one, stored twice.
        middle = b.add(args[3], args[13])
        for where, shifts in (
            (args[3], splat(_lanes(_I32), 0)),
            (middle, splat(_lanes(_I32), 8)),
            (b.add(args[3], args[14]), e.spread(args[15])),
        ):
            digit = b.trunc(b.lshr(digits, shifts), _lanes(_I8))
            e.store_lanes(digit, sig.args[12], args[12], where)
        return context.get_dummy_value()

    return signature, build


@intrinsic
def _open_lanes(
    _context: Any, mask: Any, at: Any, answer: Any, at_answer: Any, scale: Any, out_scale: Any,
    j: Any, bits: Any, dropped_bits: Any, above: Any, half_unit: Any, out: Any,
) -> Any:  # fmt: skip
    """`open_row` for sixteen values."""
    place = types.intp
    signature = types.void(
        mask, place, answer, place, types.float64, out_scale, place, types.uint32, types.uint32,
        types.uint32, types.uint32, out,
    )  # fmt: skip

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        e, b = _Rows(context, builder), builder
        masks = e.load_lanes(sig.args[0], args[0], args[1], _I32)
        answers = b.zext(e.load_lanes(sig.args[2], args[2], args[3], _I16), _lanes(_I32))
        value = b.sub(b.shl(answers, e.spread(args[8])), e.rounded(masks, args[7]))
        value = b.sub(value, e.spread(args[10]))
        # Shift out the bits above p, and back with the sign: y mod p, centred.
        above = e.spread(args[9])
        centred = b.ashr(b.shl(value, above), above)
        real = b.fmul(b.sitofp(centred, _lanes(_F64)), e.spread(args[4]))
        scales = b.fpext(e.load_lanes(sig.args[5], args[5], args[6], _F32), _lanes(_F64))
        result = b.fptrunc(b.fmul(real, scales), _lanes(_F32))
        e.store_lanes(result, sig.args[11], args[11], args[3])
        return context.get_dummy_value()

    return signature, build


@jit.kernel
def rounded(u: Any, bits: Any) -> Any:
    """round(u * p/q) for uint32 u in [0, q), as uint32 in [0, p]; bits = log2(2^28/p)."""
    folded = np.uint64(u) * np.uint64(FOLD) >> np.uint64(FOLD_SHIFT)
    half = np.uint32(1) << np.uint32(bits - 1)
    return np.uint32(np.uint32(u) + np.uint32(folded) + half) >> np.uint32(bits)


@jit.kernel
def seal_row(
    mask: Any, at: int, x: Any, at_x: int, in_scale: Any, k: int, count: int, factor: float,
    noise: Any, four: int, one: int, planes: Any, size: int, limbs: int, unused: int,
) -> None:  # fmt: skip
    """Digit planes of one token: mask + error + message mod q, rounded to multiples of 2^unused.

    All arrays are flat; each has the place of the first of `count` values in it.

    mask      uint32 in [0, q)
    x         float32, to be multiplied by in_scale float32 (from place k) and by `factor`
    noise     uint8: 40 random bits of each error, four bytes at `four`, one at `one`
    planes    int8[limbs * size]; a value has the same place in every plane as in x
    """
    high = (limbs - 1) * size
    shift, low = np.uint32(8 * (limbs - 1)), np.uint32(unused)
    bits = np.uint32(MODULUS_BITS - 8 * limbs + unused)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        _seal_lanes(
            mask, at + i, x, at_x + i, in_scale, k + i, factor, noise, four + 4 * i, one + i,
            bits, low, planes, size, high, shift,
        )  # fmt: skip
    q = np.uint32(NTT_PRIME)
    for i in range(whole, count):
        v = np.float64(np.float64(x[at_x + i]) * np.float64(in_scale[k + i]) * factor + _MAGIC)
        m = np.uint32(np.float64(v).view(np.uint64))
        e = np.uint32(popcount(np.uint32(noise[one + i])))
        for byte in range(4):
            e += np.uint32(popcount(np.uint32(noise[four + 4 * i + byte])))
        m = np.uint32(m + e - np.uint32(ERROR_BOUND))
        m = min(m, np.uint32(m + q))
        u = np.uint32(mask[at + i] + m)
        u = min(u, np.uint32(u - q))
        b = np.uint32(rounded(u, bits) << low)
        b = np.uint32(b + np.uint32(_BALANCE)) ^ np.uint32(_BALANCE)
        for limb in range(limbs):
            planes[limb * size + at_x + i] = np.int8(b >> np.uint32(8 * limb))


@jit.kernel
def open_row(
    mask: Any, at: int, answer: Any, at_answer: int, scale: float, out_scale: Any, j: int,
    count: int, dropped_bits: int, limbs: int, unused: int, out: Any,
) -> None:  # fmt: skip
    """Results of one token: its answer less its mask, mod p, in its scale.

    Of values that are multiples of 2^unused, rounding half up makes a result larger by half of
    that, on average, which is taken off; by a half where they are any integers, which is left.

    All arrays are flat; each has the place of the first of `count` values in it.

    mask      uint32 in [0, q)
    answer    uint16; a result has the same place in out float32
    out_scale float32 from place j, multiplied with `scale`
    """
    whole = count - count % LANES
    dropped, above = np.uint32(dropped_bits), np.uint32(32 - 8 * limbs)
    half_unit = np.uint32((1 << unused) >> 1)
    bits = np.uint32(MODULUS_BITS - 8 * limbs)
    for i in range(0, whole, LANES):
        _open_lanes(
            mask, at + i, answer, at_answer + i, scale, out_scale, j + i, bits, dropped, above,
            half_unit, out,
        )  # fmt: skip
    for i in range(whole, count):
        b = rounded(mask[at + i], bits)
        y = np.uint32((np.uint32(answer[at_answer + i]) << dropped) - b - half_unit)
        centred = np.int32(y << above) >> np.int32(above)
        real = np.float64(centred) * scale * np.float64(out_scale[j + i])
        out[at_answer + i] = np.float32(real)
