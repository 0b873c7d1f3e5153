"""The kernels read and write nothing that is not theirs, as far as AddressSanitizer sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


def sanitised(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The round trips in a process that watches its memory; skips where that cannot be had."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("this g++ has no AddressSanitizer")
    environment = os.environ | {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}

    def python(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    if python("-c", "pass").returncode:
        pytest.skip("AddressSanitizer does not start on this machine")
    return python("-m", "tests.cuda.round_trips", *arguments)


def test_round_trips_touch_nothing_else() -> None:
    """Ragged sizes, both presets at the ends of the ranks, hints resident and streamed."""
    ended = sanitised()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(ended.stdout.splitlines()) == 2 * 4 * 2


def test_a_stray_read_would_be_seen() -> None:
    """The same with a tile that is read past its matrix."""
    ended = sanitised("--planted")
    assert ended.returncode != 0
    assert "heap-buffer-overflow" in ended.stderr
