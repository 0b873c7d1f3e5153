"""The layout of `wire.py` on a device, by torch operations on its current stream.

A few passes over memory beside the product's one launch. The bits are those of `he/packing.py`,
which tests on an emulated device hold it to; how long it takes on a GPU has not been measured.
"""

from __future__ import annotations

import torch

from backends.he.wire import Format


def whole_bytes(format: Format) -> bool:
    """Whether requests travel as planes of digits, with nothing to unpack."""
    return not format.unused_bits


def unpack_request(payload: torch.Tensor, format: Format, planes: torch.Tensor) -> None:
    """payload uint8[T * up_bytes(K)] -> planes uint8[limbs, T, K], which may be a strided view."""
    limbs, tokens, inputs = planes.shape
    if whole_bytes(format):
        planes.copy_(payload.view(limbs, tokens, inputs))
        return
    high = (limbs - 1) * tokens * inputs
    planes[1:] = payload[:high].view(limbs - 1, tokens, inputs)
    low = payload[high:].view(tokens, -1, 1)
    # Higher values of a byte leave it by the shift to the left.
    values = low >> _places(8 - format.unused_bits, payload.device) << format.unused_bits
    planes[0] = values.view(tokens, -1)[:, :inputs]


def pack_answer(values: torch.Tensor, format: Format) -> torch.Tensor:
    """values int16[T, N], the bits of uint16, -> uint8[T * down_bytes(N)].

    The same memory for 16 bits. `values` are contiguous.
    """
    bits = format.down_bits - 8
    if bits == 8:
        return values.view(-1).view(torch.uint8)
    upper = (values >> bits).to(torch.uint8).view(-1)
    if not bits:
        return upper
    tokens, outputs = values.shape
    lower = (values & ((1 << bits) - 1)).to(torch.uint8)
    lower = torch.nn.functional.pad(lower, (0, -outputs % (8 // bits)))
    placed = lower.view(tokens, -1, 8 // bits) << _places(bits, values.device)
    return torch.cat([upper, placed.sum(dim=2, dtype=torch.uint8).view(-1)])


def _places(bits: int, device: torch.device) -> torch.Tensor:
    """Where the values of a byte begin, uint8[8 / bits]."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
