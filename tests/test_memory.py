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


def test_they_go_back_when_the_heap_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where much of it is free: not while it stays as it is, nor when it is full, nor too often."""
    times, heap = 0, (100, 50)

    def count() -> None:
        nonlocal times
        times += 1

    monkeypatch.setattr(memory, "give_back", count)
    monkeypatch.setattr(memory, "_heap", lambda: heap)
    holes = Holes()

    def looked(size: int, free: int, calls: int = 16) -> int:
        nonlocal times, heap
        times, heap = 0, (size, free)
        for _ in range(calls):
            holes.look()
        return times

    assert looked(100, 50, 15) == 0
    assert looked(100, 50, 100) == 1
    assert looked(100, 90, 100) == 0
    assert looked(120, 10, 100) == 0
    assert looked(120, 60, 5) == 1
    assert looked(140, 60, 5) == 0


def test_the_heap_is_looked_at() -> None:
    """What is allocated and freed shows, where the C library is glibc."""
    pieces = [np.ones(8192) for _ in range(1024)]
    size, free = memory._heap()
    del pieces[::2]
    after, more = memory._heap()
    assert after == size
    assert more - free > 16 << 20
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
