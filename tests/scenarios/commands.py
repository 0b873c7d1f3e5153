"""Runs the project's commands as users do, in processes of their own, to the end or to Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OURS = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(*args: str, cwd: Path = ROOT, code: int = 0) -> str:
    """Output of `python -m ...`; checks the exit status."""
    result = subprocess.run(
        [sys.executable, "-m", *args], cwd=cwd, capture_output=True, text=True, timeout=280,
        env=os.environ | _OURS,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def readable_by_others(*places: Path) -> list[str]:
    """Files and directories, these and all below, that not only their owner may open."""
    every = [path for place in places for path in (place, *place.rglob("*"))]
    assert len(every) > len(places)
    return [str(path) for path in every if path.stat().st_mode & 0o077]


def interrupt(*args: str, seen: str) -> str:
    """Output of `python -m ...`, which gets Ctrl-C once it has written `seen`.

    Checks that it ends in the status of an interrupted command, 130.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | _OURS,
        # A shell that put this test run in the background has made it deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    assert process.stdout is not None
    text = ""
    while seen not in text and time.monotonic() < deadline:
        text += process.stdout.read(16)
    process.send_signal(signal.SIGINT)
    text += process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    return text
