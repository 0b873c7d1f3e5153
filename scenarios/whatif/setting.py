"""The simulated world of a setting of every knob, and what came out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import networkx as nx
import numpy as np
from transformers import PretrainedConfig

from backends.nn.base import base_config
from protocol.placement import Placement
from scenarios.head import pays
from scenarios.options import HEADS
from scenarios.whatif.clear import ClearRun, clear_speed, memory_gb, needed_gb
from scenarios.whatif.knobs import Prices, Setting, SettingError, profile_of
from sim.device import ProfileError
from sim.flows import Link
from sim.models import MODELS
from sim.tally import NoNumbersError
from sim.topologies import star, two_sites
from sim.trace import PARTS, critical_path
from sim.workload import Workload, WorkloadError, trace_step
from sim.world import WorldConfig, WorldError, WorldResult, simulate

SITE_LAN = Link(bandwidth_bps=400e9, delay_s=5e-6)

# --- its world ----------------------------------------------------------------------------------


MENDABLE = (SettingError, ProfileError, WorkloadError, WorldError, NoNumbersError)
"""What a user can mend by turning knobs."""


@functools.cache
def workload_of(model: str, tokens: int, sequence: int, head: str) -> Workload:
    """The trace of one micro-batch, made once in a process (and in those forked from it)."""
    return trace_step(
        config_of(model),
        tokens,
        sequence=min(sequence, tokens),
        remote_head=head == "remote",
        name=model,
    )


def config_of(model: str) -> PretrainedConfig:
    """Of a model that is known by name, or of a directory. Raises CheckpointError."""
    return MODELS[model]() if model in MODELS else base_config(Path(model))


def workload_for(setting: Setting) -> Workload:
    """The workload of a setting; where its head is `auto`, with a local one."""
    head = HEADS[0] if setting.head == "auto" else setting.head
    return workload_of(setting.model, setting.tokens, setting.sequence, head)


@functools.cache
def _clear_gb(model: str, tokens: int, sequence: int) -> float:
    return needed_gb(config_of(model), workload_of(model, tokens, sequence, HEADS[0]))


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
    here = setting.worker == "here"
    return WorldConfig(
        workload,
        profile_of(setting.owner_device),
        profile_of(setting.gpu),
        lanes=setting.lanes,
        owners=setting.owners,
        workers=setting.workers,
        graph=None if here else _graph(setting),
        in_process=here,
        placement=_placement(setting, len(workload.matrices)),
        steps=setting.steps,
        warmup=warmup_of(setting),
        seed=seed,
        streams=setting.connection == "stream",
        record=record,
        record_owners=1,
    )


def warmup_of(setting: Setting) -> int:
    """Steps that do not count. One owner alone takes the same step again and again; several must
    first fall out of step."""
    return 1 if setting.owners > 1 else 0


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


def measure(
    setting: Setting, prices: Prices, run: Callable[[WorldConfig], WorldResult] = simulate
) -> dict[str, Any]:
    """Simulate a setting; one row of a what-if table. Raises WorldError, ProfileError.

    run        what simulates
    head_used  differs from the knob where that is `auto`
    """
    if setting.head == "auto":
        rows = [measure(replace(setting, head=head), prices, run) for head in HEADS]
        return rows[pays(*(row["step_p50_s"] for row in rows))] | {"head": "auto"}
    result = run(world_of(setting))
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
    # What is handed over in one process is on no line.
    lined = float(setting.worker == "elsewhere")
    line_hour = prices.mbps_month * setting.bandwidth_bps / 1e6 / 730
    cost = {
        "cost_gpu": hours * prices.rent(setting),
        "cost_traffic": lined * down / tokens * 1e6 / 1e9 * prices.gb_out,
        "cost_line": lined * hours * setting.owners * line_hour,
    }
    return {
        "step_p50_s": float(np.percentile(durations, 50)),
        "step_p99_s": float(np.percentile(durations, 99)),
        "tokens_per_step": tokens,
        "tokens_per_s_owner": per_owner,
        "tokens_per_s_gpu": per_owner * setting.owners / setting.workers,
        "gpu_utilisation": result.utilisation,
        "line_up_busy": lined * per_owner * up / tokens * 8 / setting.bandwidth_bps,
        "line_down_busy": lined * per_owner * down / tokens * 8 / setting.bandwidth_bps,
        "site_busy": lined
        * per_owner
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
