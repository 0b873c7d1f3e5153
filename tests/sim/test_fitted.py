"""`benchmarks.fidelity --load` tells the simulator what it has to, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import fidelity_load
from benchmarks.fidelity_load import Load, Model, fitted, scaled, sides
from sim.workload import Workload, multiply_work
from tests.sim.test_world import OWNER, workload

CORE = replace(
    OWNER, rates=dict(OWNER.rates) | {"int8": 1e9, "wire": 1e9},
    overhead_s=dict(OWNER.overhead_s) | {"multiply": 5e-4},
)  # fmt: skip
STEP = workload([(400, 400), (300, 200)], [0.0])


FRAMES_S, BYTE_S, PRODUCT_S, TIMES = (3e-5, 1e-4), (2e-9, 3e-9), 2e-4, 1.7
"""A machine: of a frame and of a byte, (owner, worker); of a product, and what one computes."""


def load(owners: int, requests: int, products: int, step: Workload = STEP) -> Load:
    """What that machine would show."""
    joined = round(step.tokens * requests / products)
    bare = replace(CORE, overhead_s=dict(CORE.overhead_s) | {"multiply": 0.0})
    computed_s = sum(bare.seconds(multiply_work(m, joined), "multiply") for m in step.linears)
    sent = requests / len(step.linears) * (step.up_bytes + step.down_bytes)
    owner_s, worker_s = (2 * requests * f + sent * b for f, b in zip(FRAMES_S, BYTE_S, strict=True))
    worker_s += products * PRODUCT_S + TIMES * products / len(step.linears) * computed_s
    return Load(owners, [0.01], owner_s, worker_s, requests, products)


LARGE = [workload([(400, 400), (300, 200)], [0.0], 64), workload([(900, 800)], [0.0], 64)]
LOADS = [
    (load(1, 1000, 1000), STEP), (load(8, 1000, 250), STEP),
    *((load(1, 1000, 1000, step), step) for step in LARGE),
]  # fmt: skip


def test_what_each_side_pays_for_is_told_apart() -> None:
    """By loads of several sizes, one of which joins its requests."""
    owner, worker = sides(CORE, LOADS)
    assert [side.overhead_s["frame"] for side in (owner, worker)] == pytest.approx(FRAMES_S)
    assert [1 / side.rates["wire"] for side in (owner, worker)] == pytest.approx(BYTE_S)
    assert worker.overhead_s["multiply"] == pytest.approx(PRODUCT_S)
    assert worker.rates["int8"] == pytest.approx(CORE.rates["int8"] / TIMES)


def test_what_makes_a_crowd_come_out_right_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is uneven and slower than its processor time says, both as they are."""
    monkeypatch.setattr(fidelity_load, "STEPS", 120)
    both = sides(CORE, LOADS)
    truth = Model(*both, 0.6, 1.4, 0.01)
    crowd = replace(load(4, 1000, 400), steps_s=truth.steps(STEP, 4))
    found = fitted(both, 0.01, crowd, STEP)
    assert found.unevenness == pytest.approx(0.6, abs=0.11)
    assert found.slower == pytest.approx(1.4, rel=0.05)


def test_a_device_is_slower_in_everything() -> None:
    """Whatever work it is."""
    work = multiply_work(STEP.linears[0], 4)
    for task in ("multiply", "encrypt"):
        assert scaled(CORE, 3).seconds(work, task) == pytest.approx(3 * CORE.seconds(work, task))
