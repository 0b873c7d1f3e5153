"""Worlds whose cause is known by construction: the critical path must name it.

Each is also asked what really changes the figure: the knob of the named part does, the others' do
not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from protocol.catalogue import MatrixShape
from protocol.owner_memory import OwnerConfig
from sim.device import DeviceProfile, Origin, Work
from sim.flows import Link
from sim.stream import Tcp
from sim.trace import HEAD, critical_path
from sim.workload import Linear, Local, Workload
from sim.world import WorldConfig, simulate

ORIGIN = Origin("datasheet", "a test", "2026-01-01")
TASKS = dict.fromkeys(("encrypt", "decrypt", "multiply", "local", "update"), 1e-6)
OWNER = DeviceProfile(
    "owner", ORIGIN, 2.0, {"float": 1e9, "ring_row": 1e9, "value": 1e9}, 1e12, TASKS
)
WORKER = DeviceProfile("worker", ORIGIN, 1.0, {"int8": 1e12}, 1e12, TASKS)
PATIENT = OwnerConfig(request_timeout_s=1e4, timeout_s_max=1e5)


def load(up: int = 3, down: int = 2, own: float = 1e5, head: float = 1e5) -> Workload:
    """Three groups of 300 inputs and outputs, 16 tokens; bytes of a value, and own operations."""
    matrices = tuple(
        MatrixShape(f"group{i} {way}", 300, 300, up * 300, down * 300)
        for i in range(3) for way in ("forward", "backward")
    )  # fmt: skip

    def local(label: str, count: float) -> Local:
        return Local(label, (Work({"float": count}),))

    items: list[Local | Linear] = []
    for place, matrix in enumerate((0, 2, 4, 5, 3, 1)):
        items += [local(HEAD, head) if place == 3 else local("own", own), Linear(matrix)]
    none = Work(launches=1.0)
    return Workload(
        "toy", 16, 16, matrices, (*items, local("last gradients", own)), none, none, 4, False,
        "exact",
    )  # fmt: skip


def world(workload: Workload | None = None, **changes: Any) -> WorldConfig:
    """Nothing in it takes long, but what is changed."""
    base = WorldConfig(
        workload or load(), OWNER, WORKER, access=Link(1e10, 1e-6), steps=2, protocol=PATIENT,
        tcp=Tcp(overhead=1.0), stagger=False,
    )  # fmt: skip
    return replace(base, **changes)


def slower(profile: DeviceProfile, times: float, *kinds: str) -> DeviceProfile:
    """So many times slower at these kinds of operations."""
    rates = {k: r / times if k in kinds else r for k, r in profile.rates.items()}
    return replace(profile, rates=rates)


def _near(config: WorldConfig) -> WorldConfig:
    return replace(config, access=replace(config.access, delay_s=config.access.delay_s / 2))


def _wide(config: WorldConfig) -> WorldConfig:
    access = replace(config.access, bandwidth_bps=2 * config.access.bandwidth_bps)
    return replace(config, access=access, down_bps=config.down_bps)


def _wide_down(config: WorldConfig) -> WorldConfig:
    return replace(config, down_bps=2 * (config.down_bps or config.access.bandwidth_bps))


def _quick(side: str) -> Callable[[WorldConfig], WorldConfig]:
    def quicker(config: WorldConfig) -> WorldConfig:
        profile: DeviceProfile = getattr(config, side)
        return replace(config, **{side: slower(profile, 0.5, *profile.rates)})

    return quicker


def _short_head(config: WorldConfig) -> WorldConfig:
    lane = tuple(
        replace(item, parts=tuple(0.5 * part for part in item.parts))
        if isinstance(item, Local) and item.label == HEAD
        else item
        for item in config.workload.lane
    )
    return replace(config, workload=replace(config.workload, lane=lane))


REMEDIES: Mapping[str, Callable[[WorldConfig], WorldConfig]] = {
    "latency": _near, "up": _wide, "down": _wide_down, "owner": _quick("owner"),
    "worker": _quick("worker"), "head": _short_head,
}  # fmt: skip
SLOW_GPU, HEAVY = slower(WORKER, 1e5, "int8"), load(own=1e9)
LOW_UP, LOW_DOWN = Link(1e5, 1e-6), Link(1e10, 1e-6)
WORLDS = {
    "far, 1 Gb/s": ("latency", world(access=Link(1e9, 5.0))),
    "far, 100 Gb/s": ("latency", world(access=Link(1e11, 5.0))),
    "far, four lanes": ("latency", world(access=Link(1e9, 0.5), lanes=4)),
    "a window that is used up": (
        "latency", world(load(up=3000), access=Link(1e12, 0.05), tcp=Tcp(window_bytes=1e5)),
    ),
    "parallel, far": ("latency", world(access=Link(1e9, 0.2), streams=False)),
    "losses bound the rate": ("latency", world(access=Link(1e9, 0.02, loss=0.01))),
    "narrow both ways": ("up", world(access=LOW_UP)),
    "narrow, four lanes": ("up", world(access=LOW_UP, lanes=4)),
    "narrow, parallel": ("up", world(access=LOW_UP, streams=False, lanes=2)),
    "much to send": ("up", world(load(up=300), access=Link(1e7, 1e-6))),
    "narrow downwards": ("down", world(access=LOW_DOWN, down_bps=1e5)),
    "narrow downwards, four lanes": ("down", world(access=LOW_DOWN, down_bps=1e5, lanes=4)),
    "much to get": ("down", world(load(down=900), access=Link(1e7, 1e-6))),
    "own layers": ("owner", world(HEAVY)),
    "cipher": ("owner", world(owner=slower(OWNER, 1e5, "ring_row", "value"))),
    "own layers of four lanes": ("owner", world(HEAVY, lanes=4)),
    "a slow GPU": ("worker", world(worker=SLOW_GPU)),
    "a GPU that others use too": ("worker", world(worker=SLOW_GPU, owners=3)),
    "a wide head": ("head", world(load(head=1e10))),
    "a wide head, four lanes": ("head", world(load(head=1e10), lanes=4)),
}  # fmt: skip


def parts_of(config: WorldConfig) -> tuple[dict[str, float], float]:
    """Where the last step of the first owner went, and the seconds it took."""
    result = simulate(replace(config, record_owners=1))
    step = [step for step in result.steps if step.owner == "owner0"][-1]
    return critical_path(result.trace.spans, step.start_s, step.end_s), step.duration_s


@pytest.mark.parametrize("name", WORLDS)
def test_the_cause_is_named_and_its_remedy_helps(name: str) -> None:
    """The largest part is what was made slow; turning its knob shortens the step most."""
    cause, config = WORLDS[name]
    parts, step_s = parts_of(config)
    assert sum(parts.values()) == pytest.approx(step_s)
    assert max(parts, key=lambda part: parts[part]) == cause
    assert parts[cause] > 0.5 * step_s
    after = {part: parts_of(mend(config))[1] for part, mend in REMEDIES.items()}
    helped = min(after, key=lambda part: after[part])
    # Where both ways are narrow, one knob is the line's for both.
    assert helped == cause or after[cause] <= 1.01 * after[helped], after
    assert after[cause] < 0.85 * step_s


def test_every_cause_is_there_twice() -> None:
    """Two worlds of each at least."""
    causes = [cause for cause, _ in WORLDS.values()]
    assert set(causes) == set(REMEDIES)
    assert min(causes.count(cause) for cause in set(causes)) >= 2


def test_what_ten_seconds_are_is_no_upload() -> None:
    """However fast the line is: the case that was told wrong."""
    for bps in (1e9, 1e11):
        parts, step_s = parts_of(world(access=Link(bps, 5.0)))
        assert parts["latency"] > 0.95 * step_s
        assert parts["up"] + parts["down"] < 0.05 * step_s
