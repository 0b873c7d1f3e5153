"""Parts of the benchmark that go wrong in every way a GPU can make them, and one that does not."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.task import Figures, Task


def works(task: Task) -> Figures:
    """Sees what the parts before it found."""
    return {"known": sorted(task.known)}


def hangs(task: Task) -> Figures:
    """Behind what it has found, with a process of its own, in a session of its own."""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Path(task.preset).write_text(f"{sleeper.pid} {os.getpid()}\n")
    task.keep({"half": 1})
    time.sleep(600)
    return {}


def aborts(task: Task) -> Figures:
    """As a library does that finds its own state broken."""
    os.abort()


def faults(task: Task) -> Figures:
    """Reads from nowhere."""
    return {"never": ctypes.string_at(0)}


def raises(task: Task) -> Figures:
    """As any Python does."""
    raise RuntimeError("no such luck")


def unnamed_signal(task: Task) -> Figures:
    """Real-time signals have no names in Python. Behind output that is no text."""
    os.write(1, b"\xff" * 5000 + b"\nthe last words\n")
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
    return {}


def breaks_its_files(task: Task) -> Figures:
    """Half of the figures, and a warning that is no text."""
    os.chdir(sys.argv[1])
    Path("figures.json").write_text('{"half":')
    Path("warnings.txt").write_bytes(b"\xff\xfe\n")
    os._exit(1)


def removes_its_folder(task: Task) -> Figures:
    """With everything the runner wants to read."""
    shutil.rmtree(sys.argv[1])
    os._exit(1)


def ends_early(task: Task) -> Figures:
    """As when a library calls exit(0)."""
    task.keep({"half": 1})
    os._exit(0)


def no_number(task: Task) -> Figures:
    """JSON has none for it."""
    task.keep({"half": 1})
    return {"ratio": float("nan")}


def blames(task: Task) -> Figures:
    """A tiling that there is not, then one for each time that it runs, and much after that."""
    from backends.he.cuda.tiling import SKIP_VARIABLE, TILINGS

    skipped = os.environ[SKIP_VARIABLE]
    left = [tiling.name for tiling in TILINGS if not tiling.matches(skipped)]
    print(f"{SKIP_VARIABLE}=fake-{len(left)}\nset {SKIP_VARIABLE}={left[0]} to do without it")
    print("x" * 3_000_000)
    raise RuntimeError("no more")


def one_tiling_fails(task: Task) -> Figures:
    """The tuner meets a tiling whose launch fails, and one that poisons the whole process."""
    import torch

    from backends.he.cuda import tuner
    from backends.he.cuda.device import Gpu, emulated
    from backends.he.cuda.gemm import library_product
    from backends.he.cuda.tiling import AMPERE_LARGE, Tiling

    bad, worse = AMPERE_LARGE[:2]

    def poisoned(gpu: Gpu) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def product(
        planes: torch.Tensor, weight: torch.Tensor, bits: int, tiling: Tiling
    ) -> torch.Tensor:
        if tiling == bad:
            raise RuntimeError("Triton Error [CUDA]: unspecified launch failure")
        if tiling == worse:
            Gpu.synchronize = poisoned  # type: ignore[method-assign]
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return library_product(planes, weight, bits)

    tuner.fused_product = product
    tuner.milliseconds = lambda planes, weight, bits, tiling: tiling.stages  # type: ignore[assignment]
    chooser = tuner.Tuner(emulated())
    options = tuner.candidates((8, 0), 4096, chooser._skipped)
    planes = torch.ones((3, 5, 8), dtype=torch.int8)
    return {"chosen": chooser._fastest(planes, planes[0], 8, options).name}
