"""The probe of the tensor cores compiles to a loop of products and nothing else.

Needs no GPU and no driver. What this cannot show is how fast the loop runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the probe is written in Gluon, Triton's lower level")

import triton

from benchmarks.gpu.ceiling import MMA, WGMMA, Probe

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor
# (target, probe, its instruction in PTX and as the machine has it, rows, columns and depth of one,
#  how many warps share one)
CASES = [
    (80, MMA, r"\bmma\.sync\S*\.m16n8k32\.\S*s32\.s8\.s8\.s32", "IMMA.16832.S8.S8", (16, 8, 32), 1),
    (90, WGMMA, r"wgmma\.mma_async\S*\.m64n128k32\.s32\.s8\.s8", "IGMMA.64x128x32.S8.S8",
     (64, 128, 32), 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `compile_ceiling` writes, from a process where nothing is interpreted."""
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton carries no cuobjdump")
    folder = tmp_path_factory.mktemp("ceiling")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    subprocess.run(
        [sys.executable, "-m", "tests.cuda.compile_ceiling", str(folder)],
        check=True, env=environment, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    return folder


def loops(lines: list[str], label: str, jump: str) -> list[list[str]]:
    """The instructions from each label to a conditional jump back to it."""
    found, places = [], {}
    for index, line in enumerate(lines):
        if named := re.match(label, line):
            places[named[1]] = index
        back = re.search(jump, line)
        if back and back[1] in places:
            found.append(lines[places[back[1]] : index])
    return found


def in_one_step(probe: Probe, size: tuple[int, int, int], sharing: int) -> int:
    """Instructions that one warp, or warp group, issues for one step of its program."""
    rows, columns, depth = size
    whole = probe.rows * probe.columns * probe.depth // (rows * columns * depth)
    return whole // (probe.warps // sharing)


@pytest.mark.parametrize(
    ("target", "probe", "ptx", "sass", "size", "sharing"), CASES, ids=["sm_80", "sm_90"]
)
def test_the_loop_holds_products_and_no_memory_traffic(
    compiled: Path, target: int, probe: Probe, ptx: str, sass: str, size: tuple[int, int, int],
    sharing: int,
) -> None:  # fmt: skip
    """In PTX and in machine code, where it may be unrolled: none hoisted, none dropped."""
    text = (compiled / f"{target}.ptx").read_text()
    (loop,) = loops(text.splitlines(), r"(\$L\w+):", r"@%p\d+ bra\s+(\$L\w+);")
    count = in_one_step(probe, size, sharing)
    assert sum(bool(re.search(ptx, line)) for line in loop) == count
    words = {word for line in loop for word in re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.]*)", line)}
    assert not {word for word in words if re.match(r"(ld|st|cp|red|atom|bar|fence|mbarrier)", word)}

    tool = [TOOLS / "cuobjdump", "-sass", compiled / f"{target}.cubin"]
    listing = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    lines = [f"0x{int(place, 16):x}: {what}" for place, what in code]
    found = [
        body for body in loops(lines, r"(0x[0-9a-f]+):", r"@!?U?P\d BRA (0x[0-9a-f]+)")
        if any(sass in line for line in body)
    ]  # fmt: skip
    assert found
    for body in found:
        products = sum(sass in line for line in body)
        assert products >= count
        assert products % count == 0, "whole steps"
        for line in body:
            assert not re.search(r"\b(LD\w*|ST[SGL]?|ATOM\w*|RED|BAR|UTMA\w*|MEMBAR)\b", line), line


@pytest.mark.parametrize(("target", "probe"), [case[:2] for case in CASES], ids=["80", "90"])
def test_accumulators_stay_in_registers(compiled: Path, target: int, probe: Probe) -> None:
    """No stack, no spills, and a program fits a multiprocessor."""
    used = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", compiled / f"{target}.cubin"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", used.stdout + used.stderr)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0)
    assert registers * 32 * probe.warps <= REGISTERS


def test_loops_are_found() -> None:
    """A loop is what lies between a label and the way back to it."""
    lines = [
        "0x10: MOV",
        "0x20: LDSM.16 R1",
        "0x30: IMMA",
        "0x40: @P0 BRA 0x20",
        "0x50: @P1 BRA 0x70",
    ]
    assert loops(lines, r"(0x[0-9a-f]+):", r"@P\d BRA (0x[0-9a-f]+)") == [lines[1:3]]
