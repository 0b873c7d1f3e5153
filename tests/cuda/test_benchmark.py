"""`benchmarks.gpu` runs through every line of its own at a tiny scale; its figures mean nothing."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends import machine
from backends.he.cuda.device import Gpu
from backends.he.params import preset
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import ceiling, whole
from benchmarks.gpu.parts import DEVICE, ESSENTIALS, PARTS, QUICK_LIMIT_S
from benchmarks.gpu.profile import profile
from benchmarks.gpu.runner import Outcome, Plan
from benchmarks.gpu.scale import FULL, QUICK, Scale, matrices_of
from benchmarks.gpu.table import all_well, print_table, rows
from benchmarks.gpu.task import Figures, Task
from benchmarks.gpu.timing import device_ms
from scenarios import record
from sim.device import DeviceProfile


def tiny_llama() -> LlamaConfig:
    """Two layers."""
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


TINY = Scale(
    model=tiny_llama, layers=((32, 64), (64, 32)), layer_tokens=20, tokens=20, ragged=(1, 17),
    owner_tokens=(1, 20), square=64, copy_bytes=1 << 12, probe_steps=2, rounds=1, repeats=1,
)  # fmt: skip


def figures_of(gpu: Gpu, names: list[str], monkeypatch: pytest.MonkeyPatch) -> Figures:
    """What parts find in this process, at a tiny scale."""
    monkeypatch.setattr(Task, "gpu", gpu)
    monkeypatch.setattr(Task, "scale", TINY)
    found: Figures = {"gpu": gpu.name, "failed": {}, "warnings": {}, "left_out": {}}
    for part in PARTS:
        if part.name in names:
            kept: list[Figures] = []
            task = Task("exact", False, part.deadline_s, found, kept.append)
            module, _, function = part.call.partition(":")
            found[part.name] = getattr(import_module(module), function)(task)
            assert all(json.loads(json.dumps(figures)) for figures in kept)
            found[f"kept of {part.name}"] = len(kept)
    return found


def multiplied(
    probe: ceiling.Probe, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, steps: int
) -> None:
    """What the probe's kernels compute: they have no interpreter."""
    out[:] = steps * (a.int() @ b.int().T)


