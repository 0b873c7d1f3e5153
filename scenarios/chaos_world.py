"""One chaos run: the real trainer, both real machines and real cipher arithmetic, on a simulated
network that does what the plan says, under the eyes of the checks.

The owner is one process that can die: everything of it is dropped then, lanes included, and a new
incarnation (new session, new randomness, first parameters) resumes from the checkpoints on disk.
Workers and frames in the air live on meanwhile. An operator starts a failed owner again the same
way; but once the faults have stopped, nothing may fail any more.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.entropy import SeededEntropy
from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.nn.trainer import TrainConfig, Trainer
from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Start,
    TaskDone,
    TaskFailed,
)
from protocol.owner import Owner, OwnerConfig
from protocol.worker import Worker
from scenarios.chaos_checks import (
    PRODUCT,
    LieKey,
    OwnerWatch,
    Secrets,
    Violation,
    Wire,
    WorkerWatch,
    digest,
    require,
)
from scenarios.chaos_model import MICRO_BATCH, TOKENS, Subject, as_bytes, distance, sequences
from sim.driver import Actor, Observer, TaskEnd
from sim.faults import FaultPlan, FaultyWire, Lies, Moment, draw_plan
from sim.lanes import LanePool, Outcome

OWNER = "owner"
EVENTS_MAX = 60_000
_BUSY = 8
_MLWE_ERROR_MOST = 5e-4
_MLWE_DRIFT_MOST = 0.25


class OwnerCrashed(Exception):
    """The owner's process dies here and now."""


class CallFailed(RuntimeError):
    """A lane's product cannot be had; the run ends and the operator starts it again."""


@dataclass(frozen=True)
class Options:
    """Everything drawn for one seed."""

    seed: int
    kind: str
    cipher: str
    workers: int
    steps: int
    micro_batches: int
    lanes: int
    checkpoint_every: int
    data_seed: int
    local_s: tuple[float, float]
    seal_s: tuple[float, float]
    multiply_s: tuple[float, float]
    owner: OwnerConfig
    plan: FaultPlan

    def __str__(self) -> str:
        """One line."""
        shown = [
            f"{item.name}={getattr(self, item.name)}"
            for item in fields(self)
            if item.name not in ("owner", "plan")
        ]
        return " ".join([*shown, str(self.owner), str(self.plan)])

    @property
    def training(self) -> TrainConfig:
        """The training run."""
        return TrainConfig(
            steps=self.steps, batch=self.micro_batches * MICRO_BATCH, micro_batch=MICRO_BATCH,
            learning_rate=0.02, warmup_steps=1, seed=self.data_seed,
        )  # fmt: skip

    def bound_s(self, calls_per_pass: int) -> float:
        """Simulated seconds after the faults' end within which training must have ended.

        What is left behind by then: frames in the air, slowed tasks, a clock that jumped. Then
        every worker may have to be given up and greeted again, and the owner to be started again,
        twice. After that every product of the whole run may be computed anew, one by one, each
        with one time-out.
        """
        plan, owner = self.plan, self.owner
        trip_s = 2 * plan.latency_s[1] + 2 * self.seal_s[1] + self.multiply_s[1]
        slowest = max([1.0, *(w.factor for w in plan.slow)])
        left_s = plan.delay_s[1] + plan.stop_jumps_s + slowest * self.multiply_s[1] + trip_s
        recover_s = (
            (self.workers + 1) * owner.attempts_max * owner.timeout_s_max
            + owner.revive_s + owner.hello_timeout_s + plan.restart_s
        )  # fmt: skip
        calls = self.steps * self.micro_batches * calls_per_pass
        return left_s + 2 * recover_s + calls * (trip_s + self.local_s[1])


def stream(seed: int, purpose: str) -> random.Random:
    """The seed's own generator for one purpose; the same on every machine and in every process."""
    return random.Random(f"chaos:{seed}:{purpose}")


