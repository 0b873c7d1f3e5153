"""One worker of a chaos run: the real machine, and everything that can be wrong with its host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from protocol.admission import Quota
from protocol.events import Effect, Event, MultiplyCiphertext, RunTask, TaskDone, TaskFailed
from protocol.worker import Worker, WorkerConfig
from scenarios.chaos.arithmetic import Arithmetic
from scenarios.chaos.checks import PRODUCT, LieKey, Wire, WorkerWatch, digest
from scenarios.chaos.options import Options, stream
from sim.driver import Actor, Observer, TaskEnd
from sim.faults import FaultyWire, Lies, after

_BUSY = 8


class WorkerHost:
    """A worker, its place in the world, and its habit of lying.

    lies   where every lie it tells is written down
    """

    def __init__(
        self,
        env: simpy.Environment,
        name: str,
        options: Options,
        arithmetic: Arithmetic,
        wire: FaultyWire,
        seen: Wire,
        lies: dict[LieKey, str],
        observe: Observer,
    ) -> None:
        self.name = name
        self._env = env
        self._options = options
        self._arithmetic = arithmetic
        self._wire = wire
        self._seen = seen
        self._told = lies
        self._world_observes = observe
        self._rng = stream(options.seed, name)
        self._liar = next((x for x in options.plan.liars if x.worker == name), None)
        self._lies = None if self._liar is None else Lies(self._liar, self._rng, self._craft)
        self._watch = WorkerWatch(name, seen)
        self.actor = Actor(
            env, name, self._machine(), self._transmit, self._perform, observe=self._observe
        )

    def crash(self) -> None:
        """Loss of memory; the address stays."""
        self._watch = WorkerWatch(self.name, self._seen)
        self.actor.reborn(self._machine())

    def _machine(self) -> Worker:
        config = WorkerConfig(quota=Quota(requests=self._options.in_flight_max))
        return Worker(self._arithmetic.catalogue, config)

    def _observe(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        self._world_observes(actor, now, event, effects)
        self._watch.saw(event, effects)

    def _transmit(self, peer: str, frame: bytes) -> None:
        seen = self._seen.from_worker(frame)
        self._watch.sends(seen)
        wire, plan = self._wire, self._options.plan
        if seen.kind == PRODUCT and wire.chance("busy", plan.busy):
            frame = refusal(seen.session, seen.request, _BUSY)
        wire.send(self.name, peer, frame)
        if seen.kind == PRODUCT and wire.chance("twice", plan.twice):
            wait_s = self._rng.uniform(0.0, 2 * plan.delay_s[0])
            after(self._env, wait_s, lambda: wire.send(self.name, peer, frame))

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        work, plan = run.work, self._options.plan
        assert isinstance(work, MultiplyCiphertext)
        seconds = self._rng.uniform(*self._options.multiply_s)
        for window in plan.slow:
            if window.covers(self.name, float(self._env.now)):
                seconds *= window.factor
                self._wire.injected["slow worker"] += 1
        if self._wire.chance("failed", plan.failed):
            after(self._env, seconds, lambda: done(TaskFailed(run.task, "drawn")))
            return
        request = self._watch.job(run.task)
        after(self._env, seconds, lambda: done(self._product(run.task, work, request)))

    def _product(self, task: int, work: MultiplyCiphertext, request: tuple[bytes, int]) -> TaskEnd:
        try:
            product = self._arithmetic.multiply(work)
        except ValueError as error:
            return TaskFailed(task, str(error))
        if self._liar is None or self._lies is None:
            return TaskDone(task, product)
        told = self._lies.tell(work.matrix, product)
        # A lie within the rounding would be none.
        wrong = self._wire.faulty and self._arithmetic.is_wrong(work, product, told)
        if wrong and self._wire.chance(f"lie: {self._liar.way}", self._liar.rate):
            self._told[(*request, digest(told))] = self.name
            return TaskDone(task, told)
        return TaskDone(task, product)

    def _craft(self, way: str, matrix: int, product: bytes) -> bytes:
        return self._arithmetic.crafted(self._rng, way, matrix, product)


def refusal(session: bytes, request: int, reason: int) -> bytes:
    """A Refuse frame, laid out by hand."""
    head = b"PFTL\x02\x05\x00\x00" + session + (10).to_bytes(4, "little")
    return head + request.to_bytes(8, "little") + reason.to_bytes(2, "little")
