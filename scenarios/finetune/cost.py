"""What a run will take, as far as it can be known before anything is prepared.

Bytes are the protocol's own. The time of a step is the simulator's, for a worker in this process;
over a line it is known once that has been probed (`PrivateSession.say_estimate`). Memory is
reckoned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.door import place_of
from backends.hardware import Hardware, activation_bytes
from backends.he.manifest import is_finished
from backends.he.params import preset
from backends.he.preparation import disk_bytes
from backends.nn.adapters import lora_parameters
from backends.nn.checkpoint import room_bytes
from backends.nn.skeleton import Skeleton
from backends.places import taken_bytes
from backends.units import human_bytes
from scenarios.estimate import Estimate, Shape, spoken, step_here_s, workload_of

if TYPE_CHECKING:
    from sim.workload import Workload

_PROGRAM_BYTES = 1 << 30
"""Of Python, torch, transformers, and compiled kernels."""
_COPIES = 5
"""Of an adapter's numbers: themselves, two moments, their gradients, a checkpoint being written."""


@dataclass(frozen=True)
class Asked:
    """What is asked of workers beside training steps.

    evaluations  held-out losses, each of `passes` micro-batches, forward alone
    tokens       that are generated for samples, one pass each, of as many prompts of the base and
                 of the tuned model
    """

    evaluations: int = 0
    passes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """Of a run of `steps` steps. Bytes are to and from workers; they are None for a model that the
    simulator cannot follow, times also where they are not yet known.

    extra_bytes   for what is asked beside the steps
    memory_bytes  of this machine, with the worker where that is in this process; without hints,
                  which are mapped, and use what is free
    prepare_bytes, run_bytes  of disk, beyond what is taken already
    """

    steps: int
    step_bytes: float | None
    extra_bytes: float | None
    step_s: float | None
    extra_s: float | None
    memory_bytes: float
    prepare_bytes: int
    run_bytes: int

    def figures(self) -> dict[str, Any]:
        """For --json. MB are 10^6 bytes."""
        found: dict[str, Any] = {}
        if self.step_bytes is not None and self.extra_bytes is not None:
            found["step_mb"] = self.step_bytes / 1e6
            found["mb"] = (self.steps * self.step_bytes + self.extra_bytes) / 1e6
        if self.step_s is not None and self.extra_s is not None:
            found["step_s"] = self.step_s
            found["seconds"] = self.steps * self.step_s + self.extra_s
        return found | {
            "steps": self.steps,
            "memory_mb": self.memory_bytes / 1e6,
            "prepare_disk_mb": self.prepare_bytes / 1e6,
            "run_disk_mb": self.run_bytes / 1e6,
        }

    def lines(self) -> list[str]:
        """For a person."""
        found = []
        if self.step_bytes is not None and self.extra_bytes is not None:
            every = self.steps * self.step_bytes + self.extra_bytes
            found.append(
                f"traffic: about {human_bytes(every)}, {human_bytes(self.step_bytes)} a step; "
                f"held-out losses and samples {human_bytes(self.extra_bytes)} of it"
            )
        if self.step_s is not None and self.extra_s is not None:
            every_s = self.steps * self.step_s + self.extra_s
            found.append(
                f"time: about {spoken(every_s)} with the worker on this machine, "
                f"{spoken(self.step_s)} a step (simulated)"
            )
        disk = f"{human_bytes(self.run_bytes)} for checkpoints"
        if self.prepare_bytes:
            disk = f"{human_bytes(self.prepare_bytes)} for preparing the model, once, and {disk}"
        return [
            *found, f"here: about {human_bytes(self.memory_bytes)} of memory; on disk {disk}",
        ]  # fmt: skip


