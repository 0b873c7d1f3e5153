"""Calibration: the fit finds planted figures, the rehearsal is a real pass, the files tell it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from backends.he.params import preset
from backends.machine import busy_elsewhere_s
from sim import calibrate, calibration
from sim.calibration import Calibration, Passes, Samples, pair_rate
from sim.device import DeviceProfile, Origin, Processor, Work
from sim.fitting import GUESSES, Case, Crowd, fit, fit_widths, least_squares
from sim.rehearsal import PassTimes, RehearsalError, rehearsal
from sim.workload import Linear, trace_step

ORIGIN = Origin("measured", "a test", "2026-01-01", "0")
TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def planted(factors: dict[str, float]) -> DeviceProfile:
    """A profile that differs from the guesses by these factors."""
    values = {key: GUESSES[key] * factors[key] for key in GUESSES}
    parts: dict[str, dict[str, float]] = {"rates": {}, "overhead_s": {}}
    for key, value in values.items():
        group, _, kind = key.partition(".")
        if kind:
            parts[group][kind] = value
    return DeviceProfile("planted", ORIGIN, 2.0, bytes_per_s=values["bytes_per_s"], **parts)


def telling_works() -> list[tuple[str, tuple[Work, ...]]]:
    """Tasks of all kinds and sizes, some bound by arithmetic, some by memory or overhead."""
    works: list[tuple[str, tuple[Work, ...]]] = [("update", (Work(bytes_moved=1e9),))]
    for size in (1e2, 1e4, 1e6):
        works += [
            ("multiply", (Work({"int8": 1e5 * size}, size),)),
            ("encrypt", (Work({"ring_row": size, "value": 1.0}, size),)),
            ("encrypt", (Work({"ring_row": 1.0, "value": 30 * size}, size),)),
            ("decrypt", (Work({"ring_row": size, "value": 60 * size}, size),)),
            ("decrypt", (Work({"ring_row": size}, 1e6 * size),)),
            ("local", (Work({"float": 1e4 * size}, size, 10), Work({}, 1e4 * size, 10))),
            ("local", (Work({"float": 1e5 * size}, size, 30),)),
            ("update", (Work({}, size, 500),)),
        ]
    return works


@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries({key: st.floats(0.25, 4.0) for key in GUESSES}))
def test_the_fit_finds_planted_figures(factors: dict[str, float]) -> None:
    truth = planted(factors)
    cases = [Case("", task, parts, 0.0) for task, parts in telling_works()]
    cases = [replace(case, seconds=case.explained(truth)) for case in cases]
    found = fit(cases, "found", ORIGIN, 2.0)
    for case in cases:
        assert case.explained(found) == pytest.approx(case.seconds, rel=0.03)
    for kind, rate in truth.rates.items():
        assert found.rates[kind] == pytest.approx(rate, rel=0.1)
    for task, overhead_s in truth.overhead_s.items():
        assert found.overhead_s[task] == pytest.approx(overhead_s, rel=0.1)
    assert found.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.1)


def test_noise_does_not_lead_the_fit_astray() -> None:
    truth = planted(dict.fromkeys(GUESSES, 2.0))
    noise = np.random.default_rng(0)
    cases = [
        Case("", task, parts, 0.0) for task, parts in telling_works() for _ in range(3)
    ]  # fmt: skip
    cases = [replace(c, seconds=c.explained(truth) * noise.lognormal(0, 0.2)) for c in cases]
    found = fit(cases, "found", ORIGIN, 2.0)
    errors = [abs(case.explained(found) / case.explained(truth) - 1) for case in cases]
    assert np.median(errors) < 0.1
    assert max(errors) < 0.3


def test_least_squares_finds_a_minimum() -> None:
    """Rosenbrock's valley, as residuals."""
    found = least_squares(
        lambda x: np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)]), np.array([-1.2, 1.0])
    )
    assert found == pytest.approx([1.0, 1.0], abs=1e-4)


def crowd_of(profile: DeviceProfile, lanes: int, layers: Work, cipher: Work) -> Crowd:
    """Lanes that take turns between their layers and the cipher, on one processor."""
    env = simpy.Environment()
    processor = Processor(env, profile.cores)
    turns = 20

    def walk(left: int) -> None:
        if left:
            work, task = (layers, "local") if left % 2 else (cipher, "encrypt")
            processor.run(*profile.cost(work, task), lambda: walk(left - 1))

    for _ in range(lanes):
        walk(2 * turns)
    env.run()
    cases = (
        Case("", "local", (layers * turns,), turns * profile.seconds(layers, "local")),
        Case("", "encrypt", (cipher * turns,), turns * profile.seconds(cipher, "encrypt")),
    )
    return Crowd("", lanes, cases, env.now)


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize(("layers", "overhead"), [(1.2, 2.0), (2.0, 1.4), (1.55, 1.625)])
def test_widths_follow_from_lanes_that_run_together(
    layers: float, overhead: float, lanes: int
) -> None:
    profile = planted(dict.fromkeys(GUESSES, 1.0))
    truth = replace(profile, width={"local": layers, "overhead": overhead})
    crowds = [
        crowd_of(
            truth, lanes, Work({"float": busy * 5e10}, launches=launches), Work({"value": 3e6})
        )
        for busy, launches in ((0.1, 30.0), (0.01, 3000.0), (0.05, 1000.0))
    ]
    found = fit_widths(crowds, profile)
    assert found["local"] == pytest.approx(layers, abs=0.1)
    assert found["overhead"] == pytest.approx(overhead, abs=0.1)
    assert found["update"] == found["local"]


