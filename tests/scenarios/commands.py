"""Runs the project's commands as users do, in processes of their own, to the end or to Ctrl-C.

To import torch, transformers and peft takes each process seconds. So `run` has its processes forked
from one that has imported these already, and nothing of the project but what must come before them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OURS = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
_LIBRARIES = [
    "backends", "torch", "transformers.generation", "peft", "numba", "scipy.stats",
    "matplotlib.pyplot",
]  # fmt: skip


@lru_cache(maxsize=1)
def _server() -> multiprocessing.context.ForkServerContext:
    os.environ |= _OURS  # read when the libraries are imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    return context


def _begin(args: Sequence[str], cwd: Path, environment: Mapping[str, str], outputs: Path) -> None:
    """What such a process does."""
    for descriptor in (1, 2):
        os.dup2(os.open(outputs / str(descriptor), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [str(cwd)]
    sys.argv[:] = ["-m", *args[1:]]
    runpy.run_module(args[0], run_name="__main__", alter_sys=True)


def run(*args: str, cwd: Path = ROOT, code: int = 0) -> str:
    """Output of `python -m ...`; checks the exit status."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = Path(directory)
        process = _server().Process(
            target=_begin, args=(args, cwd, dict(os.environ | _OURS), outputs)
        )
        process.start()
        process.join(280)
        if process.exitcode is None:
            process.kill()
            process.join()
        said = "".join((outputs / name).read_text() for name in ("1", "2"))
    assert process.exitcode == code, said
    return said


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
