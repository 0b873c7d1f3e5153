"""Whatever happens to one part of `benchmarks.gpu`, the others' figures are in the file."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he.cuda.tiling import AMPERE_LARGE, SKIP_VARIABLE, TILINGS
from backends.places import output_file
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import runner
from benchmarks.gpu.log import Log
from benchmarks.gpu.parts import Part
from benchmarks.gpu.runner import ROOT, Plan, measure
from benchmarks.gpu.table import all_well, print_table
from benchmarks.gpu.task import Figures
from scenarios import record


def part(name: str, deadline_s: float = 60) -> Part:
    """One of `faulty`."""
    return Part(name, f"tests.cuda.faulty:{name}", deadline_s)


def measured(parts: list[Part], file: Path, preset: str = "exact") -> Figures:
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
        [part("hangs", 8), part("aborts"), part("faults"), part("raises"), part("works")],
        tmp_path / "f.json", str(note),
    )  # fmt: skip
    failed = found["failed"]
    assert list(failed) == ["hangs", "aborts", "faults", "raises"]
    assert failed["hangs"].startswith("stopped after 8 s")
    assert "in hangs" in failed["hangs"], "where it hung"
    assert failed["aborts"].startswith("killed by SIGABRT")
    assert failed["faults"].startswith("killed by SIGSEGV")
    assert "in faults" in failed["faults"], "where it was"
    assert "RuntimeError: no such luck" in failed["raises"]
    assert str(ROOT) not in json.dumps(failed)
    assert found["hangs"] == {"half": 1}
    assert {"hangs", "failed"} <= set(found["works"]["known"])
    assert not {"aborts", "faults", "raises"} & set(found)
    assert all(ended(int(process)) for process in note.read_text().split())
    assert not all_well(found)
    assert "no such luck" in capsys.readouterr().out


def test_an_odd_end_is_one_parts_failure(tmp_path: Path) -> None:
    """Whatever it did to its own process and files; the next part's figures are there."""
    names = ["unnamed_signal", "breaks_its_files", "removes_its_folder", "ends_early", "no_number"]
    found = measured([*map(part, names), part("works")], tmp_path / "f.json")
    failed = found["failed"]
    assert list(failed) == names
    assert failed["unnamed_signal"].startswith(f"killed by signal {signal.SIGRTMIN + 1}\n")
    assert failed["unnamed_signal"].endswith("the last words")
    assert failed["breaks_its_files"].startswith("exit status 1; its figures are lost")
    assert len(found["warnings"]["breaks_its_files"]) == 1
    assert failed["removes_its_folder"].startswith("exit status 1")
    assert "status 0 before it was done; its figures are partial" in failed["ends_early"]
    assert "figures that JSON cannot hold" in failed["no_number"]
    assert found["ends_early"] == found["no_number"] == {"half": 1}
    assert "works" in found


def test_a_part_that_cannot_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or no process to be had."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/path")

    for place, name in ((runner, "write_json"), (runner.subprocess, "Popen")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, full)
            figures = measure("a GPU", [part("works")], Plan("exact", False), lambda f: None)
        assert figures["failed"] == {"works": "not run: No space left on device"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_part_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """However that was ended, and though the part's deadline is far."""
    note = tmp_path / "process"
    script = f"""
import sys
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu.parts import Part
bench.DEVICE = Part("hangs", "tests.cuda.faulty:hangs", 600)
bench.PRESETS = {{{str(note)!r}: None}}
sys.argv = ["gpu", "--preset", {str(note)!r}]
bench.main()
"""
    command = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # SIGKILL leaves the part's folder behind
        # `nohup` makes a test run deaf to this, and what it starts too.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    until_s = time.monotonic() + 60
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    command.send_signal(number)
    said = command.communicate(timeout=90)[0]
    assert all(ended(int(process)) for process in note.read_text().split())
    if number != signal.SIGKILL:
        assert command.returncode == 130
        assert "interrupted" in said


def test_blaming_tilings_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tilings that there are, found in a long log too, and not one after the other."""
    monkeypatch.delenv(SKIP_VARIABLE, raising=False)
    monkeypatch.setattr(runner, "_RERUNS", 1)
    found = measured([part("blames"), part("works")], tmp_path / "f.json")
    assert list(found["left_out"]) == [tiling.name for tiling in TILINGS[:2]]
    assert "not run again" in found["failed"]["blames"].splitlines()[0]
    assert len(found["failed"]["blames"]) < 5000
    assert "works" in found


def test_a_log_is_not_read_whole() -> None:
    """Two chunks are, at most; an advice across their border is found."""

    class Counting(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            got = super().read(size)
            self.largest = max(self.largest, len(got))
            return got

    name = TILINGS[-1].name
    advice = f" {SKIP_VARIABLE}={name} ".encode()
    file = Counting(
        b"x" * ((1 << 20) - len(advice) // 2) + advice + b"x" * (3 << 20) + b"/here/end"
    )
    log = Log(file, ("/here",))
    assert log.tail().endswith("xxx/end")
    assert log.blamed("") == name
    assert log.blamed("pointers") == ""
    assert file.largest <= 1 << 20


def test_a_file_that_cannot_be_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs, in one line; one that can be written stays as it is."""
    (tmp_path / "a file").write_text("held")
    for name in ("", "a file/f.json"):
        monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            bench.main()
        assert "error: argument --json: cannot write to" in capsys.readouterr().err
    output_file(tmp_path / "a file")
    assert (tmp_path / "a file").read_text() == "held"
    output_file(tmp_path / "new" / "f.json")
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, the table is printed, and the last save is tried as well."""
    file = tmp_path / "f.json"

    def measured_on_a_full_disk(gpu: str, parts: object, plan: Plan, save, known) -> Figures:  # type: ignore[no-untyped-def]
        file.mkdir()
        figures: Figures = {"gpu": gpu, "failed": {}, "warnings": {}, "left_out": {}}
        save(figures)
        return figures

    device = runner.Outcome({"gpu": "a GPU", "machine": {}}, "", ())
    monkeypatch.setattr(bench, "run_part", lambda *_: device)
    monkeypatch.setattr(bench, "measure", measured_on_a_full_disk)
    monkeypatch.setattr(bench, "heed_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(file)])
    with pytest.raises(SystemExit) as end:
        bench.main()
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert said.count("error: figures are not written to") == 2
    assert said.index("error: ") < said.index("\na GPU\n") < said.rindex("error: ")


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
    plan = Plan("exact", False, ends_s=time.monotonic())
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
