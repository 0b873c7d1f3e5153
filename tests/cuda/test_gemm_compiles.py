"""Every tiling compiles for the GPUs it is meant for, and keeps its accumulators in registers:
by the installed Triton and by the oldest that is allowed.

Needs no GPU and no driver: Triton carries the assembler. What this cannot show is that the code
runs, or how fast.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from tests.cuda import tritons
from tests.cuda.ptx import bare_copies

pytestmark = pytest.mark.slow
VERSIONS = sorted({tritons.INSTALLED, tritons.OLDEST}, reverse=True)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 65536  # of a multiprocessor, and no program may take more

CASES = [(90, t, 3) for t in HOPPER_LARGE + HOPPER_SMALL + AMPERE_LARGE]
CASES += [(80, t, 3) for t in AMPERE_LARGE + AMPERE_SMALL]
CASES += [(90, HOPPER_LARGE[0], 2), (90, HOPPER_LARGE[-1], 2), (80, AMPERE_LARGE[0], 2)]
# Whose products go on while the program does: all by `wgmma`.
ASYNCHRONOUS = [i for i, (target, t, _) in enumerate(CASES) if target == 90 and t.tokens >= 64]


def label(case: tuple[int, Tiling, int]) -> str:
    """A test's name for a case."""
    target, t, limbs = case
    return f"sm_{target}-{t.kernel.value}-{t.tokens}x{t.outputs}x{t.inputs}-{t.stages}-{limbs}limbs"


def build(folder: Path, version: str, store: Path) -> Path:
    """Fill `folder` with N.cubin, N.ptx and N.json for each of CASES. Raises NoPackageError."""
    wanted = [(target, asdict(tiling), limbs) for target, tiling, limbs in CASES]
    found = tritons.packages(version, store)
    tritons.run(
        "tests.cuda.compile_tilings", [str(folder)], found, folder / "cache", json.dumps(wanted)
    )
    return folder


@pytest.fixture(scope="module")
def builds(
    tmp_path_factory: pytest.TempPathFactory, oldest_store: Path
) -> Iterator[dict[str, Future[Path]]]:
    """Folders by version of Triton, filled side by side."""
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton carries no cuobjdump")
    with ThreadPoolExecutor(2) as pool:
        yield {
            version: pool.submit(build, tmp_path_factory.mktemp("kernels"), version, oldest_store)
            for version in VERSIONS
        }


@pytest.fixture(params=VERSIONS)
def compiled(builds: dict[str, Future[Path]], request: pytest.FixtureRequest) -> Path:
    """A folder with N.cubin, N.ptx and N.json for each of CASES, by each version of Triton."""
    try:
        folder = builds[request.param].result()
    except tritons.NoPackageError as error:
        pytest.skip(str(error))
    assert json.loads((folder / "0.json").read_text())["triton"] == request.param
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


@pytest.mark.parametrize("index", ASYNCHRONOUS, ids=[label(CASES[i]) for i in ASYNCHRONOUS])
def test_all_warps_meet_before_a_buffer_is_refilled(compiled: Path, index: int) -> None:
    """Between every wait for products and the next copy; without its barriers it would show."""
    ptx = (compiled / f"{index}.ptx").read_text()
    assert "wgmma.wait_group" in ptx
    assert not bare_copies(ptx)
    assert bare_copies(ptx.replace("bar.sync", "//"))