def test_disturbed_samples_are_left_out_while_enough_remain() -> None:
    samples = Samples()
    for seconds in (4.0, 1.0, 2.0, 3.0):
        samples.add(seconds, 0.01)
        samples.add(0.5, 1.5)
    assert samples.undisturbed == 4
    assert samples.typical_s == 1.5
    busy = Samples([(0.1, 0.9), (1.0, 0.2), (2.0, 0.3), (9.0, 1.9), (3.0, 0.4), (9.0, 1.8)])
    assert busy.undisturbed == 0
    assert [busy.times[i][0] for i in busy.kept()] == [1.0, 2.0]


def test_phases_are_those_of_the_passes_that_count() -> None:
    passes = Passes()
    for seconds in (3.0, 1.0, 2.0, 4.0):
        passes.add(PassTimes(seconds, [(0, seconds, 0.0, 0.0)]), 0.0)
    assert [times.local for times in passes.kept()] == [1.0, 2.0]
    assert passes.samples.typical_s == 3.0


def test_a_rehearsal_is_the_pass_that_is_traced() -> None:
    before = threading.active_count()
    workload = trace_step(TINY, 24)
    asked = [item.matrix for item in workload.lane if isinstance(item, Linear)]
    with rehearsal(TINY, preset("exact"), lanes=2) as rehearsed:
        kept = [parameter.detach().clone() for parameter in rehearsed.parameters]
        times = rehearsed.alone(24)
        assert [matrix for matrix, *_ in times.linears] == asked
        assert times.local > 0
        assert all(phase > 0 for _, *phases in times.linears for phase in phases)
        assert rehearsed.update() > 0
        assert rehearsed.together(24, 2) > 0
        moved = [
            not torch.equal(a, b) for a, b in zip(kept, rehearsed.parameters, strict=True)
        ]  # fmt: skip
        assert any(moved)
        assert all(torch.isfinite(parameter).all() for parameter in rehearsed.parameters)
    assert threading.active_count() <= before + 2, "only the kernels' and torch's own pools stay"


def test_a_rehearsal_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no product today")

    with rehearsal(TINY, preset("exact"), lanes=1) as rehearsed:
        monkeypatch.setattr(rehearsed, "_worker", type("Broken", (), {"multiply": broken})())
        with pytest.raises(RehearsalError, match="no product today"):
            rehearsed.alone(8)


def test_the_command_writes_a_profile_and_its_residuals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(calibration, "TOKENS", (16,))
    monkeypatch.setattr(calibration, "BUDGET_S", 0.0)
    monkeypatch.setattr(calibration, "PATIENCE_S", 0.0)
    out, figures = tmp_path / "here.json", tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["calibrate", "--out", str(out), "--json", str(figures)])
    calibrate.main()
    profile = DeviceProfile.load(out)
    assert profile.name == "here"
    assert profile.origin.kind == "measured"
    assert profile.origin.commit
    assert profile.origin.assumed
    found = json.loads(figures.read_text())
    assert found["rounds"] == calibration.MIN_ROUNDS
    assert found["profile"] == json.loads(out.read_text())
    tasks = {"local", "encrypt", "multiply", "decrypt", "update"}
    assert {row["task"] for row in found["cases"]} == tasks
    printed = capsys.readouterr().out
    for row in found["cases"]:
        assert row["error"] == pytest.approx(row["fitted_ms"] / row["measured_ms"] - 1)
        assert row["case"] in printed


def test_it_waits_for_others_to_end_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading of 1 busy core elsewhere for as long as three glances last, then none."""
    now = [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibration.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    busy_until = [1.0]
    monkeypatch.setattr(calibration, "busy_elsewhere_s", lambda: min(now[0], busy_until[0]))

    def action() -> str:
        now[0] += 0.5
        return "done"

    patient = Calibration(patience_s=100.0)
    assert patient.timed(action) == ("done", 1.0)
    assert patient.timed(action) == ("done", 0.0)
    assert now[0] >= 1.5
    assert (patient.measured, patient.disturbed) == (2, 1)
    busy_until[0] = 1e9
    hasty = Calibration(patience_s=1.0)
    assert [hasty.timed(action)[1] for _ in range(3)] == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts by /proc/stat")
def test_what_other_processes_use_is_counted() -> None:
    before = busy_elsewhere_s()
    program = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert busy_elsewhere_s() - before > 0.4


@pytest.mark.parametrize(("kernel", "faster"), [("avx2", 4 / 3), ("avx512vnni", 1.0)])
def test_two_limbs_beside_three(
    monkeypatch: pytest.MonkeyPatch, kernel: str, faster: float
) -> None:
    """One 16-bit digit takes half of two; two digits of 8 bits take two thirds of three."""
    monkeypatch.setattr(calibration, "chosen_kernel", lambda: SimpleNamespace(name=kernel))
    assert pair_rate(300.0)["int8_pair"] == pytest.approx(faster * 300.0)
    monkeypatch.setattr(calibration, "chosen_kernel", lambda: SimpleNamespace(name="generic"))
    assert pair_rate(300.0) == {}