def draw_options(seed: int) -> Options:
    """Everything of a run, from its seed."""
    rng = stream(seed, "options")
    workers, steps = rng.choice((2, 2, 3)), rng.randint(3, 5)
    plan = draw_plan(stream(seed, "faults"), [f"worker{i}" for i in range(workers)], steps)
    seal_s, multiply_s = rng.uniform(0.0001, 0.002), rng.uniform(0.0002, 0.004)
    trip_s = 2 * plan.latency_s[1] + multiply_s
    request_s = rng.uniform(3, 12) * trip_s
    return Options(
        seed=seed,
        kind="llama" if rng.random() < 0.1 else "plain",
        cipher="mlwe" if rng.random() < 0.25 else "clear",
        workers=workers,
        steps=steps,
        micro_batches=rng.randint(3, 4),
        lanes=rng.randint(1, 4),
        checkpoint_every=rng.randint(1, 2),
        data_seed=rng.randrange(3),
        local_s=(0.0, rng.uniform(0.0, 0.005)),
        seal_s=(seal_s / 4, seal_s),
        multiply_s=(multiply_s / 4, multiply_s),
        owner=OwnerConfig(
            hello_timeout_s=rng.uniform(3, 10) * trip_s,
            request_timeout_s=request_s,
            timeout_s_max=request_s * rng.uniform(2, 6),
            attempts_max=rng.randint(2, 6),
            retry_s=rng.uniform(0.002, 0.02),
            refusals_max=rng.randint(4, 12),
            revive_s=rng.uniform(0.05, 0.4),
            window=rng.randint(1, 8),
        ),
        plan=plan,
    )


class WatchedEntropy(SeededEntropy):
    """Seeded, and every key is shown to the checks."""

    def __init__(self, seed: int, secrets: Secrets) -> None:
        super().__init__(seed)
        self._secrets = secrets

    def fresh_key(self) -> bytes:
        key = super().fresh_key()
        self._secrets.key_drawn(key)
        return key


