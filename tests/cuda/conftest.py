"""One suite for both: on a machine with a GPU it runs there, elsewhere its kernels are emulated.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before any is imported.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from backends.he.cuda.device import Gpu, emulated, find_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the device, where there is one, is marked: `benchmarks.gpu` runs nothing else."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The GPU of this machine, or its stand-in."""
    return find_gpu() if torch.cuda.is_available() else emulated()


@pytest.fixture(scope="session")
def compiler(gpu: Gpu) -> None:
    """What runs the CUDA C++: CuPy on a GPU, else g++; skips where that is missing."""
    if gpu.device.type != "cuda" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


@pytest.fixture(scope="session")
def oldest_store(pytestconfig: pytest.Config) -> Path:
    """Where the oldest Triton is kept from one run to the next."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("oldest-triton")
