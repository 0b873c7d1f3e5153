"""How even the bytes of a ciphertext are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Uniformity:
    """Of some bytes.

    counts      256: how often each value occurs
    chi_square  of the counts against equal ones
    p_value     how often bytes of pure chance have at least that chi-square
    entropy     bits per byte, estimated from the counts
    """

    counts: list[int]
    chi_square: float
    p_value: float
    entropy: float


def uniformity(data: bytes) -> Uniformity:
    """Raises ValueError for no bytes at all."""
    if not data:
        raise ValueError("no bytes, so nothing can be said of how even they are")
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    chi_square = float(np.sum((counts - expected) ** 2) / expected)
    # The survival function of the chi-square law with 255 degrees of freedom.
    halves = torch.tensor([255 / 2, chi_square / 2], dtype=torch.float64)
    p_value = torch.special.gammaincc(halves[0], halves[1]).item()
    shares = counts[counts > 0] / len(data)
    return Uniformity(
        counts.tolist(), chi_square, p_value, float(-np.sum(shares * np.log2(shares)))
    )


def hex_rows(data: bytes, width: int = 16) -> list[tuple[str, str]]:
    """(offset, bytes in hex) of each row of so many bytes."""
    starts = range(0, len(data), width)
    return [(f"{at:04x}", data[at : at + width].hex(" ")) for at in starts]
