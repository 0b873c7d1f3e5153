"""`python -m benchmarks.fidelity --load`: is the simulator true of a worker with many owners?

A live worker on one core, over mutual TLS, and owners on another who send what was encrypted before
(`benchmarks.load`): each asks for every matrix of a layer in turn, again and again, which is a step
here. The simulator is given one core of this machine as `python -m sim.calibrate` measures it, and
what a frame costs either side whatever its size, from the processor time of ONE owner who is alone
and asks for one token; then it has to say how long the steps of 2, 4, 8 and 16 owners take that ask
for more. Joined requests, fair turns and the wait for each other are all its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import numpy as np

from backends.he.store import WorkerPart
from benchmarks.fidelity_network import calibrated
from benchmarks.load.live import Group, live_worker
from benchmarks.load.made import PRESET, make_place
from benchmarks.shaped_line import NoLineError
from protocol.catalogue import Catalogue
from scenarios import record
from sim.device import NO_WORK, DeviceProfile
from sim.workload import Linear, Workload, multiply_work
from sim.world import WorldConfig, simulate

SHAPES = ((512, 16), (512, 64), (1024, 4), (1024, 32))
"""(width of the layer, tokens of a request)."""
ALONE = (512, 1)
"""What the cost of a frame is measured with."""
OWNERS = (2, 4, 8, 16)
PROCESSES = 4
BARS = {"p50_error": 0.10, "p90_error": 0.20}
"""What the simulator should keep: medians, over the loads, of how far those percentiles are off."""
_SECONDS = 6.0
"""Of steps, about, a load."""


@dataclass(frozen=True)
class Load:
    """What was measured of so many owners. steps_s: of all, while all of them worked."""

    owners: int
    steps_s: list[float]
    owners_processor_s: float
    worker_processor_s: float
    requests: int


def measured(place: Path, tokens: int, owners: int, rounds: int) -> Load:
    """So many owners at once, each `rounds` times through the layer."""
    cores = sorted(os.sched_getaffinity(0))
    with live_worker(place / "model", place / "worker", cores[0]) as worker:
        names = [f"owner{i}" for i in range(owners)]
        count = min(PROCESSES, owners)
        groups = [
            Group(place, worker.address, names[i::count], tokens, rounds, cores[1])
            for i in range(count)
        ]
        for group in groups:
            group.ready()
        before = worker.processor_s()
        for group in groups:
            group.begin()
        found = [one for group in groups for one in group.results()]
        used = worker.processor_s() - before
    if any(one["wrong"] or one["lost"] for one in found):
        raise RuntimeError("the worker gave a wrong answer, or none")
    first = min(one["seconds"] for one in found)
    steps = []
    for one in found:
        ends = np.cumsum(one["rounds_s"])
        steps += [s for s, end in zip(one["rounds_s"], ends, strict=True) if end <= first][1:]
    return Load(
        owners, steps, found[0]["processor_s"] if owners == 1 else float("nan"), used,
        sum(one["right"] for one in found),
    )  # fmt: skip


def workload_of(catalogue: Catalogue, tokens: int) -> Workload:
    """The layer's matrices in turn, and nothing in between."""
    lane = tuple(Linear(i) for i in range(len(catalogue.matrices)))
    return Workload(
        "layer", tokens, tokens, catalogue.matrices, lane, NO_WORK, NO_WORK, 4, False, PRESET
    )  # fmt: skip


def sides(core: DeviceProfile, alone: Load, load: Workload) -> tuple[DeviceProfile, DeviceProfile]:
    """(owner, worker) of this load: the core, and what a frame costs either whatever its size.

    Whoever sends what was encrypted before makes no ciphertext, and opens none. What a request
    costs the worker besides its product is all in its frames: joined ones have it each.
    """
    core = replace(core, overhead_s=dict(core.overhead_s) | {"multiply": 0.0})
    frames = 2 * alone.requests
    per_step = sum(core.seconds(multiply_work(m, load.tokens), "multiply") for m in load.linears)
    steps = alone.requests / len(load.linears)
    bytes_s = steps * (load.up_bytes + load.down_bytes) / core.rates["wire"]
    owner_s = (alone.owners_processor_s - bytes_s) / frames
    worker_s = (alone.worker_processor_s - steps * per_step - bytes_s) / frames
    nothing = {"encrypt": 0.0, "decrypt": 0.0, "local": 0.0, "update": 0.0}
    owner = replace(
        core,
        rates=dict(core.rates) | {"ring_row": 1e18, "value": 1e18},
        bytes_per_s=1e18,
        overhead_s=dict(core.overhead_s) | nothing | {"frame": max(0.0, owner_s)},
    )
    worker = replace(core, overhead_s=dict(core.overhead_s) | {"frame": max(0.0, worker_s)})
    return owner, worker


