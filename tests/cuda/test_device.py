"""Finding a GPU: every refusal says what to do, and a GPU that will do is described."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from backends.he.cuda import device
from backends.he.cuda.device import Gpu, GpuError, emulated, find_gpu, require_memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one H200, as torch would describe it."""
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=140 << 30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return properties


@pytest.mark.usefixtures("machine")
def test_a_good_gpu_is_described() -> None:
    """What the rest of the code asks of it."""
    gpu = find_gpu()
    assert gpu == Gpu(torch.device("cuda", 0), "NVIDIA H200", (9, 0), 140 << 30, 132)


@pytest.mark.usefixtures("machine")
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU wheel cannot see a GPU; the other one is named."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(GpuError, match=r"without CUDA; .*download\.pytorch\.org/whl/cu\d+"):
        find_gpu()


@pytest.mark.usefixtures("machine")
def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA wheel on a machine without a driver, or with the GPU hidden."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(GpuError, match=r"nvidia-smi.*CUDA_VISIBLE_DEVICES \(-1\)"):
        find_gpu()


@pytest.mark.usefixtures("machine")
def test_no_such_gpu() -> None:
    """A number past the last."""
    with pytest.raises(GpuError, match="no GPU 3: this machine has 1"):
        find_gpu(3)


@pytest.mark.usefixtures("machine")
def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel compiler is missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GpuError, match="pip install triton"):
        find_gpu()


def test_an_old_gpu(machine: SimpleNamespace) -> None:
    """Turing's tensor cores are too old."""
    machine.name, machine.major, machine.minor = "Tesla T4", 7, 5
    with pytest.raises(GpuError, match=r"Tesla T4 has compute capability 7\.5.*8\.0"):
        find_gpu()


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed for what, what is free, and the switch that helps."""
    gpu = Gpu(torch.device("cuda", 0), "NVIDIA H200", (9, 0), 140 << 30, 132)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (2 << 30, 140 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 2 << 30)
    assert gpu.free_bytes() == 3 << 30
    require_memory(gpu, {"weights": 2 << 30, "hints": 1 << 30}, "use --fewer")
    with pytest.raises(GpuError) as refusal:
        require_memory(gpu, {"weights": 2 << 30, "hints": 3 << 29}, "use --fewer")
    assert str(refusal.value) == (
        "NVIDIA H200 has 3.00 GiB free of 140.00 GiB, but 3.50 GiB are needed "
        "(weights 2.00 GiB, hints 1.50 GiB); use --fewer"
    )


def test_the_stand_in() -> None:
    """It takes the same calls and is plainly no GPU."""
    gpu = emulated()
    assert gpu.device.type == "cpu"
    assert gpu.capability < device.MIN_CAPABILITY
    assert gpu.pinned(5).shape == (5,)
    gpu.synchronize()
    require_memory(gpu, {"all": gpu.free_bytes()}, "")


def test_page_locked_memory(gpu: Gpu) -> None:
    """Where there is a GPU, copies from it need no bounce."""
    block = gpu.pinned(1000)
    assert block.dtype == torch.uint8
    assert block.is_pinned() == (gpu.device.type == "cuda")
