"""How the values of one matrix travel: how many bits, and where each bit is.

The worker computes mod 2^(8*limbs), on signed base-256 digit planes. A ciphertext value of fewer
bits has zeros below: rounding to `up_bits` is rounding to a multiple of 2^unused_bits. So one
product serves every format, and only the bits that are not zero travel.

A request of T tokens with K inputs, where c = 8 - unused_bits bits of the lowest digit are in use:

    c = 8    int8[limbs, T, K], lowest digits first: the wire bytes are the product's operand
    else     int8[limbs - 1, T, K], the higher digits; then uint8[T, ceil(K*c/8)], the lowest ones
             shifted right by 8 - c, 8/c to a byte, the first of them in the lowest bits

An answer of T tokens with N outputs, of `down_bits` w:

    w = 16   uint16[T, N], little endian
    w = 8    uint8[T, N]
    else     uint8[T, N], the upper eight bits; then uint8[T, ceil(N*(w-8)/8)], the others, packed
             the same way

All that is the module-LWE scheme's. Of another, `Packing` says how many bytes there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

UP_BITS = (16, 18, 20, 24)
DOWN_BITS = (8, 10, 12, 16)


def packed_bytes(values: int, bits: int) -> int:
    """Bytes of a row of values of so many bits (0, 2, 4 or 8), each row of whole bytes."""
    return -(-values * bits // 8)


@dataclass(frozen=True)
class Format:
    """Public; chosen by the planner for one direction of one group.

    up_bits    of a ciphertext value: log2 of the modulus that it is rounded to, one of UP_BITS
    down_bits  of a result, one of DOWN_BITS
    """

    up_bits: int = 24
    down_bits: int = 16

    def __post_init__(self) -> None:
        if self.up_bits not in UP_BITS or self.down_bits not in DOWN_BITS:
            raise ValueError(
                f"{self.up_bits} bits up and {self.down_bits} down: choose of {UP_BITS} and "
                f"{DOWN_BITS}"
            )

    @property
    def limbs(self) -> int:
        """Base-256 digits of a value: 2 or 3."""
        return -(-self.up_bits // 8)

    @property
    def modulus(self) -> int:
        """2^(8*limbs), which the worker computes in."""
        return 1 << (8 * self.limbs)

    @property
    def unused_bits(self) -> int:
        """Lowest bits of a value that are always zero."""
        return 8 * self.limbs - self.up_bits

    @property
    def unit(self) -> int:
        """2^unused_bits: what values are rounded to a multiple of."""
        return 1 << self.unused_bits

    @property
    def dropped_bits(self) -> int:
        """delta: low bits the worker rounds away from each result."""
        return 8 * self.limbs - self.down_bits

    def up_bytes(self, inputs: int) -> int:
        """Bytes a token of a request with so many inputs."""
        low = 8 - self.unused_bits
        return (self.limbs - 1) * inputs + packed_bytes(inputs, low)

    def down_bytes(self, outputs: int) -> int:
        """Bytes a token of an answer with so many outputs."""
        return outputs + packed_bytes(outputs, self.down_bits - 8)

    def require_request(self, size: int, tokens: int, inputs: int) -> None:
        """Raise ValueError unless a request of so many tokens and inputs has `size` bytes."""
        expected = tokens * self.up_bytes(inputs)
        if size != expected:
            raise ValueError(
                f"a request of {tokens} tokens with {inputs} inputs has {expected} bytes, this one "
                f"{size}"
            )

    def require_answer(self, size: int, tokens: int, outputs: int) -> None:
        """Raise ValueError unless an answer with so many tokens and outputs has `size` bytes."""
        expected = tokens * self.down_bytes(outputs)
        if size != expected:
            raise ValueError(
                f"an answer of {tokens} tokens with {outputs} outputs has {expected} bytes, this "
                f"one {size}"
            )


EXACT = Format(24, 16)


@dataclass(frozen=True)
class Packing:
    """Sizes under a scheme that has no `Format`: the same for every input and result. Public.

    digest        32 bytes of all that both sides must agree on
    block_tokens  that share a ciphertext; a last block of fewer has the size of a whole one
    value_bytes   of an input, or a result, of one block
    """

    digest: bytes
    block_tokens: int
    value_bytes: int

    def bytes_of(self, values: int, tokens: int) -> int:
        """Of a request of so many inputs, or an answer of so many results, for so many tokens."""
        return -(-tokens // self.block_tokens) * values * self.value_bytes

    def require(self, size: int, values: int, tokens: int) -> None:
        """Raise ValueError unless that many bytes are `size`."""
        expected = self.bytes_of(values, tokens)
        if size != expected:
            raise ValueError(
                f"{values} values of {tokens} tokens have {expected} bytes, these have {size}"
            )


CLEAR = Packing(hashlib.sha256(b"clear").digest(), 1, 4)
"""Without encryption: float32."""
