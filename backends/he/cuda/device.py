"""Which GPU, whether it will do, and how much of it is free.

Holds no secret, and is imported by workers and owners alike. Arrays on the device are torch
tensors, so torch's allocator is the only one; everything is queued on torch's current stream.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from backends.errors import UserError
from backends.he.cuda.clock import DeviceClock

MIN_CAPABILITY = (8, 0)
"""Ampere: the first with int8 tensor cores that take every shape the kernels use."""

_AS_IT_IS = nullcontext()


class GpuError(UserError, RuntimeError):
    """The GPU cannot be used as it is; the text says what to do about it."""


@dataclass(frozen=True)
class Gpu:
    """One device. `device` is a CUDA device, or the CPU when kernels are emulated for tests.

    capability       compute capability, (9, 0) for Hopper
    total_bytes      device memory
    multiprocessors  streaming multiprocessors
    clock            of device time, off until a report wants it
    """

    device: torch.device
    name: str
    capability: tuple[int, int]
    total_bytes: int
    multiprocessors: int
    clock: DeviceClock = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clock", DeviceClock(self.device))

    def free_bytes(self) -> int:
        """Device memory an allocation could still get: free ones and torch's own unused."""
        if self.device.type != "cuda":
            return self.total_bytes
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached

    def synchronize(self) -> None:
        """Wait until the device has done everything queued, on all streams."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pinned(self, size: int) -> torch.Tensor:
        """uint8[size] on the host, page-locked where there is a GPU, not initialised."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def find_gpu(index: int = 0) -> Gpu:
    """GPU number `index`.

    Raises GpuError: a torch built without CUDA, no driver or no such device, no Triton, a GPU
    older than compute capability 8.0.
    """
    if torch.version.cuda is None:
        raise GpuError(
            f"torch {torch.__version__} is built without CUDA; put the CUDA build in its place: "
            f"pip uninstall torch, then pip install torch=={torch.__version__.partition('+')[0]} "
            "--index-url https://download.pytorch.org/whl/cu130"
        )
    if not torch.cuda.is_available():
        raise GpuError(
            f"torch is built for CUDA {torch.version.cuda}, but finds no GPU it can use: check "
            "that `nvidia-smi` lists one, that its driver supports this CUDA, and that "
            f"CUDA_VISIBLE_DEVICES ({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) "
            "does not hide it"
        )
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise GpuError(f"there is no GPU {index}: this machine has {count}, numbered from 0")
    if importlib.util.find_spec("triton") is None:
        raise GpuError("Triton is missing, which torch's CUDA wheel brings: pip install triton")
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    if capability < MIN_CAPABILITY:
        raise GpuError(
            f"{found.name} has compute capability {found.major}.{found.minor}; the int8 kernels "
            f"need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or newer"
        )
    return Gpu(
        torch.device("cuda", index),
        found.name,
        capability,
        found.total_memory,
        found.multi_processor_count,
    )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, `device` is the current one; nothing to do where it is already, as nearly always."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)


def emulated() -> Gpu:
    """A stand-in for tests on a machine without a GPU: tensors on the CPU, kernels interpreted."""
    return Gpu(torch.device("cpu"), "emulated", (0, 0), 4 << 30, 1)


def require_memory(gpu: Gpu, needs: Mapping[str, int], advice: str) -> None:
    """Raise GpuError when `needs`, bytes by what they are for, do not fit `gpu`.

    advice  which switch lowers the need, the end of the message
    """
    needed, free = sum(needs.values()), gpu.free_bytes()
    if needed <= free:
        return
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needs.items())
    raise GpuError(
        f"{gpu.name} has {_gib(free)} free of {_gib(gpu.total_bytes)}, but {_gib(needed)} are "
        f"needed ({parts}); {advice}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
