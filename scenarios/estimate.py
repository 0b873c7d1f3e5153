"""How long a real run will take over this line, by the simulator, before its first step.

The line and the worker are as the probe found them (`scenarios.probe`). The owner's machine is the
built-in profile of its kind, made slower or faster by what the cipher took during the probe and by
a small float product. It takes a second or two; what it cannot know is how busy owner, worker and
line will be later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from backends.hardware import Hardware
from backends.threads import core_count
from backends.units import human_bytes
from scenarios.probe import LineProbe

if TYPE_CHECKING:
    from sim.device import DeviceProfile
    from sim.workload import Workload
    from sim.world import WorldConfig

_BOTTLENECKS = {
    "owner": "owner", "worker": "worker", "up": "upload", "down": "download",
    "latency": "round trip", "head": "head", "idle": "waiting",
}  # fmt: skip
"""What a step waits for most, by the part of its critical path."""
_SIZE = 768
_TIMES = 3


@dataclass(frozen=True)
class Shape:
    """What decides a step's cost beside the model.

    tokens     of a micro-batch, in sequences of `sequence`
    preset     of the cipher
    passes     micro-batches of a step, where they are more than the lanes that take them
    """

    config: PretrainedConfig
    tokens: int
    sequence: int
    lanes: int
    rank: int
    preset: str
    remote_head: bool = False
    passes: int | None = None

    @property
    def turns(self) -> float:
        """Times that all lanes take a micro-batch in a step."""
        return 1.0 if self.passes is None else self.passes / self.lanes


@dataclass(frozen=True)
class Estimate:
    """For `steps` steps.

    worker_s    that workers compute in a step
    bottleneck  one of `_BOTTLENECKS`' values
    """

    steps: int
    step_s: float
    bytes_up: float
    bytes_down: float
    worker_s: float
    bottleneck: str
    probe: LineProbe

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.step_s

    def figures(self) -> dict[str, Any]:
        """For --json. MB are 10^6 bytes."""
        return {
            "seconds": self.seconds,
            "step_s": self.step_s,
            "steps": self.steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bottleneck": self.bottleneck,
            "rtt_s": self.probe.rtt_s,
            "up_mb_s": self.probe.up_b_s / 1e6,
            "down_mb_s": self.probe.down_b_s / 1e6,
            "probe_s": self.probe.seconds,
            "probe_bytes": self.probe.bytes,
        }

    def lines(self) -> list[str]:
        """For a person."""
        p = self.probe
        what = {
            "owner": "this machine is the bottleneck",
            "worker": "the worker is the bottleneck",
            "upload": "the upload is the bottleneck",
            "download": "the download is the bottleneck",
            "round trip": "the round trip is the bottleneck: more --lanes hide it",
            "head": "the head, on this machine, is the bottleneck: try --lm-head remote",
            "waiting": "nothing is busy for long",
        }[self.bottleneck]
        return [
            f"the line: {1e3 * p.rtt_s:.3g} ms round trip, {_rate(p.up_b_s)} up, "
            f"{_rate(p.down_b_s)} down (probed with {human_bytes(p.bytes)} in {p.seconds:.1f} s)",
            f"about {human_bytes(self.bytes_up + self.bytes_down)} and {spoken(self.seconds)} for "
            f"{self.steps} step{'s' if self.steps > 1 else ''}; {what}",
        ]


def _rate(bytes_per_s: float) -> str:
    """A probe of a few MB cannot tell how much more than this a line carries."""
    return "over 1 GB/s" if bytes_per_s > 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"


def spoken(seconds: float) -> str:
    """A duration as a person says it: 41 s, 12 min, 2 h 10 min, 3 days 4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def estimate(
    shape: Shape, probe: LineProbe, hardware: Hardware, workers: int, steps: int
) -> Estimate:
    """What the simulator says. Raises ValueError or RuntimeError for a model it cannot follow."""
    # Only here: a run without a worker elsewhere needs no simulator.
    from sim.trace import critical_path
    from sim.world import simulate

    workload = workload_of(shape, shape.remote_head, hardware)
    result = simulate(_world(workload, shape.lanes, probe, hardware, workers))
    (step,) = result.steps
    parts = critical_path(result.trace.spans, step.start_s, step.end_s)
    name = _BOTTLENECKS[max(parts, key=lambda part: parts[part])]
    turns = shape.turns
    return Estimate(
        steps, turns * step.duration_s, turns * steps * step.bytes_up,
        turns * steps * step.bytes_down, turns * sum(result.worker_busy_s.values()), name, probe,
    )  # fmt: skip


