"""The same fine-tuning in clear on the owner's own machine: what private training is held against.

Time is that of the owner's layers and, in place of the encrypted products, of plain ones in the
machine's own float type, one micro-batch after the other. The model must fit the machine's memory:
that is the part of the comparison which rests on assumptions, and they favour the clear run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from backends.nn.sources import outline_of
from sim.device import DeviceProfile, Work
from sim.workload import Local, Workload

MEMORY_GB = {
    "cpu-2core": 16.0, "l4": 24.0, "rtx4090": 24.0, "a100": 80.0, "h100": 80.0, "h200": 141.0,
}  # fmt: skip
"""10^9 bytes. Of the GPUs by their data sheets; of a processor an assumption: a common laptop."""
MEMORY_ELSE_GB = 16.0
WEIGHT_BYTES = 2
VALUE_BYTES = 4
ASSUMED = (
    f"in clear: {WEIGHT_BYTES} bytes a weight, {VALUE_BYTES} a value of one micro-batch's "
    "activations (inputs and outputs of all linears, logits twice)"
)


@dataclass(frozen=True)
class ClearRun:
    """One owner's training in clear.

    memory_gb  it needs, in 10^9 bytes
    there_gb   that the machine is taken to have
    """

    tokens_per_s: float
    memory_gb: float
    there_gb: float

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory."""
        return self.memory_gb <= self.there_gb


def memory_gb(device: str) -> float:
    """Memory that a machine of a device profile (a name, or a file) is taken to have."""
    return MEMORY_GB.get(device, MEMORY_ELSE_GB)


def needed_gb(config: PretrainedConfig, workload: Workload) -> float:
    """Memory of a model's weights, shared ones once, and of a micro-batch's activations."""
    with torch.device("meta"):  # no room is reserved on its way there, that a fork would copy
        outline = outline_of(config, torch.float32)
    outline.tie_weights()
    weights = sum(parameter.numel() for parameter in outline.parameters())
    values = sum(m.in_features + m.out_features for m in workload.matrices[::2])
    values += 2 * config.get_text_config().vocab_size
    return (weights * WEIGHT_BYTES + workload.tokens * values * VALUE_BYTES) / 1e9


def clear_speed(workload: Workload, lanes: int, owner: DeviceProfile) -> float:
    """Tokens/s of steps of `lanes` micro-batches of a workload whose head is local.

    Raises ProfileError when the profile lacks a rate.
    """
    layers = [part for item in workload.lane if isinstance(item, Local) for part in item.parts]
    pass_s = sum(owner.seconds(work, "local") for work in [*layers, *products(workload)])
    updates = (workload.update, (lanes - 1) * workload.accumulate)
    step_s = lanes * pass_s + sum(owner.seconds(work, "update") for work in updates)
    return workload.tokens * lanes / step_s


def products(workload: Workload) -> list[Work]:
    """The linears of one pass, forward and backward, as plain products."""
    found = []
    for shape in workload.linears:
        inputs, outputs = shape.in_features, shape.out_features
        moved = WEIGHT_BYTES * inputs * outputs + VALUE_BYTES * workload.tokens * (inputs + outputs)
        found.append(Work({"float": float(workload.tokens * inputs * outputs)}, moved))
    return found
