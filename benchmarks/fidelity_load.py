"""`python -m benchmarks.fidelity --load`: is the simulator true of a worker with many owners?

A live worker on one core, over mutual TLS, and owners on another who send what was encrypted before
(`benchmarks.load`): each asks for every matrix of a layer in turn, again and again, which is a step
here. The simulator is given one core of this machine as `python -m sim.calibrate` measures it, and
what a frame costs either side and a product the worker, whatever their sizes, from the processor
time of owners who ask for one token: one alone, and sixteen, whose requests are joined. How uneven
tasks are, and how much longer all takes than processor time says, is what makes the steps of those
sixteen come out right. Then it has to say how long the steps of 2, 4, 8 and 16 owners take that ask
for more, in layers of two widths. Joined requests, fair turns and the wait for each other are all
its own. A machine that others share is faster at one moment than at another: before and after each
load one owner alone asks for one token, and the simulator is told how much longer that takes than
it took first.
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
SMALLEST = (512, 1)
"""What the costs of a frame and a product are measured with."""
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


def beyond(core: DeviceProfile, load: Load, step: Workload) -> tuple[float, float]:
    """Processor seconds of a request, of (its owner, the worker), for which no size accounts."""
    joined = step.tokens * load.requests / load.products
    products_s = sum(core.seconds(multiply_work(m, joined), "multiply") for m in step.linears)
    products_s *= load.products / len(step.linears)
    bytes_s = load.requests / len(step.linears) * (step.up_bytes + step.down_bytes)
    bytes_s /= core.rates["wire"]
    owners_s = load.owners_processor_s - bytes_s
    worker_s = load.worker_processor_s - bytes_s - products_s
    return owners_s / load.requests, worker_s / load.requests


def sides(
    core: DeviceProfile, alone: Load, crowd: Load, step: Workload
) -> tuple[DeviceProfile, DeviceProfile]:
    """(owner, worker): the core, and what a frame and a product cost whatever their size.

    Whoever sends what was encrypted before makes no ciphertext, and opens none. What a request
    costs the worker beyond its size is its frames', which joined ones have each, and its product's,
    which they share: two loads that are joined differently tell them apart.
    """
    core = replace(core, overhead_s=dict(core.overhead_s) | {"multiply": 0.0})
    (_, worker_alone_s), (owner_s, worker_s) = (beyond(core, one, step) for one in (alone, crowd))
    shared = crowd.products / crowd.requests
    product_s = min(max(0.0, (worker_alone_s - worker_s) / (1 - shared)), worker_alone_s)
    nothing = {"encrypt": 0.0, "decrypt": 0.0, "local": 0.0, "update": 0.0}
    owner = replace(
        core,
        rates=dict(core.rates) | {"ring_row": 1e18, "value": 1e18},
        bytes_per_s=1e18,
        overhead_s=dict(core.overhead_s) | nothing | {"frame": max(0.0, owner_s / 2)},
    )
    more = {"frame": (worker_alone_s - product_s) / 2, "multiply": product_s}
    return owner, replace(core, overhead_s=dict(core.overhead_s) | more)


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

    def steps(self, load: Workload, owners: int, slower: float = 1.0) -> list[float]:
        """The steps of so many owners, as the simulator has them."""
        times = self.slower * slower
        world = WorldConfig(
            load, scaled(self.owner, times), scaled(self.worker, times), owners=owners,
            together=True, steps=-(-STEPS // owners), warmup=2, stagger=False, record=False,
            unevenness=self.unevenness,
        )  # fmt: skip
        return [step.duration_s for step in simulate(world).steps]


def fitted(
    sides: tuple[DeviceProfile, DeviceProfile], alone: Load, crowd: Load, step: Workload
) -> Model:
    """The model whose steps of the crowd have the median and the 90th percentile measured."""
    real, alone_s = percentiles(crowd.steps_s), median(alone.steps_s)

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
        smallest, load = _place(Path(directory), *SMALLEST, max(OWNERS))

        def now(owners: int, rounds: int) -> Load:
            return measured(smallest, SMALLEST[1], owners, rounds)

        alone, crowd = now(1, 1000), now(max(OWNERS), 250)
        both = sides(core, alone, crowd, load)
        model = fitted(both, alone, crowd, load)
        frame, product = [side.overhead_s["frame"] for side in both], both[1].overhead_s["multiply"]
        print(
            f"a frame: owner {1e6 * frame[0]:.0f} us, worker {1e6 * frame[1]:.0f} us; "
            f"a product {1e6 * product:.0f} us; all {model.slower:.2f} times as long, unevenness "
            f"{model.unevenness:.2f}", flush=True,
        )  # fmt: skip
        for width, tokens in SHAPES:
            place, load = _place(Path(directory), width, tokens, max(OWNERS))
            for owners in OWNERS:
                before = now(1, _PROBE)
                slower = median(before.steps_s) / model.alone_s
                rounds = max(6, round(_SECONDS / median(model.steps(load, owners, slower))))
                found = measured(place, tokens, owners, rounds)
                after = now(1, _PROBE)
                slower = median(before.steps_s + after.steps_s) / model.alone_s
                expected = model.steps(load, owners, slower)
                rows.append(_row(width, tokens, found, expected) | {"slower": slower})
                _say(rows[-1])
    figures = summary(rows) | {
        "frame_s": {"owner": frame[0], "worker": frame[1]},
        "product_s": product,
        "slower": model.slower,
        "unevenness": model.unevenness,
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
