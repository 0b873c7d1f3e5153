"""`python -m benchmarks.fidelity --network`: is the simulator true over a real line?

Owner and worker run in two network namespaces, over TLS, joined by a line of a given rate and round
trip (see `benchmarks.shaped_line`), each on a core of its own. Real private training steps of a
small model are timed there; the simulator is given the same line, and one core of this machine as
`python -m sim.calibrate` measures it on other models. On two cores the line's forwarder and TCP's
own work take some of what owner and worker have.

Steps during which other processes were busy are left out as far as others remain.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from backends.he.params import preset
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from benchmarks.network_owner import PRESET, RANK, TOKENS, network_model
from benchmarks.shaped_line import (
    ADDRESSES,
    NoLineError,
    Shape,
    ShapedLine,
    require_line,
    shaped_line,
)
from scenarios import record
from scenarios.certs import Authority
from scenarios.preparation import prepared_for
from sim.calibration import DISTURBED
from sim.device import DeviceProfile
from sim.flows import Link
from sim.workload import trace_step
from sim.world import WorldConfig, simulate

__all__ = ["NoLineError", "run"]

RATES_BPS = (100e6, 1e9)
ROUND_TRIPS_S = (0.001, 0.020, 0.080)
LANES = (1, 4)
PORT = 7443
BARS = {"median_error": 0.10, "worst_error": 0.25}
"""What the simulator should keep."""


@dataclass
class Cell:
    """One line with one number of lanes: what was measured of it."""

    shape: Shape
    lanes: int
    steps: list[dict[str, float]] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    forwarder_s: float = 0.0

    def counted(self) -> list[dict[str, float]]:
        """Undisturbed steps; the least disturbed half where there are fewer than three."""
        quiet = [step for step in self.steps if step["elsewhere"] <= DISTURBED]
        if len(quiet) >= min(3, len(self.steps)):
            return quiet
        ranked = sorted(self.steps, key=lambda step: step["elsewhere"])
        return ranked[: max(3, len(ranked) // 2)]

    def predicted_s(self, profile: DeviceProfile) -> float:
        """The step time of the simulator."""
        access = Link(self.shape.bits_per_s, self.shape.rtt_s / 2)
        world = WorldConfig(
            trace_step(network_model(), TOKENS, lora_rank=RANK, preset=PRESET), profile,
            profile,
            lanes=self.lanes, access=access, site=Link(1e13, 0.0), steps=3, warmup=1, record=False,
        )  # fmt: skip
        return median(step.duration_s for step in simulate(world).steps)

    def figures(self, profile: DeviceProfile) -> dict[str, Any]:
        """This cell's row."""
        counted = self.counted()
        measured = median(step["seconds"] for step in counted)
        predicted = self.predicted_s(profile)
        row = {
            "bits_per_s": self.shape.bits_per_s,
            "rtt_s": self.shape.rtt_s,
            "lanes": self.lanes,
            "measured_s": measured,
            "predicted_s": predicted,
            "error": predicted / measured - 1,
            "steps": len(self.steps),
            "steps_counted": len(counted),
            "busy_elsewhere": median(step["elsewhere"] for step in counted),
            "bytes_up": median(step["bytes_up"] for step in counted),
            "bytes_down": median(step["bytes_down"] for step in counted),
            "packets_dropped_on_line": self.dropped,
            "forwarder_s_on_line": self.forwarder_s,
        }
        if self.estimates:
            row["estimate"] = self.estimates[0] | {
                "error": median(e["step_s"] for e in self.estimates) / measured - 1
            }
        return row


def calibrated(directory: Path, core: int) -> DeviceProfile:
    """The profile of one core, measured now."""
    print("calibrating one core", flush=True)
    file = directory / "one-core.json"
    command = [
        "taskset",
        "-c",
        str(core),
        sys.executable,
        "-m",
        "sim.calibrate",
        "--out",
        str(file),
    ]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise NoLineError("the calibration failed; see above")
    print("\n".join(found.stdout.splitlines()[-8:]))
    return DeviceProfile.load(file)


@contextmanager
def _worker(line: ShapedLine, model: Path, certs: Path, core: int) -> Iterator[int]:
    """A worker at the far end, serving; its process's number."""
    worker = line.start(
        1,
        [sys.executable, "-m", "scenarios.worker", "--model", str(model), "--listen",
         f"{ADDRESSES[1]}:{PORT}", "--tls", str(certs / "worker")],
        core,
    )  # fmt: skip
    assert worker.stdout is not None
    for text in worker.stdout:
        if " listening " in text:
            break
    else:
        raise NoLineError("the worker did not start; see above")
    try:
        yield worker.pid
    finally:
        worker.terminate()