@pytest.mark.usefixtures("compiler")
def test_every_part_runs_and_the_profile_loads(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite and the step are processes of their own: stood in for here."""
    monkeypatch.setattr(whole, "suite", lambda task: {"passed": True, "summary": "1 passed"})
    monkeypatch.setattr(whole, "step", lambda task: {"private_over_clear": 2.0})
    if gpu.device.type != "cuda":
        monkeypatch.setattr(ceiling, "multiply", multiplied)
    figures = figures_of(gpu, [part.name for part in PARTS], monkeypatch)
    assert figures["identical"]["different"] == []
    assert figures["identical"]["compared"] == 8 * 2 * 2 * 3
    kept = {part.name: figures[f"kept of {part.name}"] for part in PARTS}
    assert {name: count for name, count in kept.items() if count} == {
        "identical": 8, "layers": 2, "owner": 2,
    }  # fmt: skip
    record.write(tmp_path / "f.json", figures, quiet=True)
    assert json.loads((tmp_path / "f.json").read_text())["gpu"] == gpu.name
    measures = [row[0] for row in rows(figures)]
    assert len(measures) == len(set(measures)) == 13
    print_table(figures)
    made = profile("test", "here", figures, preset("exact"), TINY)
    made.save(tmp_path / "p.json")
    assert DeviceProfile.load(tmp_path / "p.json").rates["int8"] > 0


def test_a_probe_that_computes_something_else_is_no_ceiling(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are checked before its speed counts; without it the other rows say so."""
    monkeypatch.setattr(ceiling, "multiply", lambda *_: None)
    with pytest.raises(ArithmeticError, match="sums are wrong"):
        figures_of(gpu, ["ceiling"], monkeypatch)
    figures = figures_of(gpu, ["layers"], monkeypatch)
    assert {row[3] for row in rows(figures) if row[0].startswith("of the")} == {"no ceiling"}


def test_essentials_come_first_and_end_in_time() -> None:
    """In the order of all parts; deadlines of those up to the whole step fit a quick run."""
    assert PARTS[: len(ESSENTIALS)] == ESSENTIALS
    assert ESSENTIALS[0].name == "ceiling"
    assert PARTS[-1].name == "suite"
    until_step = [*(part.name for part in PARTS)].index("step") + 1
    limits = [part.quick_s for part in ESSENTIALS[:until_step]]
    assert sum(limit for limit in limits if limit) < QUICK_LIMIT_S < 240
    plan = Plan("exact", True, time.monotonic() + 20)
    assert 19 < plan.deadline_s(PARTS[-1]) <= 20
    assert Plan("exact", False).deadline_s(DEVICE) == DEVICE.deadline_s
    assert (QUICK.rounds, len(QUICK.ragged), len(QUICK.owner_tokens)) == (5, 3, 1)
    assert QUICK.tokens == 2048


def test_the_step_is_the_scenario_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures, and how it was called; a scenario that fails fails the part."""
    asked: list[str] = []

    def run(command: list[str], cwd: Path, check: bool) -> None:
        asked.extend(command)
        place = Path(command[command.index("--json") + 1])
        place.write_text('{"private_over_clear": 2.5, "origin": {}, "adapter_dir": "x"}')

    monkeypatch.setattr(whole.subprocess, "run", run)
    found = whole.step(Task("exact", True, 60, {}, lambda figures: None))
    arguments = "--steps 3 --tokens 2048 --sequence 512"
    assert found == {"private_over_clear": 2.5, "arguments": arguments}
    assert asked[1:5] == ["-m", "scenarios.llama1b", "--real-gpu", "--compare-clear"]


def test_a_gpu_that_will_not_do_ends_it_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user can mend it, or all that is known."""
    plan = Plan("exact", False)
    for error, said in (
        ("exit status 1\nTraceback\nx.GpuError: no driver; install one", "error: no driver"),
        ("stopped after 60 s\nFile x in y", "error: stopped after 60 s\nFile x in y"),
    ):
        monkeypatch.setattr(bench, "run_part", lambda *_, e=error: Outcome(None, e, ()))
        with pytest.raises(SystemExit, match=said):
            bench.find_device(plan)


def test_the_commit_is_told_where_git_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, and by nothing else."""

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setenv(machine.COMMIT_VARIABLE, "0123456789ab")
    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine.commit() == "0123456789ab"
    monkeypatch.delenv(machine.COMMIT_VARIABLE)
    assert machine.commit() == "unknown"


def test_parts_of_an_earlier_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same commit, device and preset; else everything is measured anew."""

    def commits(theirs: str, ours: str) -> None:
        monkeypatch.setattr(record, "commit", lambda: theirs)
        monkeypatch.setattr(bench, "commit", lambda: ours)

    file = tmp_path / "f.json"
    assert bench.known_figures(file, "a GPU", "exact") == {}
    first = {"gpu": "a GPU", "preset": "exact", "ceiling": {"int8_ops_per_s": 1.0}}
    commits("0123", "0123")
    record.write(file, first, quiet=True)
    assert bench.known_figures(file, "a GPU", "exact") == first
    assert bench.known_figures(file, "a GPU", "paranoid") == {}
    assert bench.known_figures(file, "another", "exact") == {}
    for theirs, ours in (("4567", "0123"), ("unknown", "unknown"), ("0-dirty", "0-dirty")):
        commits(theirs, ours)
        record.write(file, first, quiet=True)
        assert bench.known_figures(file, "a GPU", "exact") == {}


@pytest.mark.parametrize(
    "held",
    ["", '{"gpu": "a G', "[]", "{}", '{"origin": []}', "\udcff",
     '{"gpu": "a GPU", "preset": "exact", "origin": {"commit": "0"}, "failed": []}'],
)  # fmt: skip
def test_a_file_of_something_else_is_not_known(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and everything is measured."""
    monkeypatch.setattr(bench, "commit", lambda: "0")
    file = tmp_path / "f.json"
    file.write_bytes(held.encode(errors="surrogateescape"))
    assert bench.known_figures(file, "a GPU", "exact") == {}
    assert "holds no figures" in capsys.readouterr().out


def test_a_profile_says_which_parts_it_needs(tmp_path: Path) -> None:
    """Before anything is written; figures of a part that failed are not enough."""
    figures: Figures = {"library": 1, "layers": 1, "owner": 1, "failed": {"owner": "stopped"}}
    with pytest.raises(SystemExit, match="throughput, launch, owner"):
        bench.write_profile(tmp_path / "p.json", {}, figures, preset("exact"))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("wrong", [{"suite": {"passed": False}}, {"identical": {"different": [1]}}])
def test_wrong_results_are_not_well(wrong: Figures) -> None:
    """Though nothing failed."""
    assert all_well({"failed": {}})
    assert not all_well({"failed": {}} | wrong)


def test_full_scale_is_the_1b() -> None:
    """607 thousand values up and down for each token, forward and backward."""
    matrices = matrices_of(FULL.model())
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
    head = "import time, pytest\npytestmark = pytest.mark.device\n"
    tests.write_text(
        f"{head}"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no such thing')\n"
    )
    found = whole.tests_of(str(tests), 60)
    assert not found["passed"]
    assert found["summary"].startswith("1 failed, 1 passed, 1 skipped")
    assert any("test_bad" in line for line in found["failures"])
    assert "no such thing" in found["skipped"][0]
    tests.write_text(f"{head}def test_slow(): time.sleep(60)\n")
    found = whole.tests_of(str(tests), 5)
    assert not found["passed"]
    assert found["summary"] == "not ended after 5 s"
    assert "test_slow" in found["end"][-1]
