"""The CUDA C++ for real targets: it compiles, stays within its registers, and g++ has no qualms."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from backends.he.cuda.launch import DEVICE_FLAGS, HOST_FLAGS, compile_text, constants, source

pytestmark = pytest.mark.slow
_ADDED = "-ftz=true"  # by CuPy, to every program, behind our own flags
_SPILL_BYTES = 32
"""What one thread may keep in local memory: a few values that outlive a loop, no working set."""


def nvcc() -> str:
    """The CUDA compiler, on the path or where NVIDIA's installer puts it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    found = shutil.which("nvcc", path=path)
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


@pytest.mark.parametrize(("rank", "limbs"), [(5, 2), (5, 3), (8, 3)])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_within_their_registers(
    tmp_path: Path, architecture: str, rank: int, limbs: int
) -> None:
    """At most 64 registers, so that 1024 threads fit, and next to nothing spilled."""
    text = tmp_path / "kernels.cu"
    text.write_text(source())
    said = compile_text(
        (nvcc(), *DEVICE_FLAGS, _ADDED, f"-arch={architecture}", "-cubin", "-Xptxas", "-v",
         *constants(rank, limbs), str(text)),
        tmp_path / "kernels.cubin",
    )  # fmt: skip
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    assert len(registers) == len(spilled) == source().count("\nKERNEL(")
    assert max(registers) <= 64
    assert max(spilled) <= _SPILL_BYTES
    assert "warning" not in said


def test_no_denormal_is_flushed(tmp_path: Path) -> None:
    """The flag that CuPy adds changes nothing: no instruction flushes to zero."""
    text, ptx = tmp_path / "kernels.cu", tmp_path / "kernels.ptx"
    text.write_text(source())
    command = (nvcc(), *DEVICE_FLAGS, _ADDED, "-arch=sm_90", "-ptx", *constants(5, 3), str(text))
    compile_text(command, ptx)
    assert "cvt.rn.f32.f64" in ptx.read_text()
    assert ".ftz" not in ptx.read_text()


@pytest.mark.parametrize(("rank", "limbs"), [(5, 2), (8, 3)])
def test_the_host_compiler_has_no_complaint(tmp_path: Path, rank: int, limbs: int) -> None:
    """-Wall -Wextra, silent."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    text = tmp_path / "kernels.cpp"
    text.write_text(source())
    said = compile_text(
        ("g++", *HOST_FLAGS, "-shared", "-fPIC", *constants(rank, limbs), str(text)),
        tmp_path / "kernels.so",
    )
    assert said == ""
