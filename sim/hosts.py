"""The hosts of a simulated world: each runs a protocol machine and gives its tasks modelled time.

An owner has a processor, shared by its own layers (as many places as lanes) and its cipher (as
many again: the real driver computes on as many threads as lanes). A worker has a device that
takes one product after the other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backends.he.params import preset
from protocol.admission import Quota
from protocol.events import (
    Abort,
    Decrypt,
    Deliver,
    Effect,
    Encrypt,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    RunTask,
    Start,
    TaskDone,
)
from protocol.fair import FairQueue, charged
from protocol.messages import SESSION_BYTES
from protocol.owner import Owner
from protocol.owner_tables import State
from protocol.worker import Worker, WorkerConfig
from sim.device import Device, DeviceProfile, Processor, Work
from sim.driver import Actor, TaskEnd
from sim.frames import call_of, payload_at
from sim.trace import Span
from sim.workload import Linear, Workload, decrypt_work, encrypt_work, multiply_work

if TYPE_CHECKING:
    from sim.world import Crossing, World

PHANTOM_BYTES_PER_TOKEN = 8
_NUMBER = struct.Struct("<Q")


class WorldError(RuntimeError):
    """The simulated training cannot go on; the text says why."""


def phantom(size_bytes: int, tokens: int) -> bytes:
    """A payload that stands for one of `size_bytes`."""
    return _NUMBER.pack(size_bytes) * tokens


def wire_bytes(frame: bytes) -> int:
    """Bytes the real frame would have."""
    at = payload_at(frame)
    return len(frame) if at is None else at + int(_NUMBER.unpack_from(frame, at)[0])


@dataclass(frozen=True)
class Step:
    """One optimiser step of one owner.

    bytes_up, bytes_down  of this owner's frames in this step, retransmissions included
    """

    owner: str
    index: int
    start_s: float
    end_s: float
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Cost:
    """What a task takes: seconds alone on its device, and cores it keeps busy meanwhile."""

    seconds: float
    demand: float


class Costs:
    """The costs of every task of a workload, computed once.

    layers   of the workload's lane items; None for a remote linear. The parts of a stretch of
             local layers follow each other without a pause, so they are one task here.
    update   at a step's end: the sum of the lanes' gradients, clipping, optimiser
    """

    def __init__(
        self, workload: Workload, lanes: int, owner: DeviceProfile, worker: DeviceProfile
    ) -> None:
        parameters, tokens = preset(workload.preset), workload.tokens

        def one(profile: DeviceProfile, work: Work, task: str) -> Cost:
            return Cost(*profile.cost(work, task))

        shapes = workload.matrices
        self.encrypt = [one(owner, encrypt_work(m, tokens, parameters), "encrypt") for m in shapes]
        self.decrypt = [one(owner, decrypt_work(m, tokens, parameters), "decrypt") for m in shapes]
        self._worker, self._shapes = worker, shapes
        self._products: dict[tuple[int, int], Cost] = {}
        self.layers = [
            None if isinstance(item, Linear) else _chain(owner, item.parts, "local")
            for item in workload.lane
        ]
        more = (lanes - 1) * workload.accumulate
        self.update = _chain(owner, (workload.update, more), "update")

    def multiply(self, matrix: int, tokens: int) -> Cost:
        """A worker's product of so many tokens, of whichever requests."""
        if (matrix, tokens) not in self._products:
            work = multiply_work(self._shapes[matrix], tokens)
            self._products[matrix, tokens] = Cost(*self._worker.cost(work, "multiply"))
        return self._products[matrix, tokens]


def _chain(profile: DeviceProfile, parts: Sequence[Work], task: str) -> Cost:
    """One task for several that follow each other; its demand is their average over time."""
    costs = [profile.cost(part, task) for part in parts]
    seconds = sum(cost[0] for cost in costs)
    if seconds == 0:
        return Cost(0.0, min(1.0, profile.cores))
    return Cost(seconds, min(sum(s * demand for s, demand in costs) / seconds, profile.cores))


@dataclass(frozen=True)
class _Asked:
    """A request that waits for a worker's device."""

    owner: OwnerHost
    call: int
    work: MultiplyCiphertext
    queued_s: float
    done: Callable[[TaskEnd], None]