def foreseen(
    shape: Shape, asked: Asked, steps: int, skeleton: Skeleton, hardware: Hardware, here: bool,
    places: tuple[Path, bytes, Path],
) -> Cost:  # fmt: skip
    """For so many steps that are left.

    here    the worker is in this process
    places  the cache of prepared models, the owner's tag, the checkpoints' directory

    Says so when the simulator cannot follow the model.
    """
    cache, tag, checkpoints = places
    parameters, groups = preset(shape.preset), skeleton.groups
    done = is_finished(place_of(skeleton.base, groups, parameters, cache, tag))
    adapter = _adapter(skeleton, shape.rank)
    cost = Cost(
        steps, None, None, None, None, _memory_bytes(shape, skeleton, hardware, adapter, here),
        0 if done else disk_bytes(groups, parameters),
        max(0, room_bytes(adapter) - taken_bytes(checkpoints)),
    )  # fmt: skip
    try:
        return _simulated(cost, shape, asked, hardware, here)
    except (ValueError, RuntimeError) as error:
        print(f"no estimate of traffic and time: {error}")
        return cost


def _simulated(cost: Cost, shape: Shape, asked: Asked, hardware: Hardware, here: bool) -> Cost:
    workload = workload_of(shape, shape.remote_head, hardware)
    passes, forward = shape.passes or shape.lanes, _forward_bytes(workload)
    evaluated = asked.evaluations * asked.passes
    found = replace(
        cost,
        step_bytes=passes * (workload.up_bytes + workload.down_bytes),
        extra_bytes=forward * (evaluated * shape.tokens + asked.tokens),
    )
    if not here:
        return found
    step_s = alone_s = step_here_s(shape, workload, hardware)
    if shape.lanes > 1:
        alone_s = step_here_s(replace(shape, lanes=1), workload, hardware)
    return replace(
        found, step_s=step_s, extra_s=evaluated * _forward_share(workload) * alone_s / passes
    )


def over_line(estimate: Estimate, shape: Shape, asked: Asked, hardware: Hardware) -> float:
    """Seconds over a probed line of what is asked beside the steps.

    Raises ValueError or RuntimeError for a model that the simulator cannot follow.
    """
    workload = workload_of(shape, shape.remote_head, hardware)
    round_trips_s = len(workload.linears) / 2 * estimate.probe.rtt_s
    step_bytes = (estimate.bytes_up + estimate.bytes_down) / estimate.steps
    byte_s = estimate.step_s / step_bytes
    # One pass has no other to hide its round trips behind.
    pass_s = max(byte_s * shape.tokens * _forward_bytes(workload), round_trips_s)
    return asked.evaluations * asked.passes * pass_s + asked.tokens * round_trips_s


def _forward_bytes(workload: Workload) -> float:
    """To and from workers, for a token that is only passed forward."""
    from sim.workload import Linear

    matrices = {i.matrix for i in workload.lane if isinstance(i, Linear) and not i.matrix % 2}
    shapes = [workload.matrices[matrix] for matrix in matrices]
    return sum(shape.up_bytes(1) + shape.down_bytes(1) for shape in shapes)


def _forward_share(workload: Workload) -> float:
    every = (workload.up_bytes + workload.down_bytes) / workload.tokens
    return _forward_bytes(workload) / every


def _adapter(skeleton: Skeleton, rank: int) -> int:
    """Numbers in an adapter of every remote linear."""
    shapes = [(shape[1], shape[0]) for shape in skeleton.shapes.values()]
    return lora_parameters(shapes, rank)


def _memory_bytes(
    shape: Shape, skeleton: Skeleton, hardware: Hardware, adapter: int, here: bool
) -> float:
    parameters, groups = preset(shape.preset), skeleton.groups
    tensors = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)
    widest = max(max(group.in_features, group.total_out) for group in groups)
    matrix = 4 * parameters.dimension * widest
    # Packed for products in both directions.
    weights = sum(2 * g.in_features * g.total_out for g in groups) if here else 0
    config = skeleton.base.config.get_text_config(decoder=True)
    running = activation_bytes(config, groups, shape.lanes * shape.tokens, hardware.dtype)
    adapters = 4 * adapter * (_COPIES + shape.lanes)
    return float(_PROGRAM_BYTES + held + matrix + weights + running + adapters)
