"""Stands between the runner and one part: python -m benchmarks.gpu.supervisor FOLDER

Runs `benchmarks.gpu.child FOLDER` and ends as it does, at the latest at the time that
FOLDER/job.json names, or when the runner ends, however that came about. Nothing that the part
started is left then, whatever session it moved to: orphans become children of this process. It
imports next to nothing and never touches the GPU, so that nothing there can hang it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl's PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER
_ORDERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_AWAITED = (signal.SIGCHLD, *_ORDERS)
_REAPING_S = 3.0  # one that the driver does not let go of is left behind after that

LATE = -signal.SIGALRM
"""Exit status, as `subprocess` has it, of a part that was stopped at its deadline."""


def main(folder: Path) -> None:
    """Run the part, kill what is left of it, end as it did."""
    job = json.loads((folder / "job.json").read_text())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core that large takes long to write
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an ignored one would take the status with it
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    _prctl(_ADOPT_ORPHANS, 1)
    _prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != job["runner"]:
        return  # it ended before it could be watched
    part = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.child", str(folder)],
        preexec_fn=partial(_begin, os.getpid()),
    )
    status = _ended(part, job["ends_s"])
    _kill_descendants()
    _end_as(status)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _begin(supervisor: int) -> None:
    """In the part's process, before its program: a session of its own, and no life without us."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)


def _ended(part: subprocess.Popen[bytes], ends_s: float) -> int:
    """Its exit status; LATE at its deadline, that of an order to stop when one came."""
    while part.poll() is None:
        left_s = ends_s - time.monotonic()
        if left_s <= 0:
            return LATE
        got = signal.sigtimedwait(_AWAITED, left_s)
        if got is not None and got.si_signo in _ORDERS:
            return -got.si_signo
    return int(part.returncode)


def _kill_descendants() -> None:
    until_s = time.monotonic() + _REAPING_S
    while time.monotonic() < until_s:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        found = descendants(os.getpid())
        if not found:
            return
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def descendants(ancestor: int) -> set[int]:
    """Processes that it started, and that these started, as far as their parents live."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            # The name before the last bracket may hold anything.
            fields = stat.read_bytes().rpartition(b")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    new = {ancestor}
    while new:
        new = {process for process, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _end_as(status: int) -> None:
    sys.stdout.flush()
    if status < 0:
        with contextlib.suppress(OSError, ValueError):  # SIGKILL takes no handler
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
