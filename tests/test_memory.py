"""Freed memory goes back to the system although something lies behind it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from backends import memory
from backends.memory import Holes, give_back


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
    give_back()
    assert before - own_kb() > 32 << 10
    assert len(kept) == 16


def test_they_go_back_when_too_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the most that was ever in use, and not too often."""
    times, memory_now = 0, (0, 0)

    def count() -> None:
        nonlocal times
        times += 1

    monkeypatch.setattr(memory, "give_back", count)
    monkeypatch.setattr(memory, "_memory", lambda: memory_now)
    holes = Holes()

    def looked(held: int, used: int, calls: int) -> int:
        nonlocal times, memory_now
        times, memory_now = 0, (held, used)
        for _ in range(calls):
            holes.look()
        return times

    assert looked(149, 100, 96) == 0
    assert looked(149, 20, 96) == 0
    assert looked(151, 20, 15) == 0
    assert looked(151, 20, 1) == 1
    assert looked(151, 20, 15) == 0
    assert looked(151, 20, 17) == 2
    assert looked(180, 130, 95) == 0


def test_a_look_at_memory_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes milliseconds where what is free is in many pieces."""
    looks = 0

    def look() -> tuple[int, int]:
        nonlocal looks
        looks += 1
        return 0, 0

    monkeypatch.setattr(memory, "_memory", look)
    holes = Holes()
    for _ in range(160):
        holes.look()
    assert looks == 10


def test_what_is_held_and_used_is_seen() -> None:
    """Freed between what stays, it is held and no longer used, where the C library is glibc."""
    pieces = [np.ones(8192) for _ in range(1024)]
    held, used = memory._memory()
    del pieces[::2]
    after, less = memory._memory()
    assert used - less > 16 << 20
    assert held - after < 8 << 20
    give_back()
    assert after - memory._memory()[0] > 16 << 20
    assert len(pieces) == 512


def test_one_heap_is_kept() -> None:
    """In a process of its own: what a thread frees and allocates again meets no page faults."""
    program = """
        import resource, sys, threading, numpy as np
        from backends.memory import keep_one_heap
        if sys.argv[1] == "kept":
            keep_one_heap()
        def work():
            for turn in range(20):
                if turn == 2:
                    global before
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                arrays = [np.ones(1 << 20, np.uint8) for _ in range(64)]
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {}
    for how in ("plain", "kept"):
        command = [sys.executable, "-c", dedent(program), how]
        faults[how] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert faults["kept"] < faults["plain"] / 10
