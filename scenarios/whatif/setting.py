"""One what-if question: a setting of every knob, its simulated world, and what came out.

`KEYS` is the list of knobs, for the command line, study files, tables and pictures alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import networkx as nx
import numpy as np

from protocol.placement import Placement
from scenarios.head import CHOICES as CHOICES_OF_HEAD
from scenarios.head import HEADS, pays
from scenarios.whatif import quantities
from scenarios.whatif.clear import ClearRun, clear_speed, memory_gb, needed_gb
from scenarios.whatif.quantities import Form, Value
from sim.device import DeviceProfile, ProfileError
from sim.network import Link, star, two_sites
from sim.trace import PARTS, critical_path
from sim.workload import MODELS, Workload, WorkloadError, trace_step
from sim.world import WorldConfig, WorldError, WorldResult, simulate

CHOICES = {
    "placement": ("spread", "by-layer", "one"),
    "connection": ("stream", "parallel"),
    "head": CHOICES_OF_HEAD,
}
SITE_LAN = Link(bandwidth_bps=400e9, delay_s=5e-6)
PASSES_MOST = 1_000_000
"""Micro-batches of a world: some hours to simulate."""
WORKERS_MOST = 10_000


class SettingError(ValueError):
    """A knob is unknown or set to what it cannot be; the text names it and the choices."""


@dataclass(frozen=True)
class Setting:
    """Every knob of a what-if world.

    tokens, sequence    tokens of one lane's micro-batch, and of one sequence in it at most
    lanes               micro-batches of a step, all in flight
    bandwidth_bps       of each owner's own line, each direction
    rtt_s               round trip from an owner to the workers' site
    far_rtt_s           the same to the second site, where there are two
    site_bps            of each site's line, shared by all its workers
    jitter_s, loss      of each owner's own line
    placement           spread: every worker holds all layers; by-layer: each holds as many layers,
                        one after the other; one: only the first worker is used
    connection          stream: an owner's requests to a worker follow each other on the line;
                        parallel: they share it
    head                who multiplies by the language model's head; auto: both are simulated, and
                        the better one counts
    """

    model: str = "llama-3.2-1b"
    tokens: int = 256
    sequence: int = 256
    lanes: int = 4
    owners: int = 1
    workers: int = 1
    sites: int = 1
    placement: str = "spread"
    gpu: str = "h200"
    owner_device: str = "cpu-2core"
    bandwidth_bps: float = 1e9
    site_bps: float = 100e9
    rtt_s: float = 0.020
    far_rtt_s: float = 0.060
    jitter_s: float = 0.0
    loss: float = 0.0
    connection: str = "stream"
    head: str = "local"
    steps: int = 2

    def __post_init__(self) -> None:
        for knob, choices in CHOICES.items():
            if getattr(self, knob) not in choices:
                raise SettingError(
                    f"{knob}={getattr(self, knob)!r}: it is one of {', '.join(choices)}"
                )
        passes = self.owners * self.lanes * self.steps
        if passes > PASSES_MOST:
            raise SettingError(
                f"owners={self.owners}, lanes={self.lanes}, steps={self.steps} are {passes} "
                f"micro-batches to simulate; at most {PASSES_MOST}"
            )
        if self.workers > WORKERS_MOST:
            raise SettingError(f"workers={self.workers}: at most {WORKERS_MOST}")
        if self.sites not in (1, 2):
            raise SettingError(f"sites={self.sites}: there are 1 or 2")
        if self.sites > self.workers:
            raise SettingError(f"sites={self.sites} needs as many workers; workers={self.workers}")
        if self.tokens % self.sequence and self.tokens > self.sequence:
            raise SettingError(f"tokens={self.tokens} is no multiple of sequence={self.sequence}")

    @property
    def label(self) -> str:
        """The model and what carries it, for a person."""
        gpus = f"{self.workers} x {device_name(self.gpu)}" if self.workers > 1 else (
            device_name(self.gpu)
        )  # fmt: skip
        return f"{self.model} on {gpus}"


def device_name(choice: str) -> str:
    """A profile's name as a person writes it: H200, RTX 4090, cpu-2core."""
    name = Path(choice).stem if choice.endswith(".json") else choice
    return name if name.startswith("cpu") else name.upper().replace("RTX", "RTX ")


