"""Between whole bytes and what travels, on the device: `wire.py`'s layout, by torch's operations.

A few passes over memory on the current stream. Every bit of it is public; what `he/packing.py` does
on the CPU is its reference. None of it has run on a GPU yet: tests emulate the device.
"""

from __future__ import annotations

import torch

from backends.he.wire import Format


class Request:
    """The digits of one request, and what travels of them.

    planes  int8[limbs, T, K], for a kernel to write

    Both are parts of one piece of memory: the higher planes travel from where they are written, and
    where all bits are in use the lowest does too.
    """

    def __init__(self, tokens: int, inputs: int, form: Format, device: torch.device) -> None:
        self._unused, self._tokens = form.unused_bits, tokens
        self._plane, self._planes = tokens * inputs, form.limbs * tokens * inputs
        spare = self._plane if self._unused else 0  # for the lowest digits as they are written
        size = spare + tokens * form.up_bytes(inputs)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        written = self._memory[: self._planes].view(torch.int8)
        self.planes = written.view(form.limbs, tokens, inputs)

    def payload(self) -> torch.Tensor:
        """uint8[T * up_bytes(K)] of planes whose lowest `unused_bits` bits are zero."""
        if not self._unused:
            return self._memory
        lowest, packed = self._memory[: self._plane], self._memory[self._planes :]
        values = lowest.view(self._tokens, -1) >> self._unused
        _pack(values, 8 - self._unused, packed.view(self._tokens, -1))
        return self._memory[self._plane :]


def unpack_answer(raw: torch.Tensor, tokens: int, outputs: int, form: Format) -> torch.Tensor:
    """uint16[tokens, outputs] from the bytes of an answer, uint8[tokens * down_bytes(outputs)].

    The same memory for 16 bits. Raises ValueError for another size.
    """
    form.require_answer(raw.numel(), tokens, outputs)
    bits, size = form.down_bits - 8, tokens * outputs
    if bits == 8:
        return raw.view(torch.uint16).view(tokens, outputs)
    # Signed, because torch does little with uint16; all values are below 2^12.
    values = raw[:size].view(tokens, outputs).to(torch.int16)
    if bits:
        values <<= bits
        values |= _unpack(raw[size:].view(tokens, -1), bits, outputs)
    return values.view(torch.uint16)


def whole_bytes(form: Format) -> bool:
    """Whether requests travel as planes of digits, with nothing to unpack."""
    return not form.unused_bits


def unpack_request(payload: torch.Tensor, form: Format, planes: torch.Tensor) -> None:
    """payload uint8[T * up_bytes(K)] -> planes uint8[limbs, T, K], which may be a strided view."""
    limbs, tokens, inputs = planes.shape
    if whole_bytes(form):
        planes.copy_(payload.view(limbs, tokens, inputs))
        return
    high = (limbs - 1) * tokens * inputs
    planes[1:] = payload[:high].view(limbs - 1, tokens, inputs)
    low = payload[high:].view(tokens, -1, 1)
    # Higher values of a byte leave it by the shift to the left.
    values = low >> _shifts(8 - form.unused_bits, payload.device) << form.unused_bits
    planes[0] = values.view(tokens, -1)[:, :inputs]


def pack_answer(values: torch.Tensor, form: Format) -> torch.Tensor:
    """values int16[T, N], the bits of uint16, -> uint8[T * down_bytes(N)].

    The same memory for 16 bits. `values` are contiguous.
    """
    bits = form.down_bits - 8
    if bits == 8:
        return values.view(-1).view(torch.uint8)
    upper = (values >> bits).to(torch.uint8).view(-1)
    if not bits:
        return upper
    tokens, outputs = values.shape
    lower = (values & ((1 << bits) - 1)).to(torch.uint8)
    lower = torch.nn.functional.pad(lower, (0, -outputs % (8 // bits)))
    placed = lower.view(tokens, -1, 8 // bits) << _shifts(bits, values.device)
    return torch.cat([upper, placed.sum(dim=2, dtype=torch.uint8).view(-1)])


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _pack(values: torch.Tensor, bits: int, packed: torch.Tensor) -> None:
    """values uint8[T, n] of 2 or 4 bits -> packed uint8[T, packed_bytes(n, bits)]."""
    missing = -values.shape[1] % (8 // bits)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    parts = values.view(*packed.shape, 8 // bits) << _shifts(bits, values.device)
    torch.sum(parts, 2, dtype=torch.uint8, out=packed)


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8[T, packed_bytes(count, bits)] -> uint8[T, count]."""
    parts = packed[:, :, None] >> _shifts(bits, packed.device) & ((1 << bits) - 1)
    return parts.view(len(packed), -1)[:, :count]
