"""How long a world will take to simulate, and how far it is."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from scenarios.options import HEADS
from scenarios.whatif.knobs import Setting
from scenarios.whatif.setting import warmup_of, workload_for, world_of
from sim.world import WorldConfig, WorldError, WorldResult, simulate

SAID_FROM_S = 5.0
"""A simulation that takes less is not announced."""
TRIALS, TRIED_S = 8, 30.0
"""Worlds that are tried to tell what would help, and the most seconds that this may take."""
_SHORT = 64 * 128
"""Products that are simulated before anybody could wonder, 64 micro-batches of a 1B: not worth a
trial."""
_BAR_AFTER_S, _TRIAL_S = 2.0, 1.0


def watched(config: WorldConfig) -> WorldResult:
    """`simulate`, with a bar on standard error once it has taken some seconds."""
    if multiprocessing.parent_process() is not None:  # one of several at once
        return simulate(config)
    with tqdm(
        total=100, unit="%", desc="simulate", delay=_BAR_AFTER_S, leave=False, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        return simulate(config, lambda share: bar.update(int(100 * share) - bar.n))


def passes(setting: Setting) -> int:
    """Micro-batches that a setting's world takes."""
    return setting.owners * setting.lanes * (setting.steps + warmup_of(setting))


def _products(setting: Setting) -> int:
    """Of its world, about."""
    return passes(setting) * len(workload_for(_with_a_head(setting)).matrices)


def _with_a_head(setting: Setting) -> Setting:
    return replace(setting, head=HEADS[0]) if setting.head == "auto" else setting


class _EnoughError(Exception):
    """A trial has lasted as long as it should."""


def expected_s(settings: Sequence[Setting], processes: int = 1) -> float:
    """Seconds that all of them will take, about: the largest of each model is begun, and left."""
    largest: dict[tuple[str, int, int, str], Setting] = {}
    for setting in settings:
        held = largest.get(_kind(setting), setting)
        largest[_kind(setting)] = max(held, setting, key=passes)
    pass_s = {k: _pass_s(one) for k, one in largest.items() if _products(one) > _SHORT}
    total_s = sum(passes(setting) * pass_s.get(_kind(setting), 0.0) for setting in settings)
    return total_s / processes


def _kind(setting: Setting) -> tuple[str, int, int, str]:
    return setting.model, setting.tokens, setting.sequence, setting.head


def _pass_s(setting: Setting) -> float:
    """Of one micro-batch, with as many others as the setting has."""
    heads = HEADS if setting.head == "auto" else (setting.head,)
    config = world_of(_with_a_head(setting), record=False)
    start, part = time.perf_counter(), 0.0

    def told(share: float) -> None:
        nonlocal part
        part = share
        if time.perf_counter() - start > _TRIAL_S:
            raise _EnoughError

    try:
        simulate(config, told)
        part = 1.0
    except _EnoughError:
        pass
    except WorldError:  # it will end early
        return 0.0
    return len(heads) * (time.perf_counter() - start) / (part * passes(setting))