class _WorkerHost:
    """A worker, its place in the world, and its habit of lying."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self._world = world
        self.watch = WorkerWatch(name, world.wire_watch)
        self.actor = Actor(
            world.env, name, Worker(world.catalogue), self._transmit, self._perform,
            observe=self._observe,
        )  # fmt: skip
        self._rng = stream(world.options.seed, name)
        self._liar = next((x for x in world.options.plan.liars if x.worker == name), None)
        self._lies = None if self._liar is None else Lies(self._liar, self._rng, self._nudge)

    def crash(self) -> None:
        """Loss of memory; the address stays."""
        self.watch = WorkerWatch(self.name, self._world.wire_watch)
        self.actor.reborn(Worker(self._world.catalogue))

    def _observe(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        self._world.observe(actor, now, event, effects)
        self.watch.saw(event, effects)

    def _transmit(self, peer: str, frame: bytes) -> None:
        world = self._world
        seen = world.wire_watch.from_worker(frame)
        self.watch.sends(seen)
        wire, plan = world.wire, world.options.plan
        if seen.kind == PRODUCT and wire.chance("busy", plan.busy):
            frame = refusal(seen.session, seen.request, _BUSY)
        wire.send(self.name, peer, frame)
        if seen.kind == PRODUCT and wire.chance("twice", plan.twice):
            wait_s = self._rng.uniform(0.0, 2 * plan.delay_s[0])
            world.after(wait_s, lambda: wire.send(self.name, peer, frame))

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        world, now = self._world, float(self._world.env.now)
        work = run.work
        assert isinstance(work, MultiplyCiphertext)
        seconds = self._rng.uniform(*world.options.multiply_s)
        for window in world.options.plan.slow:
            if window.covers(self.name, now):
                seconds *= window.factor
                world.wire.injected["slow worker"] += 1
        if world.wire.chance("failed", world.options.plan.failed):
            world.after(seconds, lambda: done(TaskFailed(run.task, "drawn")))
            return
        request = self.watch.job(run.task)
        world.after(seconds, lambda: done(self._product(run.task, work, request)))

    def _product(self, task: int, work: MultiplyCiphertext, request: tuple[bytes, int]) -> TaskEnd:
        world = self._world
        try:
            product = world.multiply(work)
        except ValueError as error:
            return TaskFailed(task, str(error))
        if self._lies is not None:
            assert self._liar is not None
            told = self._lies.tell(work.matrix, product)
            if (
                world.wire.faulty
                and world.is_wrong(work, product, told)
                and world.wire.chance(f"lie: {self._liar.way}", self._liar.rate)
            ):
                world.lies[(*request, digest(told))] = self.name
                return TaskDone(task, told)
        return TaskDone(task, product)

    def _nudge(self, matrix: int, product: bytes) -> bytes:
        return self._world.nudged(self._rng, matrix, product)


def refusal(session: bytes, request: int, reason: int) -> bytes:
    """A Refuse frame, laid out by hand."""
    head = b"PFTL\x01\x05\x00\x00" + session + (10).to_bytes(4, "little")
    return head + request.to_bytes(8, "little") + reason.to_bytes(2, "little")


class World:
    """The run of one seed."""

    def __init__(
        self, options: Options, subject: Subject, directory: Path, log: Observer | None = None
    ) -> None:
        self.options = options
        self.env = simpy.Environment()
        self.lies: dict[LieKey, str] = {}
        self._subject = subject
        self._prepared = subject.prepared[options.cipher]
        self._directory = directory
        self._log = log
        self._encrypted = options.cipher == "mlwe"
        self._secrets = Secrets()
        self._rng = stream(options.seed, OWNER)
        self._matrices = self._prepared.owner_matrices()
        self._worker_cipher: WorkerCipher = (
            MlweWorker(self._parameters) if self._encrypted else ClearWorker()
        )
        self._operands = [
            self._worker_cipher.load(weight, forward)
            for weight in subject.weights
            for forward in (True, False)
        ]
        self._incarnation = 0
        self._events = 0
        self._pending: dict[int, tuple[int, NDArray[np.float32], Callable[[Outcome], None]]] = {}
        self._pool: LanePool | None = None
        self._cipher = self._new_cipher()
        self.catalogue = self._prepared.catalogue(self._cipher)
        self.wire_watch = Wire(self.catalogue.matrices, TOKENS, self._encrypted)
        self.wire = FaultyWire(
            self.env, options.plan, stream(options.seed, "wire"), OWNER, self._arrive
        )
        self._workers = {
            name: _WorkerHost(self, name) for name in (f"worker{i}" for i in range(options.workers))
        }
        self._owner: Actor | None = None
        self._machine: Owner | None = None
        self._watch: OwnerWatch | None = None
        self._training = False
        self._closed = False
        self._crash_steps = list(options.plan.crash_steps)
        self._reference = subject.reference(options.training, options.data_seed)
        self._calls_per_pass = 2 * len(subject.weights)
        self.bound_s = options.bound_s(self._calls_per_pass)

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Train to the end. Returns what was injected; raises Violation."""
        self._schedule()
        while True:
            try:
                self._one_life()
                break
            except OwnerCrashed:
                self.wire.injected["owner crash"] += 1
            except CallFailed as failed:
                late = float(self.env.now) - self.options.plan.stop_s
                require(late < self.bound_s / 2, f"a call failed after all faults: {failed}")
                self.wire.injected["owner started again"] += 1
            self._owner_is_down()
        self._end_in_order()
        if self._encrypted:
            self.wire_watch.bytes_are_uniform()
        return self.wire.injected

    def _one_life(self) -> None:
        """An incarnation of the owner, from its start to the end of training."""
        options, subject = self.options, self._subject
        self._start_owner()
        subject.reset()
        trainer = Trainer(
            subject.model, sequences(options.data_seed), options.training, lanes=options.lanes,
            forget_lane=subject.remote.forget_lane, checkpoints=self._directory,
            checkpoint_every=options.checkpoint_every, pool=self._lanes,
        )  # fmt: skip
        self._step = trainer.progress.step
        self._check_state(trainer.progress.losses)
        self._training = True
        try:
            with subject.remote.connected(lambda matrix, x: self._lane_pool().linear(matrix, x)):
                losses = trainer.train(self._on_step)
        finally:
            self._training = False
        require(len(losses) == options.steps, "training ended after another number of steps")

    def _on_step(self, step: int, loss: float) -> None:
        require(step == self._step + 1, f"step {step} follows step {self._step}")
        self._step = step
        self._check_state(None, loss)
        if step in self._crash_steps and self.wire.faulty:
            self._crash_steps.remove(step)
            raise OwnerCrashed

    def _check_state(self, losses: list[float] | None, loss: float | None = None) -> None:
        """The parameters are those of the fault-free run after as many steps."""
        step, reference = self._step, self._reference
        require(step < len(reference.states), f"step {step} is one too many")
        mine, right = self._subject.snapshot(), reference.states[step]
        told = losses if losses is not None else [loss]
        first = 0 if losses is not None else step - 1
        expected = reference.losses[first:step]
        if not self._encrypted:
            require(as_bytes(mine) == as_bytes(right), f"wrong parameters after step {step}")
            require(list(expected) == told, f"wrong losses after step {step}")
            return
        moved = distance(right, reference.states[0])
        require(
            distance(mine, right) <= _MLWE_DRIFT_MOST * moved, f"parameters drift after step {step}"
        )
        close = np.allclose(np.array(told, float), np.array(expected, float), rtol=0.02)
        require(len(told) == len(expected) and close, f"losses drift after step {step}")

    def _end_in_order(self) -> None:
        """Faults are over: every honest worker serves again, and the sessions close."""
        options = self.options
        machine, watch = self._machine, self._watch
        assert machine is not None
        assert watch is not None
        assert self._owner is not None
        quiet_s = options.plan.stop_s + options.plan.delay_s[1] + options.plan.stop_jumps_s
        patience_s = options.owner.attempts_max * options.owner.timeout_s_max
        until = max(float(self.env.now), quiet_s) + patience_s + 2 * options.owner.revive_s
        self.env.run(until=until + 2 * options.owner.hello_timeout_s)
        if not watch.aborted:
            for name in self._workers:
                state = machine.state(name).value
                require(
                    state == "ready" or name in self.wire_watch.retired,
                    f"{name} is {state} long after all faults",
                )
        self._owner.post(CloseWanted())
        if not self._closed:
            self.env.run(until=float(self.env.now) + patience_s)
        require(self._closed, "the sessions do not close")

    # --- the owner's process --------------------------------------------------------------------

    @property
    def _parameters(self) -> Any:
        return self._prepared.parameters

    def _new_cipher(self) -> OwnerCipher:
        text = f"{self.options.seed}:{self._incarnation}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        entropy = WatchedEntropy(seed, self._secrets)
        if not self._encrypted:
            cipher: OwnerCipher = ClearOwner(entropy)
        else:
            cipher = MlweOwner(self._parameters, self._prepared.public_matrix(), entropy)
        for index, matrix in enumerate(self._matrices):
            cipher.guard(matrix, self._subject.weights[index // 2], forward=index % 2 == 0)
        return cipher

    def _start_owner(self) -> None:
        self._incarnation += 1
        session = self._rng.randbytes(16)
        self.wire_watch.owner_starts(session)
        self._cipher = self._new_cipher()
        names = list(self._workers)
        machine = self._machine = Owner(session, self.catalogue, names, self.options.owner)
        config = self.options.owner
        watch = self._watch = OwnerWatch(
            self.wire_watch,
            self.lies,
            lambda: tuple(machine.state(name).value for name in names),
            1.001 * max(config.timeout_s_max, config.revive_s),
        )

        def observe(actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
            self.observe(actor, now, event, effects)
            watch.saw(event, effects)

        self._pending.clear()
        self._call = 0
        self._closed = False
        self._owner = Actor(
            self.env, OWNER, machine, self._transmit, self._perform, self._report, observe
        )
        self._owner.post(Start())

    def _owner_is_down(self) -> None:
        assert self._owner is not None
        assert self._machine is not None
        # The dead process must not be heard of again.
        self._owner.reborn(self._machine)
        self._owner = None
        self._pending.clear()
        if self.options.plan.torn_checkpoint:
            aside = self._directory / f".step-{self._step + 1:06d}.1.tmp"
            aside.mkdir(parents=True, exist_ok=True)
            (aside / "adapter.safetensors").write_bytes(b"half a file")
        self.env.run(until=float(self.env.now) + self.options.plan.restart_s)

    def _lanes(self, lanes: int) -> LanePool:
        self._pool = LanePool(self.env, lanes, self._ask)
        return self._pool

    def _lane_pool(self) -> LanePool:
        assert self._pool is not None
        return self._pool

    def _ask(self, matrix: int, x: NDArray[np.float32], answer: Callable[[Outcome], None]) -> None:
        owner = self._owner
        if self._encrypted:
            self.wire_watch.private(x)

        def post() -> None:
            if self._owner is owner and owner is not None:
                self._call += 1
                self._pending[self._call] = (matrix, x, answer)
                owner.post(LinearWanted(self._call, matrix, len(x), x))

        self.after(self._rng.uniform(*self.options.local_s), post)

    def _transmit(self, worker: str, frame: bytes) -> None:
        self.wire_watch.from_owner(worker, frame)
        self.wire.send(OWNER, worker, frame)

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        life = self._incarnation

        def end() -> None:
            if life == self._incarnation and self._owner is not None:
                done(self._owner_task(run))

        self.after(self._rng.uniform(*self.options.seal_s), end)

    def _owner_task(self, run: RunTask) -> TaskEnd:
        work = run.work
        assert isinstance(work, Encrypt | Decrypt)
        matrix = self._matrices[work.matrix]
        try:
            if isinstance(work, Encrypt):
                assert isinstance(work.x, np.ndarray)
                made = self._cipher.encrypt(work.x, matrix)
                self._secrets.encrypted(made.payload.tobytes(), made.sealed)
                return TaskDone(run.task, (made.payload.data, made.sealed))
            result = self._cipher.decrypt(work.sealed, work.payload, matrix)
        except WrongAnswerError as error:
            return AnswerRejected(run.task, str(error))
        except ValueError as error:
            return TaskFailed(run.task, str(error))
        self._secrets.opened(work.sealed)
        return TaskDone(run.task, result)

    def _report(self, effect: Effect) -> None:
        match effect:
            case Deliver(call, result):
                matrix, x, answer = self._pending.pop(call)
                assert isinstance(result, np.ndarray)
                self._is_right(matrix, x, result)
                answer(result)
            case FailCall(call, reason):
                _, _, answer = self._pending.pop(call)
                answer(CallFailed(reason))
            case Closed():
                require(not self._closed, "the owner closed twice")
                self._closed = True

    def _is_right(self, matrix: int, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        right = self._subject.product(matrix, x)
        if not self._encrypted:
            require(y.tobytes() == right.tobytes(), "a lane was given a wrong product")
            return
        facts = self._matrices[matrix]
        size = np.linalg.norm(x * facts.in_scale, axis=1) * facts.plan.max_norm
        error = np.abs(y - right).max(axis=1) / facts.out_scale.max()
        require(bool((error <= _MLWE_ERROR_MOST * size).all()), "a lane was given a wrong product")

    # --- the world ------------------------------------------------------------------------------

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later, in simulated time."""
        event = self.env.timeout(seconds)
        event.callbacks.append(lambda _: action())

    def observe(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """See every event of every actor."""
        self._events += 1
        require(self._events < EVENTS_MAX, f"{EVENTS_MAX} events and no end")
        if self._log is not None:
            self._log(actor, now, event, effects)

    def _arrive(self, source: str, target: str, frame: bytes) -> None:
        actor = self._owner if target == OWNER else self._workers[target].actor
        if actor is not None:
            actor.post(FrameArrived(source, frame))

    def _schedule(self) -> None:
        plan = self.options.plan
        for moment in plan.worker_crashes:
            self.after(moment.at_s, lambda m=moment: self._crash_worker(m))  # type: ignore[misc]
        for moment in plan.connections_lost:
            self.after(moment.at_s, lambda m=moment: self._disconnect(m))  # type: ignore[misc]
        for moment in plan.jumps:
            self.after(moment.at_s, lambda m=moment: self._jump(m))  # type: ignore[misc]
        for at_s in plan.crashes_s:
            self.after(at_s, self._crash_owner)
        self.after(plan.stop_s + self.bound_s, self._too_late)

    def _crash_worker(self, moment: Moment) -> None:
        self.wire.injected["worker crash"] += 1
        self._workers[moment.worker].crash()

    def _disconnect(self, moment: Moment) -> None:
        self.wire.injected["connection lost"] += 1
        if moment.delta_s >= 0 and self._owner is not None:
            self._owner.post(PeerLost(moment.worker))
        if moment.delta_s <= 0:
            self._workers[moment.worker].actor.post(PeerLost(OWNER))

    def _jump(self, moment: Moment) -> None:
        if self._owner is not None:
            self.wire.injected["clock jump"] += 1
            self._owner.jump(moment.delta_s)

    def _crash_owner(self) -> None:
        if self._training:
            raise OwnerCrashed

    def _too_late(self) -> None:
        if self._training or self._owner is None:
            raise Violation(f"not finished {self.bound_s:.1f} s after the faults' end")

    # --- arithmetic -----------------------------------------------------------------------------

    def multiply(self, work: MultiplyCiphertext) -> bytes:
        """The honest product."""
        operand = self._operands[work.matrix]
        return self._worker_cipher.multiply(work.payload, work.tokens, operand).tobytes()

    def is_wrong(self, work: MultiplyCiphertext, right: bytes, told: bytes) -> bool:
        """Whether an answer differs by more than any rounding could."""
        if self._encrypted or told == right:
            return told != right
        facts = self.catalogue.matrices[work.matrix]
        x = np.frombuffer(work.payload, np.float32).reshape(-1, facts.in_features)
        mine = np.frombuffer(right, np.float32).reshape(len(x), -1).astype(np.float64)
        other = np.frombuffer(told, np.float32).reshape(len(x), -1).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.abs(mine - other).max(axis=1)
        # Four times a bound on the rounding of all outputs together.
        bound = 2.0**-21 * facts.in_features * np.abs(x) @ self._column_sums(work.matrix)
        return not bool((far <= bound).all())

    def nudged(self, rng: random.Random, matrix: int, product: bytes) -> bytes:
        """A product with one value changed, by little but more than a check may tolerate."""
        outputs = self.catalogue.matrices[matrix].out_features
        if self._encrypted:
            values = np.frombuffer(product, "<u2").copy()
            tolerated = int(min(outputs / 2, 8 * (outputs / 12) ** 0.5)) + 2
            step = rng.randint(3 * tolerated, 40 * tolerated) * rng.choice((-1, 1))
            place = rng.randrange(len(values))
            values[place] = (int(values[place]) + step) % (1 << 16)
            return values.tobytes()
        floats = np.frombuffer(product, np.float32).copy()
        place = rng.randrange(len(floats))
        floats[place] += np.float32(rng.uniform(0.01, 1.0) * np.abs(floats).max())
        return floats.tobytes()

    def _column_sums(self, matrix: int) -> NDArray[np.float64]:
        weight = self._subject.weights[matrix // 2]
        sizes: NDArray[np.float64] = np.abs(weight.astype(np.float64))
        return sizes.sum(axis=matrix % 2)
