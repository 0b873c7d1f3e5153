"""`--lm-head auto`: who multiplies by the language-model head, by the simulator's estimate.

It is decided before anything is prepared, since a prepared model has the head in it or not. So a
model that is prepared already, one way and not the other, decides: a run goes on with it. Else a
step is simulated both ways, from the model's config alone, on a machine like this one: with its
worker in the same process, or over the line that is assumed below and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.door import place_of
from backends.errors import UserError
from backends.hardware import Hardware
from backends.he.manifest import is_finished
from backends.he.params import preset
from backends.nn.sources import Base
from scenarios.estimate import Shape, this_machine, workload_of
from scenarios.options import HEADS
from scenarios.whatif.knobs import ASSUMED_BPS, ASSUMED_GPU, ASSUMED_RTT_S

if TYPE_CHECKING:
    from sim.world import WorldConfig

GAIN = 0.05
"""Of a step, at least: for less the head stays, as results of a remote one carry some noise."""


@dataclass(frozen=True)
class HeadChoice:
    """What was chosen, and from what.

    step_s      seconds of a step, with the head local and remote
    bottleneck  of a step as chosen: "owner", "worker" or "line"
    where       the machines and the line that were simulated
    """

    head: str
    step_s: tuple[float, float]
    bottleneck: str
    where: str

    def said(self) -> str:
        """One line for a person."""
        local_s, remote_s = self.step_s
        why = {
            "owner": "the owner's machine", "worker": "the worker", "line": "the line",
        }[self.bottleneck]  # fmt: skip
        if self.head == "remote":
            times = f"{remote_s:.2g} s a step against {local_s:.2g} s with the head here"
        else:
            times = f"{local_s:.2g} s a step against {remote_s:.2g} s with the head at the worker"
        return f"head {self.head}: {times}; {why} is the bottleneck ({self.where})"

    def figures(self) -> dict[str, Any]:
        """For --json."""
        return {
            "head": self.head,
            "local_step_s": self.step_s[0],
            "remote_step_s": self.step_s[1],
            "bottleneck": self.bottleneck,
            "where": self.where,
        }


def compared(world: Callable[[str], WorldConfig], where: str) -> HeadChoice:
    """The better of the worlds of a local and of a remote head.

    Raises what `simulate` and `world` raise.
    """
    from sim.trace import critical_path
    from sim.world import simulate

    times, limits = [], []
    for head in HEADS:
        result = simulate(world(head))
        step = [step for step in result.steps if step.owner == "owner0"][-1]
        spans = [s for s in result.trace.spans if s.lane.startswith("owner0/")]
        parts = critical_path(spans, step.start_s, step.end_s)
        loads = {
            "owner": parts["owner"] + parts["head"], "worker": parts["worker"],
            "line": parts["up"] + parts["down"] + parts["latency"] + parts["idle"],
        }  # fmt: skip
        times.append(step.duration_s)
        limits.append(max(loads, key=loads.__getitem__))
    local_s, remote_s = times
    chosen = pays(local_s, remote_s)
    return HeadChoice(HEADS[chosen], (local_s, remote_s), limits[chosen], where)


def pays(local_s: float, remote_s: float) -> bool:
    """Whether a remote head is worth it, by the seconds of a step with either."""
    return remote_s < (1 - GAIN) * local_s


def estimated(shape: Shape, hardware: Hardware, here: bool) -> HeadChoice:
    """What the simulator says for an owner like this machine.

    here  the worker is in this process; else over the assumed line, on the assumed GPU

    Raises ValueError or RuntimeError for a model it cannot follow.
    """
    from sim.device import DeviceProfile
    from sim.flows import Link
    from sim.world import WorldConfig

    owner = this_machine(hardware)
    worker = owner if here else DeviceProfile.builtin(ASSUMED_GPU)
    line = Link(ASSUMED_BPS, ASSUMED_RTT_S / 2)

    def world(head: str) -> WorldConfig:
        return WorldConfig(
            workload_of(shape, head == "remote", hardware), owner, worker, lanes=shape.lanes,
            access=line, in_process=here, steps=1,
        )  # fmt: skip

    steps = f"{shape.lanes} lane{'s' if shape.lanes > 1 else ''} of {shape.tokens} tokens"
    where = f"{steps}, the worker in this process" if here else (
        f"assumed: {steps}, {ASSUMED_BPS / 1e9:g} Gb/s and {1e3 * ASSUMED_RTT_S:g} ms to an "
        f"{ASSUMED_GPU.upper()}"
    )  # fmt: skip
    return compared(world, where)


def prepared_one(
    shape: Shape, base: Base, hardware: Hardware, cache: Path, owner_tag: bytes
) -> str | None:
    """The head of the only prepared model of this base; None where there is none, or both.

    Raises ValueError or RuntimeError for a model that cannot be followed, PreparationError when
    the cache cannot be looked into.
    """
    there = [
        head
        for head in HEADS
        if is_finished(
            place_of(
                base, workload_of(shape, head == "remote", hardware).groups, preset(shape.preset),
                cache, owner_tag,
            )
        )
    ]  # fmt: skip
    return there[0] if len(there) == 1 else None


def decided(
    shape: Shape, base: Base, hardware: Hardware, here: bool, cache: Path, owner_tag: bytes
) -> str:
    """What `auto` is: "local" or "remote"; says why in a line."""
    try:
        found = prepared_one(shape, base, hardware, cache, owner_tag)
        if found is not None:
            print(f"head {found}: so the model is prepared already")
            return found
        choice = estimated(shape, hardware, here)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        print(f"head local: no estimate of a step ({error})")
        return "local"
    print(choice.said())
    return choice.head
