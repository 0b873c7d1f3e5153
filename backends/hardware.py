"""Where a real run computes: this machine's CPU in fp32, or one NVIDIA GPU in bf16.

The owner's model, the owner's cipher and the worker are all in the same place. On a GPU,
ciphertexts stay in its memory on their way from one to the other (`LocalFrame`), or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from backends.he.cuda.device import Gpu, find_gpu, require_memory
from backends.he.cuda.tiling import TOKEN_CLASSES
from backends.he.manifest import GroupSpec
from backends.he.store import PreparedModel

MEMORY_ADVICE = "lower --tokens or --lanes, or stop what else runs on this GPU (see nvidia-smi)"
_SCRATCH_BYTES = 1 << 29
"""Of libraries, of streamed slabs, and of making the check's projections."""


@dataclass(frozen=True)
class Hardware:
    """A place to compute.

    gpu          None on the CPU
    host_frames  on a GPU: ciphertexts go through host memory, as to a worker elsewhere
    """

    device: torch.device
    dtype: torch.dtype
    gpu: Gpu | None = None
    host_frames: bool = False

    @property
    def label(self) -> str:
        """For a report: "fp32 on this CPU", "bf16 on NVIDIA H200"."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{short} on {self.gpu.name if self.gpu else 'this CPU'}"

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Inside, the GPU's clock runs, if there is one."""
        if self.gpu is None:
            yield
            return
        self.gpu.clock.running = True
        try:
            yield
        finally:
            self.gpu.clock.running = False
            self.gpu.clock.take()

    def peak_device_mb(self) -> float:
        """Most device memory torch has held at once, in MB (10^6 bytes); 0 on the CPU."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / 1e6


CPU = Hardware(torch.device("cpu"), torch.float32)


def chosen(real_gpu: bool, host_frames: bool = False) -> Hardware:
    """The CPU, or the first GPU. Raises GpuError, saying what to do, when there is none to use."""
    if not real_gpu:
        return CPU
    gpu = find_gpu()
    return Hardware(gpu.device, torch.bfloat16, gpu, host_frames)


def activation_bytes(
    config: PretrainedConfig, groups: list[GroupSpec], tokens: int, dtype: torch.dtype
) -> int:
    """Roughly what `tokens` tokens in flight hold of device memory at their peak.

    For every remote group its input and output, and fp32 copies of the inputs for LoRA; logits
    in the model's type, in fp32, their gradient and softmax; the widest request and answer.
    """
    widths = [(group.in_features, group.total_out) for group in groups]
    kept = sum(dtype.itemsize * (inputs + 2 * outputs) + 4 * inputs for inputs, outputs in widths)
    logits = config.vocab_size * (dtype.itemsize + 3 * 4)
    request = max(8 * inputs + 8 * outputs for inputs, outputs in widths)
    return tokens * (kept + logits + request)


def check_memory(
    gpu: Gpu,
    config: PretrainedConfig,
    prepared: PreparedModel,
    tokens: int,
    model: nn.Module,
    clear_beside: bool = False,
) -> int:
    """Bytes of device memory left for hints once everything else has its place.

    tokens        in flight at once, all lanes together
    model         the owner's, not yet on the device
    clear_beside  the same training in clear will share the device

    Raises GpuError when even streamed hints would not help.
    """
    assert prepared.parameters is not None
    groups = prepared.groups
    parameters = list(model.parameters())
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    held = sum(p.numel() * p.element_size() for p in parameters)
    weights = sum(group.in_features * group.total_out for group in groups)
    widest = max(max(group.in_features, group.total_out) for group in groups)
    activations = activation_bytes(config, groups, tokens, dtype)
    needs = {
        "the worker's int8 weights in both directions": 2 * weights,
        "the owner's embeddings, head and adapters": held,
        "the public matrix A": 4 * prepared.parameters.dimension * widest,
        f"activations of {tokens} tokens": activations,
        # Choosing a tiling takes a request and two answers of the largest class.
        "scratch": _SCRATCH_BYTES + TOKEN_CLASSES[-1] * widest * 8,
    }
    if clear_beside:
        needs["the clear run beside it"] = weights * dtype.itemsize + held + activations
    require_memory(gpu, needs, MEMORY_ADVICE)
    return gpu.free_bytes() - sum(needs.values())
