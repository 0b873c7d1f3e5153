"""Sixteen-lane building blocks of the ring kernels, written as LLVM vectors for numba.

Numba's loop vectoriser spends half its instructions on widening 32-bit lanes to 64 bits and
narrowing them again. Here the even and the odd lanes of a register are multiplied in place
(vpmuludq / vpmuldq look at the low half of each 64-bit lane only), and two butterfly stages
run on four registers between one load and one store. LLVM splits the vectors for machines with
narrower registers, so the result is the same everywhere.

Both functions work on flat arrays; `ring.py` says what they mean and states the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backends.he.params import NTT_PRIME, RING_DEGREE

LANES = 16
_Q_INVERSE = pow(NTT_PRIME, -1, 1 << 32)
_LOW = (1 << 32) - 1

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_V16 = ir.VectorType(_I32, LANES)
_V8 = ir.VectorType(_I64, LANES // 2)


def splat(vector: ir.VectorType, value: int) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(vector, [value] * vector.count)


_SPLAT_Q = splat(_V16, NTT_PRIME)
_SPLAT_LOW = splat(_V8, _LOW)
_SPLAT_HIGH = splat(_V8, _LOW << 32)
_SPLAT_32 = splat(_V8, 32)


class Emit:
    """The few vector operations the kernels are made of."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context = context
        self.b = builder

    def data(self, array_type: Any, array: Any) -> Any:
        return self.context.make_array(array_type)(self.context, self.b, array).data

    def _pointer(self, base: Any, index: Any) -> Any:
        return self.b.bitcast(self.b.gep(base, [index]), _V16.as_pointer())

    def load(self, base: Any, index: Any) -> Any:
        return self.b.load(self._pointer(base, index), align=4)

    def store(self, value: Any, base: Any, index: Any) -> None:
        self.b.store(value, self._pointer(base, index), align=4)

    def broadcast(self, value: Any, vector: ir.VectorType) -> Any:
        first = self.b.insert_element(
            ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0)
        )
        mask = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
        return self.b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)

    def minimum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_unsigned("<", x, y), x, y)

    def add_q_if_negative(self, x: Any) -> Any:
        return self.minimum(x, self.b.add(x, _SPLAT_Q))

    def subtract_q_if_larger(self, x: Any) -> Any:
        return self.minimum(x, self.b.sub(x, _SPLAT_Q))

    def low_signed(self, x: Any) -> Any:
        return self.b.ashr(self.b.shl(x, _SPLAT_32), _SPLAT_32)

    def join_high(self, even: Any, odd: Any) -> Any:
        """High halves of the even and odd products, as sixteen 32-bit lanes."""
        joined = self.b.or_(self.b.lshr(even, _SPLAT_32), self.b.and_(odd, _SPLAT_HIGH))
        return self.b.bitcast(joined, _V16)

    def times_constant(self, x: Any, w: Any, w_shoup: Any) -> Any:
        """x*w mod q in [0, q), for any 32-bit x (Shoup). w: 16 lanes, w_shoup: 8 wide lanes."""
        wide = self.b.bitcast(x, _V8)
        even = self.b.mul(self.b.and_(wide, _SPLAT_LOW), w_shoup)
        odd = self.b.mul(self.b.lshr(wide, _SPLAT_32), w_shoup)
        quotient = self.join_high(even, odd)
        return self.subtract_q_if_larger(
            self.b.sub(self.b.mul(x, w), self.b.mul(quotient, _SPLAT_Q))
        )

    def butterfly(self, a: Any, b: Any, w: tuple[Any, Any]) -> tuple[Any, Any]:
        """Gentleman-Sande: (a + b, (a - b)*w) mod q."""
        total = self.subtract_q_if_larger(self.b.add(a, b))
        difference = self.b.add(self.b.sub(a, b), _SPLAT_Q)
        return total, self.times_constant(difference, *w)