@dataclass(frozen=True)
class Key:
    """A knob: the field of `Setting` it sets, how its values are written, what it is."""

    field: str
    form: Form
    meaning: str


_COUNT = Form(quantities.count, whole=True)
_RATE = Form(quantities.bandwidth_bps, quantities.show_bandwidth)  # type: ignore[arg-type]
_TIME = Form(quantities.duration_s, quantities.show_duration)  # type: ignore[arg-type]
_PART = Form(quantities.fraction, quantities.show_fraction)  # type: ignore[arg-type]
_WORD = Form(str, numeric=False)
_DEVICE = Form(str, lambda choice: device_name(str(choice)), numeric=False)

KEYS: dict[str, Key] = {
    "model": Key("model", _WORD, f"what is trained, one of {', '.join(MODELS)}"),
    "tokens": Key("tokens", _COUNT, "tokens of one lane's micro-batch"),
    "sequence": Key("sequence", _COUNT, "tokens of a sequence"),
    "lanes": Key("lanes", _COUNT, "micro-batches of a step, all in flight"),
    "owners": Key("owners", _COUNT, "owners that fine-tune at the same time"),
    "workers": Key("workers", _COUNT, "GPUs"),
    "sites": Key("sites", _COUNT, "places the GPUs are in, 1 or 2"),
    "placement": Key("placement", _WORD, f"of layers on GPUs: {', '.join(CHOICES['placement'])}"),
    "gpu": Key("gpu", _DEVICE, "device profile of a worker, or a JSON file"),
    "owner-device": Key("owner_device", _DEVICE, "device profile of an owner, or a JSON file"),
    "bandwidth": Key("bandwidth_bps", _RATE, "of each owner's line"),
    "site-bandwidth": Key("site_bps", _RATE, "of each site's line"),
    "rtt": Key("rtt_s", _TIME, "round trip from an owner to the GPUs"),
    "far-rtt": Key("far_rtt_s", _TIME, "round trip to the second site"),
    "jitter": Key("jitter_s", _TIME, "mean extra delay of a frame"),
    "loss": Key("loss", _PART, "packets lost on an owner's line"),
    "connection": Key("connection", _WORD, "requests on the line: stream or parallel"),
    "head": Key("head", _WORD, "local, remote or auto"),
    "steps": Key("steps", _COUNT, "steps that count"),
}
BY_FIELD = {key.field: name for name, key in KEYS.items()}
assert set(BY_FIELD) == {f.name for f in fields(Setting)}


def key_called(name: str) -> Key:
    """The knob of that name. Raises SettingError."""
    try:
        return KEYS[name]
    except KeyError:
        raise SettingError(f"no knob {name!r}; there are {', '.join(KEYS)}") from None


def values_of(name: str, text: str) -> list[Value]:
    """The values a text gives a knob. Raises SettingError, naming knob, value and choices."""
    key = key_called(name)
    try:
        values = key.form.values(text)
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from None
    if name == "model":
        for value in values:
            if value not in MODELS:
                raise SettingError(f"model={value!r}: it is one of {', '.join(MODELS)}")
    return values


def changed(setting: Setting, changes: Mapping[str, Value]) -> Setting:
    """The setting with some knobs, by name, turned."""
    return replace(setting, **{key_called(name).field: value for name, value in changes.items()})  # type: ignore[arg-type]


def shown(name: str, value: Value) -> str:
    """A knob's value as a person writes it."""
    return KEYS[name].form.show(value)


# --- its world ----------------------------------------------------------------------------------


MENDABLE = (SettingError, ProfileError, WorkloadError, WorldError)
"""What a user can mend by turning knobs."""


@functools.cache
def profile_of(choice: str) -> DeviceProfile:
    """A built-in profile, or the one in a JSON file. Raises ProfileError."""
    if choice.endswith(".json"):
        return DeviceProfile.load(Path(choice))
    return DeviceProfile.builtin(choice)


