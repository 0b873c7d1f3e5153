"""Device time, measured side by side, and the shapes that are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from backends.he.cuda.device import Gpu
from sim.models import model_config

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


@dataclass(frozen=True)
class Matrix:
    """One direction of one linear group, and how often a step multiplies by it."""

    name: str
    inputs: int
    outputs: int
    count: int


def matrices_of(config: PretrainedConfig) -> tuple[Matrix, ...]:
    """What a Llama's worker multiplies by, forward and backward, the head being local."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    groups = {
        "q+k+v": (hidden, queries + 2 * keys),
        "o": (queries, hidden),
        "gate+up": (hidden, 2 * config.intermediate_size),
        "down": (config.intermediate_size, hidden),
    }
    both = []
    for name, (inputs, outputs) in groups.items():
        both.append(Matrix(f"{name} forward", inputs, outputs, layers))
        both.append(Matrix(f"{name} backward", outputs, inputs, layers))
    return tuple(both)


@dataclass(frozen=True)
class Scale:
    """How large everything is. Tests use a tiny one, so that they run every line.

    config   of the model
    layers   (in, out) of the single layers set against clear bf16
    tokens   of one request
    ragged   token counts whose products are compared bit for bit
    square   side of the products that measure the device's ceilings
    """

    config: PretrainedConfig
    layers: tuple[tuple[int, int], ...] = ((2048, 8192), (8192, 2048), (2048, 2048))
    layer_tokens: int = 4096
    tokens: int = 2048
    ragged: tuple[int, ...] = (1, 7, 64, 255, 256, 257, 1000, 2048)
    square: int = 8192
    copy_bytes: int = 1 << 31
    rounds: int = 15
    repeats: int = 10

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of the model."""
        return matrices_of(self.config)


def full() -> Scale:
    """Llama-3.2-1B."""
    return Scale(model_config("llama-3.2-1b"))
