"""`benchmarks.gpu` runs through every line of its own at a tiny scale; its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from backends.he.cuda.device import Gpu
from backends.he.params import preset
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import whole
from benchmarks.gpu.profile import profile
from benchmarks.gpu.timing import Scale, full, matrices_of
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


def test_every_part_runs_and_the_profile_loads(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite and the step are processes of their own: stood in for here."""
    monkeypatch.setattr(whole, "suite", lambda: {"passed": True, "summary": "1 passed"})
    monkeypatch.setattr(whole, "step", lambda arguments: {"private_over_clear": 2.0})
    saved: list[list[str]] = []
    parameters = preset("standard")
    figures = bench.measure(gpu, parameters, TINY, [], lambda f: saved.append(list(f)))
    assert figures["failed"] == {}
    assert len(saved) == 10
    assert figures["identical"]["different"] == []
    assert figures["identical"]["compared"] == 8 * 2 * 2 * 3
    record.write(tmp_path / "f.json", figures, quiet=True)
    assert json.loads((tmp_path / "f.json").read_text())["gpu"] == gpu.name
    measures = [row[0] for row in bench.rows(figures)]
    assert len(measures) == len(set(measures)) == 11
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


def test_full_scale_is_the_1b() -> None:
    """607 thousand values up and down for each token, forward and backward."""
    matrices = matrices_of(full().config)
    assert sum(m.count * m.inputs for m in matrices) == 606_208
    assert sum(m.count * m.inputs * m.outputs for m in matrices) == 2 * 973_078_528
