"""Where a run computes: what it needs of a GPU is known before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.hardware import Hardware, activation_bytes, check_memory
from backends.he.cuda.device import Gpu, GpuError, emulated
from scenarios.preparation import prepared_for
from tests.nn.conftest import LLAMA, Tiny, make_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Llama, prepared on the CPU."""
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def small_gpu(total_bytes: int) -> Gpu:
    """An emulated GPU with so much memory."""
    return replace(emulated(), total_bytes=total_bytes)


def test_too_little_memory_says_how_much_for_what_and_which_switch(llama: Tiny) -> None:
    """Every part with its size, and what to lower."""
    prepared = llama.prepared["mlwe"]
    with pytest.raises(GpuError) as error:
        check_memory(small_gpu(1 << 20), LLAMA, prepared, 4096, llama.skeleton().model)
    for said in (
        "int8 weights",
        "embeddings",
        "matrix A",
        "activations of 4096 tokens",
        "--tokens",
    ):
        assert said in str(error.value)


def test_what_is_left_is_for_hints(llama: Tiny) -> None:
    """More tokens leave less; the rest adds up to the whole memory."""
    prepared, model = llama.prepared["mlwe"], llama.skeleton().model
    few, many = (
        check_memory(small_gpu(2 << 30), LLAMA, prepared, tokens, model) for tokens in (10, 1000)
    )
    more = activation_bytes(LLAMA, prepared.groups, 990, torch.float32)
    assert few - many == more > 0
    assert 0 < many < few < 2 << 30
    beside = check_memory(small_gpu(2 << 30), LLAMA, prepared, 10, model, clear_beside=True)
    assert beside < few


def test_preparing_on_the_gpu_writes_the_same_bytes(llama: Tiny, gpu: Gpu, tmp_path: Path) -> None:
    """Through the scenarios' own door; every digest is in the manifest."""
    made, _ = prepared_for(
        llama.skeleton(), llama.prepared["mlwe"].parameters, tmp_path,
        Hardware(gpu.device, torch.float32, gpu),
    )  # fmt: skip
    theirs = (llama.prepared["mlwe"].directory / "manifest.json").read_bytes()
    assert (made.directory / "manifest.json").read_bytes() == theirs


def test_preparing_without_room_says_what_to_do(llama: Tiny, tmp_path: Path) -> None:
    """Before anything is written but the directory."""
    gpu = small_gpu(1 << 16)
    with pytest.raises(GpuError, match="--real-cpu once"):
        prepared_for(
            llama.skeleton(), llama.prepared["mlwe"].parameters, tmp_path,
            Hardware(gpu.device, torch.float32, gpu),
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.npy"))
