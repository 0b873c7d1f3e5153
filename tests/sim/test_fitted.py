"""`benchmarks.fidelity --load` tells the simulator what it has to, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import fidelity_load
from benchmarks.fidelity_load import Load, Model, fitted, percentiles, scaled, sides
from sim.workload import multiply_work
from tests.sim.test_world import OWNER, workload

CORE = replace(
    OWNER, rates=dict(OWNER.rates) | {"int8": 1e9, "wire": 1e9},
    overhead_s=dict(OWNER.overhead_s) | {"multiply": 5e-4},
)  # fmt: skip
STEP = workload([(400, 400), (300, 200)], [0.0])


def load(owners: int, requests: int, products: int, frame_s: float, product_s: float) -> Load:
    """What a machine would show on which frames and products cost that."""
    joined = STEP.tokens * requests / products
    bare = replace(CORE, overhead_s=dict(CORE.overhead_s) | {"multiply": 0.0})
    products_s = sum(bare.seconds(multiply_work(m, joined), "multiply") for m in STEP.linears)
    bytes_s = requests / len(STEP.linears) * (STEP.up_bytes + STEP.down_bytes) / 1e9
    worker_s = products / len(STEP.linears) * products_s + bytes_s
    worker_s += 2 * requests * frame_s + products * product_s
    return Load(owners, [0.01], bytes_s + 2 * requests * 3e-5, worker_s, requests, products)


def test_frames_and_products_are_told_apart() -> None:
    """By two loads of which one joins its requests."""
    owner, worker = sides(
        CORE, load(1, 1000, 1000, 1e-4, 2e-4), load(8, 1000, 250, 1e-4, 2e-4), STEP
    )
    assert worker.overhead_s["frame"] == pytest.approx(1e-4)
    assert worker.overhead_s["multiply"] == pytest.approx(2e-4)
    assert owner.overhead_s["frame"] == pytest.approx(3e-5)


def test_what_makes_a_crowd_come_out_right_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is uneven and slower than its processor time says, both as they are."""
    monkeypatch.setattr(fidelity_load, "STEPS", 120)
    both = sides(CORE, load(1, 1000, 1000, 1e-4, 2e-4), load(4, 1000, 400, 1e-4, 2e-4), STEP)
    truth = Model(*both, 0.6, 1.4, 0.01)
    crowd = replace(load(4, 1000, 400, 1e-4, 2e-4), steps_s=truth.steps(STEP, 4))
    found = fitted(both, load(1, 1000, 1000, 1e-4, 2e-4), crowd, STEP)
    assert found.unevenness == pytest.approx(0.6, abs=0.11)
    assert found.slower == pytest.approx(1.4, rel=0.05)
    now, later = (percentiles(found.steps(STEP, 4, slower))["p50"] for slower in (1.0, 2.0))
    assert later == pytest.approx(2 * now, rel=0.01)


def test_a_device_is_slower_in_everything() -> None:
    """Whatever work it is."""
    work = multiply_work(STEP.linears[0], 4)
    for task in ("multiply", "encrypt"):
        assert scaled(CORE, 3).seconds(work, task) == pytest.approx(3 * CORE.seconds(work, task))