class WorkerHost:
    """A worker's machine and its device: which requests it computes next, and which together, the
    real queue decides."""

    def __init__(self, world: World, index: int, processor: Processor | None) -> None:
        self.name = f"worker{index}"
        self.sent_bytes = 0
        self._world = world
        self.processor = processor or Processor(world.env, world.config.worker.cores)
        self.device = Device(world.env, self.name, world.config.worker, self.processor, servers=1)
        unlimited = WorkerConfig(1 << 20, Quota(1 << 16, size=1 << 60, size_all=1 << 60))
        machine = Worker(world.catalogue, unlimited)
        self._actor = Actor(world.env, self.name, machine, self._transmit, self._perform)
        self._asked = ("", 0)
        self._queue: FairQueue[int] = FairQueue(WorkerConfig().max_tokens)
        self._waiting: dict[int, _Asked] = {}
        self._computing = False

    def arrive(self, peer: str, frame: bytes) -> None:
        """A frame of an owner has arrived."""
        # A task is started, if at all, while its request is handled: so it is known whose it is.
        self._asked = (peer, call_of(frame))
        self._actor.post(FrameArrived(peer, frame))

    def _transmit(self, peer: str, frame: bytes) -> None:
        owner = self._world.owners[peer]
        size = self._world.send(
            self.name, peer, frame, lambda way: owner.arrive(self.name, frame, way)
        )
        self.sent_bytes += size

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        work, world = run.work, self._world
        assert isinstance(work, MultiplyCiphertext)
        peer, call = self._asked
        shape = world.config.workload.matrices[work.matrix]
        self._waiting[run.task] = _Asked(world.owners[peer], call, work, world.env.now, done)
        counts_as = charged(work.tokens)
        size = shape.up_bytes(counts_as) + shape.down_bytes(counts_as)
        self._queue.push(run.task, peer, work.matrix, work.tokens, size)
        if not self._computing:
            self._compute_next()

    def _compute_next(self) -> None:
        tasks = self._queue.pop()
        self._computing = bool(tasks)
        if not tasks:
            return
        asked = {task: self._waiting.pop(task) for task in tasks}
        works = [one.work for one in asked.values()]
        cost = self._world.costs.multiply(works[0].matrix, sum(work.tokens for work in works))

        def ended(_: float, started_s: float, ended_s: float) -> None:
            self._compute_next()
            for task, one in asked.items():
                self._answer(task, one, started_s, ended_s)

        self.device.submit_cost(cost.seconds, cost.demand, ended)

    def _answer(self, task: int, one: _Asked, started_s: float, ended_s: float) -> None:
        world, tokens = self._world, one.work.tokens
        shape = world.config.workload.matrices[one.work.matrix]
        if one.owner.recorded:
            times, lane = (one.queued_s, started_s, ended_s), one.owner.lane_of(one.call)
            _record(world, f"{self.name}/gpu", shape.name, "worker", times, lane, one.call)
        one.done(TaskDone(task, phantom(shape.down_bytes(tokens), tokens)))


