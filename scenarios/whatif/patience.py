"""How long a world will take to simulate, and how far it is."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from scenarios.whatif.knobs import Setting
from scenarios.whatif.setting import warmup_of, world_of
from sim.world import WorldConfig, WorldResult, simulate

SAID_FROM_S = 5.0
"""A simulation that takes less is not announced."""
TRIALS, TRIED_S = 8, 30.0
"""Worlds that are tried to tell what would help, and the most seconds that this may take."""
_SHORT = 64
"""Micro-batches that are simulated before anybody could wonder: not worth a trial."""
_BAR_AFTER_S = 2.0


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


def expected_s(settings: Sequence[Setting], processes: int = 1) -> float:
    """Seconds that all of them will take, about: by one micro-batch of each model, tried."""
    tried: dict[tuple[str, int, int, str], float] = {}
    total_s = 0.0
    for setting in settings:
        count = passes(setting)
        key = (setting.model, setting.tokens, setting.sequence, setting.head)
        if key not in tried and count > _SHORT:
            tried[key] = _trial_s(setting)
        total_s += count * tried.get(key, 0.0)
    return total_s / processes


def _trial_s(setting: Setting) -> float:
    """Of one micro-batch, in a step of a few."""
    head = "local" if setting.head == "auto" else setting.head
    few = replace(setting, lanes=4, owners=1, workers=1, sites=1, steps=1, head=head)
    config = world_of(few, record=False)
    start = time.perf_counter()
    simulate(config)
    return (time.perf_counter() - start) / few.lanes * (2 if setting.head == "auto" else 1)