def provenance(choice: str) -> str:
    """How a device's figures are known, for small print; `Origin` says it figure by figure."""
    measured = profile_of(choice).origin.kind == "measured"
    return "measured" if measured else "data sheet and assumptions"


@functools.cache
def workload_of(model: str, tokens: int, sequence: int, head: str) -> Workload:
    """The trace of one micro-batch, made once in a process (and in those forked from it)."""
    return trace_step(
        MODELS[model](),
        tokens,
        sequence=min(sequence, tokens),
        remote_head=head == "remote",
        name=model,
    )


def workload_for(setting: Setting) -> Workload:
    """The workload of a setting; where its head is `auto`, with a local one."""
    head = HEADS[0] if setting.head == "auto" else setting.head
    return workload_of(setting.model, setting.tokens, setting.sequence, head)


@functools.cache
def _clear_gb(model: str, tokens: int, sequence: int) -> float:
    return needed_gb(MODELS[model](), workload_of(model, tokens, sequence, HEADS[0]))


def clear_for(setting: Setting) -> ClearRun:
    """The same training in clear on the owner's own machine. Raises ProfileError."""
    sizes = (setting.model, setting.tokens, setting.sequence)
    owner = profile_of(setting.owner_device)
    return ClearRun(
        clear_speed(workload_of(*sizes, HEADS[0]), setting.lanes, owner),
        _clear_gb(*sizes), memory_gb(setting.owner_device),
    )  # fmt: skip


def world_of(setting: Setting, record: bool = True, seed: int = 0) -> WorldConfig:
    """The simulated world of a setting. The trace is recorded for the first owner only."""
    workload = workload_for(setting)
    return WorldConfig(
        workload,
        profile_of(setting.owner_device),
        profile_of(setting.gpu),
        lanes=setting.lanes,
        owners=setting.owners,
        workers=setting.workers,
        graph=_graph(setting),
        placement=_placement(setting, len(workload.matrices)),
        steps=setting.steps,
        # One owner alone takes the same step again and again; several must first fall out of step.
        warmup=1 if setting.owners > 1 else 0,
        seed=seed,
        streams=setting.connection == "stream",
        record=record,
        record_owners=1,
    )


def _graph(setting: Setting) -> nx.Graph:
    owners = [f"owner{i}" for i in range(setting.owners)]
    workers = [f"worker{i}" for i in range(setting.workers)]
    access = Link(setting.bandwidth_bps, setting.rtt_s / 2, setting.jitter_s, setting.loss)
    near = Link(setting.site_bps, 0.0)
    if setting.workers == 1:
        return star(owners, workers, access, near)
    far = Link(setting.site_bps, max(0.0, setting.far_rtt_s - setting.rtt_s) / 2)
    # The first half is at the first site, so that layers placed in order change site once.
    split = setting.workers if setting.sites == 1 else (setting.workers + 1) // 2
    return two_sites(
        owners, workers[:split], workers[split:],
        access=access, uplink_a=near, uplink_b=far, lan=SITE_LAN,
    )  # fmt: skip


