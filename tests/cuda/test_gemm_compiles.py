"""Every tiling compiles for the GPUs it is meant for, and keeps its accumulators in registers.

Needs no GPU and no driver: Triton carries the assembler. What this cannot show is that the code
runs, or how fast.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

import triton

from backends.he.cuda.tiling import (
    AMPERE_LARGE,
    AMPERE_SMALL,
    HOPPER_LARGE,
    HOPPER_SMALL,
    Kernel,
    Tiling,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 65536  # of a multiprocessor, and no program may take more

CASES = [(90, t, 3) for t in HOPPER_LARGE + HOPPER_SMALL + AMPERE_LARGE]
CASES += [(80, t, 3) for t in AMPERE_LARGE + AMPERE_SMALL]
CASES += [(90, HOPPER_LARGE[0], 2), (90, HOPPER_LARGE[-1], 2), (80, AMPERE_LARGE[0], 2)]


def label(case: tuple[int, Tiling, int]) -> str:
    """A test's name for a case."""
    target, t, limbs = case
    return f"sm_{target}-{t.kernel.value}-{t.tokens}x{t.outputs}x{t.inputs}-{t.stages}-{limbs}limbs"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with N.cubin, N.ptx and N.json for each of CASES.

    In a process of its own: in this one, kernels may be interpreted.
    """
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton carries no cuobjdump")
    folder = tmp_path_factory.mktemp("kernels")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    wanted = [(target, asdict(tiling), limbs) for target, tiling, limbs in CASES]
    subprocess.run(
        [sys.executable, "-m", "tests.cuda.compile_tilings", str(folder)],
        input=json.dumps(wanted), text=True, check=True, env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(label, CASES))
def test_tiling_fits(compiled: Path, index: int) -> None:
    """No spills, no stack, within registers and shared memory; the instructions it is for."""
    target, tiling, limbs = CASES[index]
    used = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", compiled / f"{index}.cubin"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", used.stdout + used.stderr)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    shared = json.loads((compiled / f"{index}.json").read_text())["shared"]
    assert (stack, local) == (0, 0)
    assert registers * 32 * tiling.warps * tiling.programs <= REGISTERS
    # Every program takes a kilobyte for the system on top.
    assert (shared + 1024) * tiling.programs <= SHARED_BYTES[target] + 1024
    ptx = (compiled / f"{index}.ptx").read_text()
    if target == 90 and tiling.tokens >= 64:
        steps = tiling.inputs // 32
        assert len(re.findall(r"wgmma\.mma_async.*\.s32\.s8\.s8", ptx)) >= limbs * steps
    else:
        assert re.search(r"mma\.sync.*s32\.s8\.s8\.s32", ptx)
    bulk = tiling.kernel is not Kernel.POINTERS
    assert bool(re.search(r"cp\.async\.bulk\.tensor", ptx)) == bulk
    assert bool(re.search(r"cp\.async\.cg\.shared", ptx)) != bulk
    waits = {int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", ptx)}
    if tiling.kernel is Kernel.ASYNC:
        assert waits == {limbs, 0}, "one step's products stay under way, but for the last"
