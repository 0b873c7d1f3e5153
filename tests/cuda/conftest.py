"""One suite for both: on a machine with a GPU it runs there, elsewhere its kernels are emulated.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before any is imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from backends.he.cuda.device import Gpu, emulated, find_gpu


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The GPU of this machine, or its stand-in."""
    return find_gpu() if torch.cuda.is_available() else emulated()


@pytest.fixture(scope="session")
def compiler(gpu: Gpu) -> None:
    """What runs the CUDA C++: CuPy on a GPU, else g++; skips where that is missing."""
    if gpu.device.type != "cuda" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


@pytest.fixture(scope="session", autouse=True)
def one_interpreted_launch_at_a_time(gpu: Gpu) -> Iterator[None]:
    """Triton's interpreter keeps its state in its modules: launches of two threads would mix."""
    if gpu.device.type == "cuda" or importlib.util.find_spec("triton") is None:
        yield
        return
    from backends.he.cuda import worker

    product, busy = worker.fused_product, threading.Lock()

    def alone(*args: Any) -> torch.Tensor:
        with busy:
            return product(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "fused_product", alone)
        yield