def _placement(setting: Setting, matrices: int) -> Placement | None:
    workers = [f"worker{i}" for i in range(setting.workers)]
    if setting.placement == "spread":
        return None
    if setting.placement == "one":
        return Placement(((workers[0],),) * matrices)
    groups = matrices // 2  # matrices 2g and 2g + 1 are one group of layers
    return Placement(tuple((workers[m // 2 * setting.workers // groups],) for m in range(matrices)))


# --- what came out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """What is paid, in US dollars.

    gpu_hour    rent of one GPU, whether it is busy or not; None takes the table below
    gb_out      every 10^9 bytes that leave the GPUs' site (what arrives is free at most clouds)
    mbps_month  an owner's line, per Mb/s and month of 730 hours
    """

    gpu_hour: float | None = None
    gb_out: float = 0.05
    mbps_month: float = 0.10

    def of_gpu(self, gpu: str) -> float:
        """Rent of one such GPU, $/h. Raises SettingError when none is known."""
        if self.gpu_hour is not None:
            return self.gpu_hour
        try:
            return GPU_HOUR[gpu]
        except KeyError:
            raise SettingError(
                f"no price is known for gpu={gpu!r}: give --price-gpu-hour"
            ) from None


PRICE_MOST = 1e6

GPU_HOUR = {"h200": 3.5, "h100": 2.5, "a100": 1.8, "l4": 0.7, "rtx4090": 0.4}
"""Typical rents in $/h; assumptions, not quotes."""


def measure(setting: Setting, prices: Prices) -> dict[str, Any]:
    """Simulate a setting; one row of a what-if table. Raises WorldError, ProfileError.

    head_used  differs from the knob where that is `auto`
    """
    if setting.head == "auto":
        rows = [measure(replace(setting, head=head), prices) for head in HEADS]
        return rows[pays(*(row["step_p50_s"] for row in rows))] | {"head": "auto"}
    result = simulate(world_of(setting))
    knobs = {f.name: getattr(setting, f.name) for f in fields(Setting)}
    return knobs | {"head_used": setting.head} | figures(setting, result, prices)


def figures(setting: Setting, result: WorldResult, prices: Prices) -> dict[str, Any]:
    """What a simulated world tells. Bytes and tokens are an owner's; GB are 10^9 bytes.

    step_p50_s, step_p99_s  over all owners' counted steps
    *_busy                  part of a line's capacity in use; of a site's, the fuller direction's
    path_*                  parts of the first owner's steps on their critical path, sum 1
    clear_*                 of the same training in clear on the owner's machine, see `clear`
    """
    clear = clear_for(setting)
    durations = [step.duration_s for step in result.steps]
    tokens = result.tokens_per_step
    per_owner = tokens / fmean(durations)
    up = fmean(step.bytes_up for step in result.steps)
    down = fmean(step.bytes_down for step in result.steps)
    hours = 1e6 / (per_owner * setting.owners) / 3600
    line_hour = prices.mbps_month * setting.bandwidth_bps / 1e6 / 730
    cost = {
        "cost_gpu": hours * setting.workers * prices.of_gpu(setting.gpu),
        "cost_traffic": down / tokens * 1e6 / 1e9 * prices.gb_out,
        "cost_line": hours * setting.owners * line_hour,
    }
    return {
        "step_p50_s": float(np.percentile(durations, 50)),
        "step_p99_s": float(np.percentile(durations, 99)),
        "tokens_per_step": tokens,
        "tokens_per_s_owner": per_owner,
        "tokens_per_s_gpu": per_owner * setting.owners / setting.workers,
        "gpu_utilisation": result.utilisation,
        "line_up_busy": per_owner * up / tokens * 8 / setting.bandwidth_bps,
        "line_down_busy": per_owner * down / tokens * 8 / setting.bandwidth_bps,
        "site_busy": per_owner
        * setting.owners
        * max(up, down)
        / tokens
        * 8
        / (setting.site_bps * setting.sites),
        "gb_up_per_step": up / 1e9,
        "gb_down_per_step": down / 1e9,
        "gb_per_step": (up + down) / 1e9,
        "mb_per_token": (up + down) / tokens / 1e6,
        "gb_per_million_tokens": (up + down) / tokens / 1e3,
        "cost_per_million_tokens": sum(cost.values()),
        **cost,
        **{f"path_{part}": value for part, value in critical_parts(result).items()},
        "clear_tokens_per_s": clear.tokens_per_s,
        "clear_memory_gb": clear.memory_gb,
        "clear_fits": clear.fits,
        "private_over_clear": per_owner / clear.tokens_per_s,
        "resent": result.resent,
        "events": result.events,
    }


def critical_parts(result: WorldResult) -> dict[str, float]:
    """Parts of the recorded owner's counted steps by what they waited for; sum 1."""
    total = dict.fromkeys(PARTS, 0.0)
    steps = [step for step in result.steps if step.owner == "owner0"]
    for step in steps:
        for part, seconds in critical_path(result.trace.spans, step.start_s, step.end_s).items():
            total[part] += seconds
    length_s = sum(step.duration_s for step in steps)
    return {part: seconds / length_s for part, seconds in total.items()}
