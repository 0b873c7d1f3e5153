"""`python -m benchmarks.fidelity --load`: is the simulator true of a worker with many owners?

A live worker on one core, over mutual TLS, and owners on another who send what was encrypted before
(`benchmarks.load`): each asks for every matrix of a layer in turn, again and again, which is a step
here. The simulator is given one core of this machine as `python -m sim.calibrate` measures it, and
from the processor time of other loads what frames and their bytes cost either side, and products
the worker: of one owner who is alone and asks for 1 token or for 128, and of sixteen who ask for 1,
whose requests are joined. How uneven tasks are, and how much longer all takes than processor time
says, is what makes the steps of those sixteen come out right. Then it has to say how long the steps
of 2, 4, 8 and 16 owners take that ask for 4 to 64 tokens. Joined requests, fair turns and the wait
for each other are all its own.

A machine that others share is faster at one moment than at another: before and after each load one
owner alone asks for one token, and what the simulator says is taken so many times as long as that
took longer than at first.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import numpy as np
from scipy.optimize import nnls

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
SMALLEST, LARGE = (512, 1), ((512, 128), (1024, 128))
"""What the costs of frames, bytes and products are measured with."""
OWNERS = (2, 4, 8, 16)
PROCESSES = 4
BARS = {"p50_error": 0.10, "p90_error": 0.20}
"""What the simulator should keep: medians, over the loads, of how far those percentiles are off."""
STEPS = 480
"""Simulated of all owners together: as uneven as they are, fewer tell little of the slow ones."""
_PROBE = 250
"""Steps of one owner alone that tell how fast the machine is just now."""
_SECONDS = 6.0
"""Of steps, about, a load."""


@dataclass(frozen=True)
class Load:
    """What was measured of so many owners.

    steps_s   of all, while all of them worked
    products  that the requests were joined to
    """

    owners: int
    steps_s: list[float]
    owners_processor_s: float
    worker_processor_s: float
    requests: int
    products: int


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
        before, launches = worker.processor_s(), worker.count("launches_total")
        for group in groups:
            group.begin()
        of_groups = [group.results() for group in groups]
        used = worker.processor_s() - before
        products = round(worker.count("launches_total") - launches)
    found = [one for results in of_groups for one in results]
    if any(one["wrong"] or one["lost"] for one in found):
        raise RuntimeError("the worker gave a wrong answer, or none")
    first = min(one["seconds"] for one in found)
    steps = []
    for one in found:
        ends = np.cumsum(one["rounds_s"])
        steps += [s for s, end in zip(one["rounds_s"], ends, strict=True) if end <= first][1:]
    theirs = sum(max(one["processor_s"] for one in results) for results in of_groups)
    return Load(owners, steps, theirs, used, sum(one["right"] for one in found), products)


def workload_of(catalogue: Catalogue, tokens: int) -> Workload:
    """The layer's matrices in turn, and nothing in between."""
    lane = tuple(Linear(i) for i in range(len(catalogue.matrices)))
    return Workload(
        "layer", tokens, tokens, catalogue.matrices, lane, NO_WORK, NO_WORK, 4, False, PRESET
    )  # fmt: skip


def sides(
    core: DeviceProfile, loads: Sequence[tuple[Load, Workload]]
) -> tuple[DeviceProfile, DeviceProfile]:
    """(owner, worker): the core, with what these loads' processor time says of either side.

    The owner, who sends what was encrypted before, makes no ciphertext and opens none: it has a
    cost of a frame and one of a byte. The worker has these, one of a product whatever its size, and
    one of what a product computes, as a multiple of what the core takes for it. Loads of different
    sizes, and differently joined, tell them apart: least squares of relative errors, none negative.
    """
    core = replace(core, overhead_s=dict(core.overhead_s) | {"multiply": 0.0})
    owners, worker = [], []
    for load, step in loads:
        joined = replace(step, tokens=round(step.tokens * load.requests / load.products))
        passes = load.products / len(step.linears)
        computed_s = passes * sum(
            core.seconds(multiply_work(m, joined.tokens), "multiply") for m in step.linears
        )
        sent = load.requests / len(step.linears) * (step.up_bytes + step.down_bytes)
        owners.append(np.array([2 * load.requests, sent]) / load.owners_processor_s)
        row = [2 * load.requests, sent, load.products, computed_s]
        worker.append(np.array(row) / load.worker_processor_s)
    ones = np.ones(len(loads))
    (frame_s, byte_s), _ = nnls(np.array(owners), ones)
    nothing = {"encrypt": 0.0, "decrypt": 0.0, "local": 0.0, "update": 0.0}
    owner = replace(
        core,
        rates=dict(core.rates) | {"ring_row": 1e18, "value": 1e18, "wire": 1 / max(byte_s, 1e-15)},
        bytes_per_s=1e18,
        overhead_s=dict(core.overhead_s) | nothing | {"frame": float(frame_s)},
    )
    (frame_s, byte_s, product_s, times), _ = nnls(np.array(worker), ones)
    computing = scaled(core, max(float(times), 1e-3))
    return owner, replace(
        computing,
        rates=dict(computing.rates) | {"wire": 1 / max(byte_s, 1e-15)},
        overhead_s=dict(core.overhead_s) | {"frame": float(frame_s), "multiply": float(product_s)},
    )


