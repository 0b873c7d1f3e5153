"""The trace of one micro-batch's pass: the owner's own layers and, between them, remote linears.

The owner's real program (skeleton, adapters, loss, autograd) runs on the meta device inside a
`Tally`: every operation happens, no number does. What is traced is therefore what torch really
does, down to the first layer's products that autograd leaves out in backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from backends.he.manifest import GroupSpec
from backends.nn.adapters import add_lora, trainable
from backends.nn.head import LocalHead
from backends.nn.losses import token_losses
from backends.nn.marks import plain_rows
from backends.nn.remote import Remote
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import Base, Loaded
from sim.device import Work
from sim.tally import CpuAttention, Tally


@dataclass(frozen=True)
class Segment:
    """The owner's work up to a remote linear (a catalogue index; None at the end of the pass)."""

    parts: tuple[Work, ...]
    matrix: int | None


@dataclass(frozen=True)
class LaneTrace:
    """One pass of one micro-batch.

    groups      in the catalogue's order: group g has matrices 2g (forward) and 2g + 1 (backward)
    parameters  shapes of what is trained, by name
    """

    groups: tuple[GroupSpec, ...]
    segments: tuple[Segment, ...]
    parameters: Mapping[str, tuple[int, ...]]


class OutlineBase(Base):
    """A model whose tensors have a shape and no numbers."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def load(
        self, dtype: torch.dtype, remote: Collection[str], tables: Path | None = None
    ) -> Loaded:
        model = self.outline(dtype)
        return Loaded(model, lambda module: model.get_parameter(f"{module}.weight"))

    def identity(self) -> str:
        return "meta"

    def describe(self) -> str:
        return "no weights"


class _Recorder(Remote):
    """Remote linears that note when they are asked, and answer with tensors without numbers."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.groups: list[GroupSpec] = []
        self._tally = tally

    def compute(self, matrix: int, rows: torch.Tensor) -> torch.Tensor:
        """An empty product; everything since the last one becomes a segment."""
        self.segments.append(Segment(self._tally.take(), matrix))
        group = self.groups[matrix // 2]
        outputs = group.in_features if matrix % 2 else group.total_out
        return rows.new_empty(rows.shape[0], outputs)


def trace_lane(
    config: PretrainedConfig,
    sequences: int,
    sequence: int,
    lora_rank: int,
    remote_head: bool,
    dtype: torch.dtype,
) -> LaneTrace:
    """Trace a micro-batch of `sequences` sequences of `sequence` tokens through all layers."""
    tally = Tally()
    remote = _Recorder(tally)
    # `add_lora` seeds torch's generator: whoever traces does not notice.
    with torch.random.fork_rng(devices=[]), tally, _on_meta():
        tally.counting = False
        skeleton = build_skeleton(OutlineBase(config), remote_head, dtype, remote, least_remote=0.0)
        remote.groups = skeleton.groups
        remote.head = _outline_head(skeleton)
        model = add_lora(skeleton.model, lora_rank, 2 * lora_rank, seed=0)
        model.train()
        rows = plain_rows(torch.empty(sequences, sequence, dtype=torch.long))
        tally.counting = True
        parameters = trainable(model)
        loss = token_losses(model, rows) / (sequences * (sequence - 1))
        torch.autograd.grad(loss, list(parameters.values()))
        remote.segments.append(Segment(tally.take(), None))
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return LaneTrace(tuple(skeleton.groups), tuple(remote.segments), shapes)


def _outline_head(skeleton: Skeleton) -> LocalHead | None:
    """What makes a remote head's backward product, without numbers."""
    if skeleton.head is None:
        return None
    place = next(i for i, group in enumerate(skeleton.groups) if skeleton.head in group.members)
    outputs, inputs = skeleton.groups[place].total_out, skeleton.groups[place].in_features
    codes = torch.empty(outputs, inputs, dtype=torch.int8)
    return LocalHead(place, codes, torch.empty(outputs), torch.empty(inputs))


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), CpuAttention():
        yield


def trace_update(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> tuple[Work, Work]:
    """(adding one more micro-batch's gradients to the sum, clipping and one step of AdamW)."""
    counts = Counter(shapes)
    gradients = [torch.empty(shape, dtype=dtype, device="meta") for shape in counts.elements()]
    tally = Tally()
    with tally:
        _clip(gradients)
        update = _total(tally.take())
        accumulate = Work(launches=0.0)
        for shape, count in counts.items():  # AdamW takes the parameters one by one
            parameter = _parameter(shape, dtype)
            assert parameter.grad is not None
            parameter.grad.add_(parameter.grad)
            accumulate += count * _total(tally.take())
            optimiser = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
            optimiser.step()  # the first step makes the moments
            tally.take()
            optimiser.step()
            update += count * _total(tally.take())
    return accumulate, update


def _clip(gradients: list[torch.Tensor]) -> None:
    """What `clip_grad_norm_` does on the CPU; on the meta device it would take one by one."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)))
    torch._foreach_mul_(gradients, torch.clamp(1.0 / (total + 1e-6), max=1.0))


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter with a gradient."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    return parameter


def _total(parts: tuple[Work, ...]) -> Work:
    """One work: none of its operations multiplies matrices, so none hides another."""
    return sum(parts, Work(launches=0.0))
