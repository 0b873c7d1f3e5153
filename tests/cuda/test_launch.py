"""Launching: arguments are checked against the source, and errors say what to install."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.he.cuda import launch
from backends.he.cuda.device import Gpu, GpuError
from backends.he.cuda.launch import kernels, signatures, source


@pytest.mark.usefixtures("compiler")
def test_arguments_are_checked_against_the_source(gpu: Gpu) -> None:
    """Count, kind, dtype, place, layout, range."""
    compiled = kernels(gpu, 5, 3)
    out = torch.zeros((2, 5, 256), dtype=torch.int32, device=gpu.device)
    cases: list[tuple[str, list[Any]]] = [
        ("takes 5 arguments", [out, 1, 2, 3]),
        ("secrets is a tensor", [7, 1, 2, 3, 4]),
        ("key0 is a number", [out, out, 2, 3, 4]),
        (r"secrets is torch.int32 .*, got torch.int64", [out.long(), 1, 2, 3, 4]),
        ("got torch.int32 on meta", [out.to("meta"), 1, 2, 3, 4]),
        ("not contiguous", [out[:, ::2], 1, 2, 3, 4]),
    ]
    for message, arguments in cases:
        with pytest.raises(TypeError, match=message):
            compiled.launch("draw_secrets", (2, 5), *arguments)
    with pytest.raises(OverflowError):
        compiled.launch("draw_secrets", (2, 5), out, 1 << 64, 2, 3, 4)


def test_every_kernel_declares_known_types() -> None:
    """The table that arguments are checked against is read from the source itself."""
    found = signatures(source())
    kernels = {"draw_secrets", "token_scales", "encrypt", "decrypt", "expectations", "differences"}
    assert kernels == set(found)
    for signature in found.values():
        assert signature.threads in (128, 256, 512)
        assert {kind for kind, _ in signature.arguments} <= {*launch._TENSORS, *launch._SCALARS}


@pytest.mark.parametrize(
    ("cuda", "installed", "message"),
    [
        ("13.0", None, "CuPy is missing.*pip install 'cupy-cuda13x>=14'.*CUDA 13.0"),
        ("12.8", None, "CuPy is missing.*pip install 'cupy-cuda12x>=14'.*CUDA 12.8"),
        ("13.0", "cupy-cuda12x", "cupy-cuda12x is installed.*CUDA 13.0.*pip install cupy-cuda13x"),
    ],
)
def test_a_missing_or_wrong_cupy_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: str, installed: str | None, message: str
) -> None:
    """The error says which one is needed."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(launch, "_installed_cupy", lambda: installed)
    with pytest.raises(GpuError, match=message):
        launch._import_cupy()


def test_missing_cuda_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CuPy says is passed on, with the package that brings them."""
    monkeypatch.setattr(launch, "_installed_cupy", lambda: "cupy-cuda13x")
    with (
        pytest.raises(GpuError, match=r"libnvrtc\.so.*pip install 'cupy-cuda13x\[ctk\]'"),
        launch._library_errors(),
    ):
        raise RuntimeError("libnvrtc.so.13 cannot be opened")
    with pytest.raises(RuntimeError, match="out of memory"), launch._library_errors():
        raise RuntimeError("out of memory")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    """Its own words, or that it is not there."""
    with pytest.raises(GpuError, match="no-such-compiler is missing"):
        launch.compile_text(("no-such-compiler",), tmp_path / "x")
    bad = tmp_path / "bad.cpp"
    bad.write_text("int f( {")
    with pytest.raises(GpuError, match=r"g\+\+ failed:(.|\n)*error"):
        launch.compile_text(("g++", "-c", str(bad)), tmp_path / "x")
