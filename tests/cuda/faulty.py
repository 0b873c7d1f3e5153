"""Parts of the benchmark that go wrong in every way a GPU can make them, and one that does not."""

from __future__ import annotations

import ctypes
import os
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
