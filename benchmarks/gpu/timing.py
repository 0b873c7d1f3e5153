"""Device time, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from backends.he.cuda.device import Gpu

Action = Callable[[], object]

_CYCLES_PER_MS = 2_000_000  # of a multiprocessor at its fastest, about
_LONGEST_HOLD_MS = 200.0


def device_ms(gpu: Gpu, action: Action, repeats: int, held: bool = False) -> float:
    """Milliseconds of one `action` on the device, from `repeats` queued one after the other.

    Events on the stream bracket them, so what the host does while the device is busy is free.

    held  keep the device waiting until all are queued, so that all the host does is free: for
          actions that do not wait for the device themselves
    """
    gpu.synchronize()
    if gpu.device.type != "cuda":
        start_s = time.perf_counter()
        for _ in range(repeats):
            action()
        return (time.perf_counter() - start_s) * 1e3 / repeats
    hold_ms = 1.0 + 0.2 * repeats
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if held:
            torch.cuda._sleep(int(hold_ms * _CYCLES_PER_MS))
        start.record()
        for _ in range(repeats):
            action()
        end.record()
        late = held and start.query()  # the device began before all were queued
        end.synchronize()
        if not late or hold_ms > _LONGEST_HOLD_MS:
            return start.elapsed_time(end) / repeats
        hold_ms *= 4


def in_turns(
    gpu: Gpu, actions: Mapping[str, Action], rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each action, round by round: a device that changes speed changes all.

    Of the device alone (`held`): a large product is as quick as its launch.
    """
    for action in actions.values():  # compiles, chooses tiles, fills caches
        action()
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(device_ms(gpu, action, repeats, held=True))
    return times
