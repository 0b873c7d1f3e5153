"""A GPU that is not there: launches go through everything down to the driver's call, and end there.

Triton compiles its kernels for a Hopper and launches them by its own launcher, on a driver library
that does nothing (`null_cuda.c`). So what a launch costs the host can be measured, and what a
kernel would be given can be looked at, on a machine without a GPU. Needs gcc and Python's headers,
and a process in which Triton does not interpret.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

from backends.he.cuda.device import Gpu
from backends.he.cuda.tiling import HOPPER

_INCLUDES = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_MAX_BYTES, _MAX_ARGUMENTS = 4096, 64


class _Record(ctypes.Structure):
    _fields_ = (
        ("launches", ctypes.c_uint64), ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32), ("bytes", ctypes.c_uint32),
        ("arguments", ctypes.c_uint8 * _MAX_BYTES),
    )  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """The last launch that reached the driver; `arguments` are the bytes of all of them."""

    count: int
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    arguments: bytes


def missing() -> str | None:
    """Why there can be no null driver here; None when there can."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed"
    return None


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="private-lora-null-cuda-")


@cache
def library() -> ctypes.CDLL:
    """The driver library, loaded under the name that everyone looks for."""
    folder = _folder().name
    path = Path(folder, "libcuda.so.1")
    source = Path(__file__).with_name("null_cuda.c")
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{_INCLUDES}"]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", str(source), "-o", str(path)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def keep_arguments(sizes: Sequence[int]) -> None:
    """Arguments of coming launches are kept; each is of so many bytes."""
    wanted = (ctypes.c_uint32 * _MAX_ARGUMENTS).in_dll(library(), "null_sizes")
    wanted[:] = [*sizes, *[0] * (_MAX_ARGUMENTS - len(sizes))]


def last_launch() -> Launched:
    """What reached the driver."""
    record = _Record.in_dll(library(), "null_record")
    return Launched(
        record.launches, record.function, tuple(record.grid), tuple(record.block), record.shared,
        bytes(record.arguments[: record.bytes]),
    )  # fmt: skip


def null_gpu() -> Gpu:
    """A Hopper whose memory is the host's and whose kernels do nothing; Triton launches on it."""
    library()
    from triton.backends.nvidia.driver import CudaDriver

    active: Any = CudaDriver()
    active.get_device_capability = lambda device: HOPPER
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    driver.set_active(active)
    return Gpu(torch.device("cpu"), "null", HOPPER, 80 << 30, 132)
