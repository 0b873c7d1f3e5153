"""Freed memory goes back to the system although something lies behind it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from backends.memory import give_back_sometimes


def own_kb() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def test_holes_go_back() -> None:
    """Of 64 MB in small pieces, freed but for one of 64."""
    pieces = [np.ones(8192) for _ in range(1024)]
    kept = pieces[::64]
    del pieces
    before = own_kb()
    for _ in range(16):
        give_back_sometimes()
    assert before - own_kb() > 32 << 10
    assert len(kept) == 16
