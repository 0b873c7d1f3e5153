"""`benchmarks.gpu` runs through every line of its own at a tiny scale; its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he.cuda.device import Gpu
from backends.he.params import preset
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import whole
from benchmarks.gpu.profile import profile
from benchmarks.gpu.timing import Scale, device_ms, full, matrices_of
from scenarios import record
from sim.device import DeviceProfile

TINY = Scale(
    config=LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    ),
    layers=((32, 64), (64, 32)), layer_tokens=20, tokens=20, ragged=(1, 17),
    square=64, copy_bytes=1 << 12, rounds=1, repeats=1,
)  # fmt: skip


@pytest.mark.usefixtures("compiler")
def test_every_part_runs_and_the_profile_loads(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite and the step are processes of their own: stood in for here."""
    monkeypatch.setattr(whole, "suite", lambda: {"passed": True, "summary": "1 passed"})
    monkeypatch.setattr(whole, "step", lambda arguments: {"private_over_clear": 2.0})
    saved: list[list[str]] = []
    parameters = preset("standard")
    figures = bench.measure(gpu, parameters, TINY, bench.PARTS, lambda f: saved.append(list(f)))
    assert figures["failed"] == {}
    assert len(saved) == 10
    assert figures["identical"]["different"] == []
    assert figures["identical"]["compared"] == 8 * 2 * 2 * 3
    record.write(tmp_path / "f.json", figures, quiet=True)
    assert json.loads((tmp_path / "f.json").read_text())["gpu"] == gpu.name
    measures = [row[0] for row in bench.rows(figures)]
    assert len(measures) == len(set(measures)) == 12
    bench.print_table(figures)
    made = profile("test", "here", figures, parameters, TINY)
    made.save(tmp_path / "p.json")
    assert DeviceProfile.load(tmp_path / "p.json").rates["int8"] > 0


def test_a_failing_part_leaves_the_others(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is named, with its error; what follows runs."""

    def broken() -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(whole, "suite", broken)
    wanted = ["suite", "ceilings"]
    figures = bench.measure(gpu, preset("standard"), TINY, wanted, lambda f: None)
    assert "no such luck" in figures["failed"]["suite"]
    assert figures["ceilings"]["int8_ops_per_s"] > 0
    bench.print_table(figures)
    assert not bench.all_well(figures)


def test_parts_of_an_earlier_run_are_kept(gpu: Gpu, tmp_path: Path) -> None:
    """Of the same commit, device and preset; else everything is measured anew."""
    parameters, file = preset("standard"), tmp_path / "f.json"
    assert bench.known_figures(file, gpu, parameters) == {}
    first = bench.measure(gpu, parameters, TINY, ["ceilings"], lambda f: None)
    record.write(file, first, quiet=True)
    known = bench.known_figures(file, gpu, parameters)
    assert known["ceilings"] == first["ceilings"]
    both = bench.measure(gpu, parameters, TINY, ["launch"], lambda f: None, known)
    assert {"ceilings", "launch"} <= set(both)
    assert bench.known_figures(file, gpu, preset("paranoid")) == {}
    other = json.loads(file.read_text())
    other["origin"]["commit"] = "another"
    file.write_text(json.dumps(other))
    assert bench.known_figures(file, gpu, parameters) == {}


def test_a_profile_says_which_parts_it_needs(gpu: Gpu, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(SystemExit, match="throughput, launch, owner"):
        bench.write_profile(
            tmp_path / "p.json", gpu, {"ceilings": 1, "layers": 1}, preset("standard")
        )
    assert not (tmp_path / "p.json").exists()


def test_full_scale_is_the_1b() -> None:
    """607 thousand values up and down for each token, forward and backward."""
    matrices = matrices_of(full().config)
    assert sum(m.count * m.inputs for m in matrices) == 606_208
    assert sum(m.count * m.inputs * m.outputs for m in matrices) == 2 * 973_078_528


def test_a_held_device_begins_when_all_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that ended too early is made longer, and everything is measured again."""
    holds: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return len(holds) < 3

        def elapsed_time(self, end: Event) -> float:
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", holds.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: None)
    gpu = Gpu(torch.device("cuda", 0), "a GPU", (9, 0), 1, 1)
    done: list[int] = []
    assert device_ms(gpu, lambda: done.append(1), 4, held=True) == 2.0
    assert len(done) == 3 * 4
    assert holds == sorted(set(holds))
    assert device_ms(gpu, lambda: done.append(1), 4) == 2.0
    assert len(holds) == 3


@pytest.mark.slow
def test_the_suite_is_summed_up(tmp_path: Path) -> None:
    """The count, what failed and why, what was skipped; and where it was when it had to stop."""
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import time, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no such thing')\n"
    )
    found = whole.suite(str(tests))
    assert not found["passed"]
    assert found["summary"].startswith("1 failed, 1 passed, 1 skipped")
    assert any("test_bad" in line for line in found["failures"])
    assert "no such thing" in found["skipped"][0]
    tests.write_text("import time\ndef test_slow(): time.sleep(60)\n")
    found = whole.suite(str(tests), 10)
    assert not found["passed"]
    assert found["summary"] == "not ended after 10 s"
    assert "test_slow" in found["end"][-1]