@intrinsic
def two_stages(
    _context: Any, tile: Any, at: Any, step: Any, zeta: Any, zeta_shoup: Any, first: Any, last: Any
) -> Any:
    """Two inverse-NTT stages on the four rows at `at`, `at+step`, ... of a flat uint32 tile.

    Stage one pairs rows (0,1) and (2,3) with twiddles zeta[first], zeta[first+1]; stage two
    pairs (0,2) and (1,3) with zeta[last].
    """
    signature = types.void(tile, types.intp, types.intp, zeta, zeta_shoup, types.intp, types.intp)

    def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        e = Emit(context, builder)
        base = e.data(sig.args[0], args[0])
        plain, shoup = e.data(sig.args[3], args[3]), e.data(sig.args[4], args[4])

        def twiddle(index: Any) -> tuple[Any, Any]:
            w = builder.load(builder.gep(plain, [index]))
            ws = builder.zext(builder.load(builder.gep(shoup, [index])), _I64)
            return e.broadcast(w, _V16), e.broadcast(ws, _V8)

        rows = [args[1]]
        for _ in range(3):
            rows.append(builder.add(rows[-1], args[2]))
        v = [e.load(base, row) for row in rows]
        w0 = twiddle(args[5])
        w1 = twiddle(builder.add(args[5], ir.Constant(args[5].type, 1)))
        w2 = twiddle(args[6])
        v[0], v[1] = e.butterfly(v[0], v[1], w0)
        v[2], v[3] = e.butterfly(v[2], v[3], w1)
        v[0], v[2] = e.butterfly(v[0], v[2], w2)
        v[1], v[3] = e.butterfly(v[1], v[3], w2)
        for row, value in zip(rows, v, strict=True):
            e.store(value, base, row)
        return context.get_dummy_value()

    return signature, build


@cache
def slot_product(rank: int) -> Callable[..., None]:
    """The intrinsic `product(matrix, at, secret, slot, out)` for one module rank.

    out[16*slot :][lane] = sum_k matrix[at + (256*k + slot)*16 + lane] * secret[256*k + slot]
    * 2^-32 mod q, in [0, q): products of centred int32 residues summed in 64 bits, then one
    Montgomery reduction.
    """

    @intrinsic
    def product(_context: Any, matrix: Any, at: Any, secret: Any, slot: Any, out: Any) -> Any:
        signature = types.void(matrix, types.intp, secret, types.intp, out)

        def build(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            e = Emit(context, builder)
            tiles, words, result = (
                e.data(sig.args[0], args[0]), e.data(sig.args[2], args[2]),
                e.data(sig.args[4], args[4]),
            )  # fmt: skip
            index = args[1].type
            lane0 = builder.mul(args[3], ir.Constant(index, LANES))
            even = odd = ir.Constant(_V8, [0] * _V8.count)
            for k in range(rank):
                where = builder.add(
                    builder.add(args[1], lane0), ir.Constant(index, k * RING_DEGREE * LANES)
                )
                row = builder.bitcast(e.load(tiles, where), _V8)
                place = builder.add(args[3], ir.Constant(index, k * RING_DEGREE))
                s = builder.sext(builder.load(builder.gep(words, [place])), _I64)
                s8 = e.broadcast(s, _V8)
                even = builder.add(even, builder.mul(e.low_signed(row), s8))
                odd = builder.add(odd, builder.mul(builder.ashr(row, _SPLAT_32), s8))
            sums = e.join_high(even, odd)
            taken = e.join_high(_multiple_of_q(e, even), _multiple_of_q(e, odd))
            e.store(e.add_q_if_negative(builder.sub(sums, taken)), result, lane0)
            return context.get_dummy_value()

        return signature, build

    return product


def _multiple_of_q(e: Emit, acc: Any) -> Any:
    """t*q with t = acc/q mod 2^32: its low half is that of acc, so the difference of the high
    halves is acc*2^-32 mod q (Montgomery).
    """
    factor = e.b.mul(e.b.and_(acc, _SPLAT_LOW), splat(_V8, _Q_INVERSE))
    return e.b.mul(e.low_signed(factor), splat(_V8, NTT_PRIME))


@intrinsic
def popcount(_context: Any, value: Any) -> Any:
    """Bits set in an unsigned integer (LLVM's ctpop: a vector instruction where there is one)."""

    def build(_ctx: Any, builder: ir.IRBuilder, _sig: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return value(value), build