def visit(
    cells: Iterable[Cell], shape: Shape, args: argparse.Namespace, model: Path, certs: Path
) -> None:
    """Bring up one line and measure its cells."""
    by_lanes = {cell.lanes: cell for cell in cells}
    cores = sorted(os.sched_getaffinity(0))
    with (
        shaped_line(shape, args.congestion) as line,
        _worker(line, model, certs, cores[-1]) as pid,
    ):
        owner = line.start(
            0,
            [sys.executable, "-m", "benchmarks.network_owner", "--worker",
             f"{ADDRESSES[1]}:{PORT}", "--tls", str(certs / "owner"), "--cache", str(args.cache),
             "--seconds", str(args.seconds), "--patience", str(args.patience),
             "--lanes", *map(str, by_lanes), "--ours", str(pid), str(line.pid)],
            cores[0],
        )  # fmt: skip
        assert owner.stdout is not None
        for text in owner.stdout:
            if text.startswith("{"):
                found = json.loads(text)["cell"]
                cell = by_lanes.pop(found["lanes"])
                cell.steps += found["steps"]
                cell.estimates += found["estimates"]
                _say(cell)
    if by_lanes:
        raise NoLineError("the owner ended early; see above")
    for cell in cells:
        cell.dropped += line.dropped
        cell.forwarder_s += line.busy_s


def _say(cell: Cell) -> None:
    seconds = median(step["seconds"] for step in cell.counted())
    quiet = sum(step["elsewhere"] <= DISTURBED for step in cell.steps)
    print(
        f"{cell.shape.bits_per_s / 1e6:6.0f} Mb/s {1e3 * cell.shape.rtt_s:3.0f} ms {cell.lanes} "
        f"lanes: {seconds:.2f} s ({quiet} of {len(cell.steps)} steps undisturbed)",
        flush=True,
    )


def summary(rows: list[dict[str, Any]], key: str = "error") -> dict[str, float]:
    """Over all cells: median, 90th percentile and worst of the errors' sizes; their mean."""
    errors = [row[key] for row in rows]
    sizes = sorted(abs(error) for error in errors)
    return {
        "median_error": median(sizes),
        "p90_error": sizes[max(0, -(-9 * len(sizes) // 10) - 1)],
        "worst_error": sizes[-1],
        "bias": fmean(errors),
    }


def print_table(figures: dict[str, Any]) -> None:
    """The cells as a table."""
    print(f"{'line':>16}{'lanes':>7}{'measured':>11}{'simulated':>11}{'error':>8}")
    for row in figures["cells"]:
        name = f"{row['bits_per_s'] / 1e6:.0f} Mb/s {1e3 * row['rtt_s']:3.0f} ms"
        print(
            f"{name:>16}{row['lanes']:>7}{row['measured_s']:>9.2f} s{row['predicted_s']:>9.2f} s"
            f"{row['error']:>+8.1%}"
        )
    print(
        f"median error {figures['median_error']:.1%}, p90 {figures['p90_error']:.1%}, worst "
        f"{figures['worst_error']:.1%}, bias {figures['bias']:+.1%}"
    )


def run(args: argparse.Namespace) -> None:
    """Measure every cell and compare. Raises NoLineError, or ProfileError for `--profile`."""
    given = None if args.profile is None else DeviceProfile.load(args.profile)
    require_line()
    if len(os.sched_getaffinity(0)) < 2:
        raise NoLineError("two sides need two cores; this process may use one")
    # So that the line is taken down then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cells = [
        Cell(Shape(rate, rtt), lanes)
        for rate in RATES_BPS
        for rtt in ROUND_TRIPS_S
        for lanes in LANES
    ]
    with tempfile.TemporaryDirectory(prefix="line-") as name:
        directory, authority = Path(name), Authority()
        authority.issue(directory / "owner")
        authority.issue(directory / "worker", [ADDRESSES[1]])
        base = RandomBase(network_model(), 0)
        skeleton = build_skeleton(base)
        prepared, _ = prepared_for(skeleton, preset(PRESET), args.cache)
        profile = given or calibrated(directory, min(os.sched_getaffinity(0)))
        for _ in range(args.rounds):
            for shape in dict.fromkeys(cell.shape for cell in cells):
                here = [cell for cell in cells if cell.shape == shape]
                visit(here, shape, args, prepared.directory, directory)
    rows = [cell.figures(profile) for cell in cells]
    figures: dict[str, Any] = {"cells": rows, **summary(rows), "bars": BARS}
    print_table(figures)
    estimated = [{"error": row["estimate"]["error"]} for row in rows if "estimate" in row]
    if estimated:
        figures["estimates"] = summary(estimated)
    figures |= {"congestion": args.congestion, "rounds": args.rounds, "profile": profile.facts()}
    record.write(args.json, figures)
