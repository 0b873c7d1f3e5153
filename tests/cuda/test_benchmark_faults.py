"""Whatever happens to one part of `benchmarks.gpu`, the others' figures are in the file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he.cuda.tiling import AMPERE_LARGE, SKIP_VARIABLE
from benchmarks.gpu.parts import Part
from benchmarks.gpu.runner import ROOT, Plan, measure
from benchmarks.gpu.table import all_well, print_table
from benchmarks.gpu.task import Figures
from scenarios import record


def part(name: str, deadline_s: float = 60) -> Part:
    """One of `faulty`."""
    return Part(name, f"tests.cuda.faulty:{name}", deadline_s)


def measured(parts: list[Part], file: Path, preset: str = "standard") -> Figures:
    """What the file holds at the end, having been complete after each part."""
    saved: list[Figures] = []

    def save(figures: Figures) -> None:
        record.write(file, figures, quiet=True, found={})
        saved.append(json.loads(file.read_text()))

    figures = measure("a GPU", parts, Plan(preset, False), save)
    print_table(figures)
    for count, found in enumerate(saved, 1):
        assert list(found["seconds"]) == [part.name for part in parts[:count]]
    return saved[-1]


def ended(process: int) -> bool:
    """Within a second or so."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_hangs_and_crashes_leave_the_other_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named with their errors; nothing of them lives on; what was kept of one is there."""
    note = tmp_path / "process"  # faulty.hangs writes it, in place of a preset's name
    found = measured(
        [part("hangs", 3), part("aborts"), part("faults"), part("raises"), part("works")],
        tmp_path / "f.json", str(note),
    )  # fmt: skip
    failed = found["failed"]
    assert list(failed) == ["hangs", "aborts", "faults", "raises"]
    assert failed["hangs"].startswith("stopped after 3 s")
    assert "in hangs" in failed["hangs"], "where it hung"
    assert failed["aborts"].startswith("killed by SIGABRT")
    assert failed["faults"].startswith("killed by SIGSEGV")
    assert "in faults" in failed["faults"], "where it was"
    assert "RuntimeError: no such luck" in failed["raises"]
    assert str(ROOT) not in json.dumps(failed)
    assert found["hangs"] == {"half": 1}
    assert {"hangs", "failed"} <= set(found["works"]["known"])
    assert not {"aborts", "faults", "raises"} & set(found)
    assert ended(int(note.read_text()))
    assert not all_well(found)
    assert "no such luck" in capsys.readouterr().out


def test_a_tiling_that_fails_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tuner; one that takes the process with it, by running the part again without it."""
    monkeypatch.delenv(SKIP_VARIABLE, raising=False)
    bad, worse, fine = AMPERE_LARGE[:3]
    found = measured([part("one_tiling_fails"), part("works")], tmp_path / "f.json")
    assert found["failed"] == {}
    assert found["one_tiling_fails"] == {"chosen": fine.name}
    assert list(found["left_out"]) == [worse.name]
    assert "illegal memory access" in found["left_out"][worse.name]
    (warning,) = found["warnings"]["one_tiling_fails"]
    assert bad.name in warning
    assert "unspecified launch failure" in warning
    assert "works" in found


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    """It is named as not started."""
    plan = Plan("standard", False, ends_s=time.monotonic())
    figures = measure("a GPU", [part("works")], plan, lambda f: None)
    assert "not started" in figures["failed"]["works"]


def test_a_bare_machine_is_enough_to_start() -> None:
    """The command, the probe and a child need torch and Triton, and no more."""
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cryptography", "simpy", "cupy", "transformers", "numba"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.gpu.__main__, benchmarks.gpu.ceiling, benchmarks.gpu.child
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