def step_here_s(shape: Shape, workload: Workload, hardware: Hardware) -> float:
    """Seconds of a step with its worker in this process. Raises ValueError or RuntimeError."""
    from sim.world import WorldConfig, simulate

    here = this_machine(hardware)
    result = simulate(
        WorldConfig(workload, here, here, lanes=shape.lanes, in_process=True, steps=1)
    )
    return shape.turns * result.steps[-1].duration_s


def head_share(shape: Shape, hardware: Hardware) -> float | None:
    """Part of the owner's own layers that is the head and the loss, for a model on such a machine.

    None for a model that the simulator cannot follow.
    """
    from sim.trace import HEAD
    from sim.workload import Local

    try:
        workload, here = workload_of(shape, shape.remote_head, hardware), this_machine(hardware)
        own = [item for item in workload.lane if isinstance(item, Local)]
        taken_s = [(item.label, here.seconds(item.on(here), "local")) for item in own]
    except (ValueError, RuntimeError):
        return None
    return sum(s for label, s in taken_s if label == HEAD) / sum(s for _, s in taken_s)


def workload_of(shape: Shape, remote_head: bool, hardware: Hardware) -> Workload:
    """The trace of one micro-batch on this hardware. Raises ValueError or RuntimeError."""
    from sim.workload import trace_step

    return trace_step(
        shape.config, shape.tokens, shape.sequence, shape.rank, remote_head, shape.preset,
        hardware.dtype,
    )  # fmt: skip


def _world(
    workload: Workload, lanes: int, probe: LineProbe, hardware: Hardware, workers: int
) -> WorldConfig:
    """One owner like this machine, workers and a line like those probed; one step after another."""
    from sim.device import DeviceProfile, Origin
    from sim.flows import Link
    from sim.stream import Tcp
    from sim.world import WorldConfig

    limbs = _limbs(workload, probe)
    origin = Origin("measured", "the probe of a line", time.strftime("%Y-%m-%d"))
    worker = DeviceProfile(
        "worker", origin, 1.0, {"int8": limbs * probe.products_per_s}, 1e15, {"multiply": 0.0}
    )
    return WorldConfig(
        workload, _owner(workload, probe, hardware), worker, lanes=lanes, workers=workers,
        access=Link(8 * probe.up_b_s, probe.rtt_s / 2), down_bps=8 * probe.down_b_s,
        site=Link(1e15, 0.0), steps=1, warmup=1,
        # What was measured is what frames get, after all overhead.
        tcp=Tcp(overhead=1.0),
    )  # fmt: skip


def _limbs(workload: Workload, probe: LineProbe) -> float:
    """Digits of a value of the matrices that were asked for, on average over the products."""
    from sim.workload import limbs_of

    limbs = products = 0.0
    for matrix, tokens in probe.asked:
        shape = workload.matrices[matrix]
        size = float(tokens) * shape.in_features * shape.out_features
        limbs, products = limbs + limbs_of(shape) * size, products + size
    return limbs / products if products else 3.0


def _owner(workload: Workload, probe: LineProbe, hardware: Hardware) -> DeviceProfile:
    """A profile of this machine, its cipher at the speed that the probe saw."""
    from backends.he.params import preset
    from sim.workload import decrypt_work, encrypt_work

    base = this_machine(hardware)
    parameters = preset(workload.preset)
    expected_s = sum(
        base.seconds(work(workload.matrices[matrix], tokens, parameters), task)
        for matrix, tokens in probe.asked
        for task, work in (("encrypt", encrypt_work), ("decrypt", decrypt_work))
    )
    slower = probe.owner_s / expected_s if probe.owner_s > 0 else 1.0
    rates = dict(base.rates)
    for kind in ("ring_row", "value"):
        rates[kind] /= slower
    return replace(base, rates=rates)


def this_machine(hardware: Hardware) -> DeviceProfile:
    """The built-in profile of its kind, with its cores and what a small float product takes here.

    The cipher's kernels are split over all cores.
    """
    from sim.device import DeviceProfile

    base = DeviceProfile.builtin("h200" if hardware.gpu else "cpu-2core")
    cores = base.cores if hardware.gpu else float(core_count())
    width = {task: min(cores, value) for task, value in base.width.items()}
    rates = {kind: rate * cores / base.cores for kind, rate in base.rates.items()}
    rates["float"] = float_rate(hardware)
    if "wire" in rates:  # of one core
        rates["wire"] = base.rates["wire"]
    return replace(base, name="this machine", rates=rates, cores=cores, width=width)


def float_rate(hardware: Hardware) -> float:
    """Multiply-adds a second of a small product in the run's float type."""
    a = torch.ones(_SIZE, _SIZE, dtype=hardware.dtype, device=hardware.device)
    fastest = float("inf")
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        fastest = min(fastest, time.perf_counter() - start)
    return _SIZE**3 / fastest
