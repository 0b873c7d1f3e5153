"""Kernels cached on disk: never the code of another meaning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends import jit

ROOT = Path(__file__).resolve().parent.parent


def test_every_source_file_of_the_kernels_is_in_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A constant of any file may be compiled into a kernel of any other."""
    deep = tmp_path / "he" / "matmul" / "isa.py"
    deep.parent.mkdir(parents=True)
    deep.write_text("ROWS = 12\n")
    monkeypatch.setattr(jit, "_HERE", tmp_path)
    before = jit._digest()
    assert jit._digest() == before
    deep.write_text("ROWS = 6\n")
    assert jit._digest() != before


def test_nothing_in_the_backends_uses_numbas_own_cache() -> None:
    files = [*(ROOT / "backends").rglob("*.py"), *(ROOT / "sim").rglob("*.py")]
    guilty = [f.name for f in files if re.search(r"jit\([^)]*\bcache=True", f.read_text())]
    assert not guilty


MODULE = """
from backends import jit

FACTOR = 0

def _scaled(values):
    return values.sum() * FACTOR + values.ndim

twice = jit.specialised(_scaled, "twice", FACTOR=2)
thrice = jit.specialised(_scaled, "thrice", FACTOR=3)

@jit.kernel
def dimensions(values):
    return values.ndim
"""

SLOW = """
import time
from numba.core import caching
index, data = caching.IndexDataCacheFile._save_index, caching.IndexDataCacheFile._save_data
def slow(what):
    def saved(self, *arguments):
        time.sleep(0.5)
        what(self, *arguments)
        time.sleep(0.5)
    return saved
caching.IndexDataCacheFile._save_index = slow(index)
caching.IndexDataCacheFile._save_data = slow(data)
"""


def _python(folder: Path, *lines: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _said(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said.strip()


def test_two_processes_and_two_meanings(tmp_path: Path) -> None:
    """Two processes fill a cold cache at once, slowly; a third finds what each of them meant."""
    (tmp_path / "kernels_here.py").write_text(MODULE)
    first = "import numpy as np, kernels_here as k"
    flat = "print(k.dimensions(np.ones(3)), k.twice(np.ones(3)))"
    square = "print(k.dimensions(np.ones((2, 2))), k.thrice(np.ones(3)))"
    both = [_python(tmp_path, SLOW, first, line) for line in (flat, square)]
    assert [_said(process) for process in both] == ["1 7.0", "2 10.0"]
    hits = "print(*(sum(f.stats.cache_hits.values()) for f in (k.dimensions, k.twice, k.thrice)))"
    third = _said(_python(tmp_path, first, flat, square, hits))
    assert third.splitlines() == ["1 7.0", "2 10.0", "2 1 1"]
