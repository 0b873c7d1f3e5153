"""Sizes as people read them."""

from __future__ import annotations

import math


def human_bytes(size: float) -> str:
    """'3.1 GB' and the like."""
    if size < 1000:
        return f"{size:.0f} B"
    power = min(4, int(math.log10(size) // 3))
    return f"{size / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"