def predicted(
    load: Workload, sides: tuple[DeviceProfile, DeviceProfile], owners: int
) -> list[float]:
    """The steps of so many owners, as the simulator has them."""
    world = WorldConfig(
        load, *sides, owners=owners, together=True, steps=12, warmup=2, stagger=False, record=False
    )
    return [step.duration_s for step in simulate(world).steps]


def percentiles(steps: list[float]) -> dict[str, float]:
    """p50, p90 and p99, in seconds."""
    cuts = quantiles(steps, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def run(args: argparse.Namespace) -> None:
    """Calibrate, load, compare, say."""
    if len(os.sched_getaffinity(0)) < 2:
        raise NoLineError("--load takes two cores: one for the worker, one for the owners")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fidelity-load-") as directory:
        core = (
            DeviceProfile.load(args.profile)
            if args.profile
            else calibrated(Path(directory), min(os.sched_getaffinity(0)))
        )
        place, load = _place(Path(directory), *ALONE, 1)
        alone = measured(place, ALONE[1], 1, 400)
        both = sides(core, alone, load)
        frame = [side.overhead_s["frame"] for side in both]
        print(f"a frame: owner {1e6 * frame[0]:.0f} us, worker {1e6 * frame[1]:.0f} us", flush=True)
        for width, tokens in SHAPES:
            place, load = _place(Path(directory), width, tokens, max(OWNERS))
            for owners in OWNERS:
                expected = predicted(load, both, owners)
                rounds = max(6, round(_SECONDS / median(expected)))
                found = measured(place, tokens, owners, rounds)
                rows.append(_row(width, tokens, found, expected))
                _say(rows[-1])
    figures = summary(rows) | {
        "frame_s": {"owner": frame[0], "worker": frame[1]},
        "rows": rows,
        "bars": BARS,
        "profile": core.facts(),
    }
    for name in ("p50_error", "p90_error", "p99_error", "bias", "worst_p50_error"):
        print(f"{name:<18}{figures[name]:.1%}")
    record.write(args.json, figures)


def _place(directory: Path, width: int, tokens: int, owners: int) -> tuple[Path, Workload]:
    place = directory / f"{width}x{tokens}"
    make_place(place, width, tokens, owners)
    return place, workload_of(WorkerPart.open(place / "model").catalogue, tokens)


def _row(width: int, tokens: int, found: Load, expected: list[float]) -> dict[str, Any]:
    real, simulated = percentiles(found.steps_s), percentiles(expected)
    return {
        "width": width,
        "tokens": tokens,
        "owners": found.owners,
        "steps": len(found.steps_s),
        "measured_s": real,
        "predicted_s": simulated,
        "error": {p: simulated[p] / real[p] - 1 for p in real},
    }


def _say(row: dict[str, Any]) -> None:
    errors = "  ".join(f"{p} {1e3 * s:.0f} ms {row['error'][p]:+.0%}"
                       for p, s in row["measured_s"].items())  # fmt: skip
    print(
        f"width {row['width']}, {row['tokens']} tokens, {row['owners']} owners: {errors}",
        flush=True,
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over the loads: medians of the errors' sizes, the signed mean of p50's, the worst p50."""
    found = {
        f"{p}_error": median(abs(row["error"][p]) for row in rows) for p in ("p50", "p90", "p99")
    }
    return found | {
        "bias": fmean(row["error"]["p50"] for row in rows),
        "worst_p50_error": max(abs(row["error"]["p50"]) for row in rows),
    }