class OwnerHost:
    """An owner's machine, its processor, and its lanes.

    recorded  whether its spans are kept
    """

    def __init__(
        self, world: World, index: int, processor: Processor | None, recorded: bool
    ) -> None:
        config = world.config
        self.name = f"owner{index}"
        self.recorded = recorded
        self.steps: list[Step] = []
        self.requests = 0
        self.requests_sent = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self._world = world
        self.processor = processor or Processor(world.env, config.owner.cores)
        self.own_layers, self.cipher = (
            Device(world.env, f"{self.name}/{what}", config.owner, self.processor, config.lanes)
            for what in ("model", "cipher")
        )
        session = hashlib.sha256(f"{config.seed}/{self.name}".encode()).digest()[:SESSION_BYTES]
        # Equally loaded workers are taken in order: every owner begins with another one.
        workers = list(world.workers)
        first = index % len(workers)
        workers = workers[first:] + workers[:first]
        self._machine = Owner(session, world.catalogue, workers, config.protocol, config.placement)
        self._actor = Actor(
            world.env, self.name, self._machine, self._transmit, self._perform, self._report
        )
        self._lanes = [_Lane(world, self, i) for i in range(config.lanes)]
        self._waiting: dict[int, _Lane] = {}
        self._greeting = True
        self._running = 0
        self._taken = 0
        self._step_from = (0.0, 0, 0)

    def begin(self) -> None:
        """Open the sessions and start the first step, at a moment of this owner's own."""
        world, delay_s = self._world, 0.0
        if world.config.stagger and world.config.owners > 1:
            layers = (cost.seconds for cost in world.costs.layers if cost is not None)
            delay_s = world.rng.uniform(0, sum(layers))
        world.env.timeout(delay_s).callbacks.append(lambda _: self._actor.post(Start()))

    def lane_of(self, call: int) -> str:
        """The track of the lane that waits for a call; empty when none does any more."""
        lane = self._waiting.get(call)
        return lane.track if lane is not None else ""

    def ask(self, lane: _Lane, matrix: int) -> None:
        """A lane meets a remote linear."""
        self.requests += 1
        self._waiting[self.requests] = lane
        tokens = self._world.config.workload.tokens
        self._actor.post(LinearWanted(self.requests, matrix, tokens, None))

    def arrive(self, peer: str, frame: bytes, way: Crossing) -> None:
        """A frame of a worker has arrived."""
        self.received_bytes += wire_bytes(frame)
        call = call_of(frame)
        if call and self.recorded:
            track = f"{peer}->{self.name}"
            self._world.crossed(way, track, "answer", self.lane_of(call), call)
        self._actor.post(FrameArrived(peer, frame))
        if self._greeting and all(
            self._machine.state(name) is State.READY for name in self._world.workers
        ):
            # A run opens its sessions once; its steps are what is timed.
            self._greeting = False
            self._start_step()

    def lane_ended(self) -> None:
        """A lane has finished its pass; after the last one, the optimiser."""
        self._running -= 1
        if self._running == 0:
            cost = self._world.costs.update
            self.own_layers.submit_cost(cost.seconds, cost.demand, self._updated)

    def _updated(self, queued_s: float, started_s: float, ended_s: float) -> None:
        world = self._world
        if self.recorded:
            world.span(f"{self.name}/model", "update", queued_s, "", 0, "owner")
        start_s, up, down = self._step_from
        index = self._taken - world.config.warmup
        if 0 <= index < world.config.steps:
            up, down = self.sent_bytes - up, self.received_bytes - down
            self.steps.append(Step(self.name, index, start_s, ended_s, up, down))
            if self.recorded:
                world.span(f"{self.name}/steps", f"step {index}", start_s, "", 0, "step")
        self._taken += 1
        world.step_ended(self._taken)
        if not world.over:
            self._start_step()

    def _start_step(self) -> None:
        self._step_from = (self._world.env.now, self.sent_bytes, self.received_bytes)
        self._running = len(self._lanes)
        for lane in self._lanes:
            lane.start()

    # --- the driver's part --------------------------------------------------------------------

    def _transmit(self, peer: str, frame: bytes) -> None:
        world, worker = self._world, self._world.workers[peer]
        call = call_of(frame)
        self.requests_sent += call > 0

        def arrived(way: Crossing) -> None:
            if call and self.recorded:
                track = f"{self.name}->{peer}"
                world.crossed(way, track, "request", self.lane_of(call), call)
            worker.arrive(self.name, frame)

        self.sent_bytes += world.send(self.name, peer, frame, arrived)

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        world, work = self._world, run.work
        assert isinstance(work, Encrypt | Decrypt)
        shape = world.config.workload.matrices[work.matrix]
        name: str
        result: object
        if isinstance(work, Encrypt):
            name, cost = "encrypt", world.costs.encrypt[work.matrix]
            result = (phantom(shape.up_bytes(work.tokens), work.tokens), None)
        else:
            name, cost, result = "decrypt", world.costs.decrypt[work.matrix], None
        lane = self.lane_of(run.task)

        def ended(queued_s: float, started_s: float, ended_s: float) -> None:
            if self.recorded:
                times = (queued_s, started_s, ended_s)
                track = f"{self.name}/cipher"
                _record(world, track, f"{name} {shape.name}", "owner", times, lane, run.task)
            done(TaskDone(run.task, result))

        self.cipher.submit_cost(cost.seconds, cost.demand, ended)

    def _report(self, effect: Effect) -> None:
        match effect:
            case Deliver(call, _):
                self._waiting.pop(call).resume()
            case FailCall(_, reason) | Abort(reason):
                raise WorldError(f"{self.name}: {reason}")


class _Lane:
    """One micro-batch's pass: a walk along the workload's trace."""

    def __init__(self, world: World, owner: OwnerHost, index: int) -> None:
        self.track = f"{owner.name}/lane {index}"
        self._world = world
        self._owner = owner
        self._items = world.config.workload.lane
        self._at = 0

    def start(self) -> None:
        """From the first item."""
        self._at = 0
        self.resume()

    def resume(self) -> None:
        """Go on with the next item."""
        if self._at == len(self._items):
            self._owner.lane_ended()
            return
        item, cost = self._items[self._at], self._world.costs.layers[self._at]
        self._at += 1
        if cost is None:
            assert isinstance(item, Linear)
            self._owner.ask(self, item.matrix)
        else:
            self._owner.own_layers.submit_cost(cost.seconds, cost.demand, self._computed)

    def _computed(self, queued_s: float, started_s: float, ended_s: float) -> None:
        if self._owner.recorded:
            item = self._items[self._at - 1]
            assert not isinstance(item, Linear)
            times = (queued_s, started_s, ended_s)
            _record(self._world, self.track, item.label, "owner", times, self.track, 0)
        self.resume()


def _record(
    world: World, track: str, name: str, kind: str, times: tuple[float, float, float],
    lane: str, call: int,
) -> None:  # fmt: skip
    """A task's span, and before it the span of its wait for the device."""
    queued_s, started_s, ended_s = times
    if started_s > queued_s:
        world.trace.add(Span(f"{track} queue", kind, queued_s, started_s, lane, call, "wait"))
    if ended_s > started_s:
        world.trace.add(Span(track, name, started_s, ended_s, lane, call, kind))