@dataclass(frozen=True)
class Model:
    """What the simulator was told of the machine.

    unevenness  see `WorldConfig`
    slower      how many times as long everything takes as its processor time says
    alone_s     median step of the smallest load's one owner, by which a later moment is compared
    """

    owner: DeviceProfile
    worker: DeviceProfile
    unevenness: float
    slower: float
    alone_s: float

    def steps(self, load: Workload, owners: int) -> list[float]:
        """The steps of so many owners, as the simulator has them."""
        world = WorldConfig(
            load, self.owner, self.worker, owners=owners, together=True, stagger=False,
            steps=-(-STEPS // owners), warmup=2, unevenness=self.unevenness, record=False,
        )  # fmt: skip
        return [self.slower * step.duration_s for step in simulate(world).steps]


def fitted(
    sides: tuple[DeviceProfile, DeviceProfile], alone_s: float, crowd: Load, step: Workload
) -> Model:
    """The model whose steps of the crowd have the median and the 90th percentile measured."""
    real = percentiles(crowd.steps_s)

    def off(unevenness: float) -> tuple[float, float, float]:
        found = percentiles(Model(*sides, unevenness, 1.0, alone_s).steps(step, crowd.owners))
        uneven = found["p90"] / found["p50"] - real["p90"] / real["p50"]
        return abs(uneven), unevenness, real["p50"] / found["p50"]

    _, unevenness, slower = min(off(i / 10) for i in range(13))
    return Model(*sides, unevenness, slower, alone_s)


def scaled(profile: DeviceProfile, slower: float) -> DeviceProfile:
    """A device that takes so many times as long for everything."""
    return replace(
        profile,
        rates={kind: rate / slower for kind, rate in profile.rates.items()},
        bytes_per_s=profile.bytes_per_s / slower,
        overhead_s={kind: s * slower for kind, s in profile.overhead_s.items()},
    )


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
        model = _calibrated(Path(directory), core)
        for width, tokens in SHAPES:
            place, load = _place(Path(directory), width, tokens, max(OWNERS))
            before = _alone(Path(directory), _PROBE)
            for owners in OWNERS:
                steps = model.steps(load, owners)
                slower = median(before.steps_s) / model.alone_s
                found = measured(
                    place, tokens, owners, max(6, round(_SECONDS / (slower * median(steps))))
                )
                after = _alone(Path(directory), _PROBE)
                slower = median(before.steps_s + after.steps_s) / model.alone_s
                rows.append(_row(width, tokens, found, [slower * s for s in steps]))
                rows[-1]["slower"], before = slower, after
                _say(rows[-1])
    figures = summary(rows) | {
        "slower": model.slower,
        "unevenness": model.unevenness,
        "owner": model.owner.facts(),
        "worker": model.worker.facts(),
        "rows": rows,
        "bars": BARS,
        "profile": core.facts(),
    }
    for name in ("p50_error", "p90_error", "p99_error", "bias", "worst_p50_error"):
        print(f"{name:<18}{figures[name]:.1%}")
    record.write(args.json, figures)


def _alone(directory: Path, rounds: int) -> Load:
    return measured(directory / _name(*SMALLEST), SMALLEST[1], 1, rounds)


def _calibrated(directory: Path, core: DeviceProfile) -> Model:
    """The model of this machine, from loads that are not among those to be foretold."""
    places = [_place(directory, *shape, max(OWNERS)) for shape in (SMALLEST, *LARGE)]
    (smallest, step), *large = places
    seen: list[tuple[Load, Workload]] = []
    alone, crowds = [], []
    for _ in range(2):  # the machine's speed changes; what is compared should not be of one moment
        alone.append(_alone(directory, 1000))
        crowds.append(measured(smallest, SMALLEST[1], max(OWNERS), 125))
        seen += [(alone[-1], step), (crowds[-1], step)]
        for (place, load), (_, tokens) in zip(large, LARGE, strict=True):
            seen.append((measured(place, tokens, 1, 80), load))
    crowd = replace(crowds[0], steps_s=[s for one in crowds for s in one.steps_s])
    model = fitted(sides(core, seen), median(s for one in alone for s in one.steps_s), crowd, step)
    for name, side in (("owner", model.owner), ("worker", model.worker)):
        frame_s, rate = side.overhead_s["frame"], side.rates["wire"]
        print(f"{name}: {1e6 * frame_s:.0f} us a frame, {rate / 1e9:.2f} GB/s", flush=True)
    print(
        f"worker: {1e6 * model.worker.overhead_s['multiply']:.0f} us a product, int8 "
        f"{model.worker.rates['int8']:.3g}/s; all takes {model.slower:.2f} times as long, "
        f"unevenness {model.unevenness:.1f}",
        flush=True,
    )
    return model


def _name(width: int, tokens: int) -> str:
    return f"{width}x{tokens}"


def _place(directory: Path, width: int, tokens: int, owners: int) -> tuple[Path, Workload]:
    place = directory / _name(width, tokens)
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
