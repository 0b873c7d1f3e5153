"""What would change a simulated speed: each remedy is tried in a world of its own, alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from backends.options import LANES
from scenarios.whatif.knobs import Setting, SettingError
from scenarios.whatif.setting import world_of
from sim.device import DeviceProfile
from sim.world import WorldConfig, WorldError, WorldResult, simulate

TELLING = 1.02
"""From this factor on a remedy is told."""
TOLD = 4


@dataclass(frozen=True)
class Remedy:
    """What is changed, in words, and tokens/s with it over those without."""

    words: str
    factor: float

    def __str__(self) -> str:
        return f"{self.words} x{self.factor:.2f}"


def remedies(setting: Setting, seed: int = 0) -> list[Remedy]:
    """All that was tried, what helps most first. The head of the setting is local or remote.

    Takes about eight times as long as to simulate the setting itself.
    """
    before = _speed(simulate(world_of(setting, record=False, seed=seed)))
    found = []
    for words, world in _tried(setting, seed):
        try:
            found.append(Remedy(words, _speed(simulate(world())) / before))
        except (SettingError, WorldError):  # beyond what can be simulated, or trained
            continue
    return sorted(found, key=lambda remedy: -remedy.factor)


def lines(found: list[Remedy]) -> list[str]:
    """For a person: what helps, or that nothing does."""
    telling = [remedy for remedy in found if remedy.factor >= TELLING][:TOLD]
    if not telling:
        return ["nothing that was tried alone would make it 2 % faster"]
    return ["what would make it faster, each alone (tokens/s):"] + [
        f"  {remedy.words:<40} x{remedy.factor:.2f}" for remedy in telling
    ]


def _tried(setting: Setting, seed: int) -> Iterator[tuple[str, Callable[[], WorldConfig]]]:
    def turned(**changes: Any) -> Callable[[], WorldConfig]:
        return lambda: world_of(replace(setting, **changes), record=False, seed=seed)

    def with_faster(*sides: str) -> Callable[[], WorldConfig]:
        def world() -> WorldConfig:
            config = world_of(setting, record=False, seed=seed)
            changes: Any = {side: faster(getattr(config, side)) for side in sides}
            return replace(config, **changes)

        return world

    elsewhere = setting.worker == "elsewhere"
    if elsewhere and setting.rtt_s > 0:
        near = turned(rtt_s=setting.rtt_s / 2, far_rtt_s=setting.far_rtt_s / 2)
        yield "half the round trip (--rtt)", near
    if elsewhere:
        yield "twice the line (--bandwidth)", turned(bandwidth_bps=2 * setting.bandwidth_bps)
    if 2 * setting.lanes <= LANES.most:
        yield "twice the lanes (--lanes)", turned(lanes=2 * setting.lanes)
    if setting.head == "local":
        yield "the head at the worker (--lm-head remote)", turned(head="remote")
    else:
        yield "the head here (--lm-head local)", turned(head="local")
    if elsewhere:
        yield "an owner's machine twice as fast", with_faster("owner")
        yield "GPUs twice as fast", with_faster("worker")
    else:
        yield "a machine twice as fast", with_faster("owner", "worker")


def faster(profile: DeviceProfile, times: float = 2.0) -> DeviceProfile:
    """The same device, at all it does."""
    return replace(
        profile,
        rates={kind: times * rate for kind, rate in profile.rates.items()},
        bytes_per_s=times * profile.bytes_per_s,
        overhead_s={task: seconds / times for task, seconds in profile.overhead_s.items()},
    )


def _speed(result: WorldResult) -> float:
    return result.tokens_per_step / fmean(step.duration_s for step in result.steps)
