"""One chaos run: the real trainer, both real machines and real cipher arithmetic, on a simulated
network that does what the plan says, under the eyes of the checks.

The owner is one process that can die: everything of it is dropped then, lanes included, and a new
incarnation (new session, new randomness, first parameters) resumes from the checkpoints on disk.
Workers and frames in the air live on meanwhile. An operator starts a failed owner again the same
way; but once the faults have stopped, nothing may fail any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simpy
from numpy.typing import NDArray

from backends.he.mlwe_owner import MlweOwner, Sealed
from backends.he.openfhe import NAMES as OPENFHE
from backends.ledger import WorkerLedger
from backends.nn.trainer import Trainer
from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Discard,
    Disconnected,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    PeerLost,
    RunTask,
    Start,
    TaskDone,
    TaskFailed,
)
from protocol.owner import Owner
from scenarios.chaos.arithmetic import Arithmetic
from scenarios.chaos.checks import LieKey, OwnerWatch, Violation, Wire, require
from scenarios.chaos.log import EventLog
from scenarios.chaos.model import TOKENS, Subject, as_bytes, distance, sequences
from scenarios.chaos.openfhe import OpenFheArithmetic
from scenarios.chaos.options import Options, stream
from scenarios.chaos.secrecy import Secrets
from scenarios.chaos.worker import WorkerHost
from sim.driver import Actor, TaskEnd
from sim.faults import FaultyWire, Moment, after
from sim.lanes import LanePool, Outcome

OWNER = "owner"
EVENTS_MAX = 60_000
_MLWE_DRIFT_MOST = 0.3
"""Distance of encrypted training's parameters from those in clear, relative to their way so far."""
_MLWE_LOSS_ERROR_MOST = 0.01
_THIN_DRIFT_MOST = 0.6
_THIN_LOSS_ERROR_MOST = 0.03


class OwnerCrashed(Exception):
    """The owner's process dies here and now."""


class CallFailed(RuntimeError):
    """A lane's product cannot be had; the run ends and the operator starts it again."""


class World:
    """The run of one seed.

    directory   where the owner keeps its checkpoints; it outlives the owner

    wire (with its count of `injected` faults), bound_s and trained_s (simulated seconds at which
    training ended, 0 if it did not) are for the verdict; wraps counts results, under `thin`.
    """

    def __init__(
        self, options: Options, subject: Subject, directory: Path, log: EventLog | None = None
    ) -> None:
        self.options = options
        self.env = simpy.Environment()
        self._subject = subject
        self._directory = directory
        self._log = log
        self._secrets = Secrets()
        self._rng = stream(options.seed, OWNER)
        openfhe = options.cipher in OPENFHE
        kind = OpenFheArithmetic if openfhe else Arithmetic
        self._arithmetic = kind(subject, options.cipher, options.seed, self._secrets)
        self._reference = subject.reference(options.training, options.data_seed)
        self.bound_s = options.bound_s(2 * len(subject.weights))
        shapes = self._arithmetic.catalogue.matrices
        self._seen = Wire(shapes, TOKENS, self._arithmetic.encrypted, words=openfhe)
        self.wire = FaultyWire(
            self.env, options.plan, stream(options.seed, "wire"), OWNER, self._arrive
        )
        self._lies: dict[LieKey, str] = {}
        self._workers = {
            name: WorkerHost(
                self.env, name, options, self._arithmetic, self.wire, self._seen, self._lies,
                self._observe,
            )
            for name in (f"worker{i}" for i in range(options.workers))
        }  # fmt: skip
        self._events = 0
        self._incarnation = 0
        self._answered: set[str] = set()
        self._caught: set[str] = set()
        self._rests_on: list[set[str]] = []
        self.wraps: Counter[str] = Counter()
        self._gains: dict[int, float] = {}
        self.trained_s = 0.0
        self._up = False
        self._pool: LanePool | None = None
        self._training = False
        self._crash_steps = list(options.plan.crash_steps)
        self._schedule()

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end. Raises Violation."""
        while True:
            self._start_owner()
            try:
                self._train()
                break
            except OwnerCrashed:
                self._happened("owner crash")
            except CallFailed as failed:
                after_s = float(self.env.now) - self.options.plan.stop_s
                may_fail = after_s < self.options.recovered_s
                require(may_fail, f"a call failed {after_s:.1f} s after the faults: {failed}")
                self._happened("owner started again")
            self._owner_is_down()
        self.trained_s = float(self.env.now)
        self._end_in_order()
        self._secrets.none_is_left()
        if self._arithmetic.encrypted:
            self._seen.bytes_are_uniform()

    def _train(self) -> None:
        """What an incarnation of the owner does, from its start to the end of training."""
        options, subject = self.options, self._subject
        self._owner.post(Start())
        subject.reset()
        trainer = Trainer(
            subject.model, sequences(options.data_seed), options.training, lanes=options.lanes,
            forget_lane=subject.remote.forget_lane, checkpoints=self._directory,
            checkpoint_every=options.checkpoint_every, pool=self._lanes, ledger=self._ledger,
        )  # fmt: skip

        def resumes() -> None:
            self._step = trainer.progress.step
            self._answered.clear()
            del self._rests_on[self._step :]
            self._check_trust()
            self._check_state(trainer.progress.losses, since=0)

        def on_return(why: str) -> None:
            self._happened("training went back")
            resumes()

        resumes()
        self._training = True
        try:
            with subject.remote.connected(lambda matrix, x: self._lane_pool().linear(matrix, x)):
                losses = trainer.train(self._on_step, on_return)
        finally:
            self._training = False
        require(len(losses) == options.steps, "training ended after another number of steps")

    def _on_step(self, step: int, loss: float) -> None:
        require(step == self._step + 1, f"step {step} follows step {self._step}")
        self._step = step
        self._rests_on.append(set(self._answered))
        self._answered.clear()
        self._check_trust()
        self._check_state([loss], since=step - 1)
        if step in self._crash_steps and self.wire.faulty:
            self._crash_steps.remove(step)
            raise OwnerCrashed

    def _check_trust(self) -> None:
        """No step that counts has an answer of a worker that was caught in it."""
        caught = self._caught & set().union(*self._rests_on)
        require(not caught, f"step {self._step} rests on answers of {', '.join(sorted(caught))}")

    def _check_state(self, losses: list[float], since: int) -> None:
        """Parameters, and losses since a step, are those of the fault-free run."""
        step, reference = self._step, self._reference
        require(step < len(reference.states), f"step {step} is one too many")
        mine, right = self._subject.snapshot(), reference.states[step]
        expected = list(reference.losses[since:step])
        require(len(losses) == len(expected), f"another number of losses after step {step}")
        if not self._arithmetic.encrypted:
            require(as_bytes(mine) == as_bytes(right), f"wrong parameters after step {step}")
            require(losses == expected, f"wrong losses after step {step}")
            return
        thin = self._arithmetic.thin
        drift = _THIN_DRIFT_MOST if thin else _MLWE_DRIFT_MOST
        most = drift * distance(right, reference.states[0])
        require(distance(mine, right) <= most, f"parameters drift after step {step}")
        off = _THIN_LOSS_ERROR_MOST if thin else _MLWE_LOSS_ERROR_MOST
        close = np.allclose(losses, expected, rtol=off, atol=0.0)
        require(close, f"losses drift after step {step}")

    def _end_in_order(self) -> None:
        """Faults are over: every honest worker serves again, and the sessions close."""
        options, machine = self.options, self._machine
        start_s = max(float(self.env.now), options.plan.stop_s)
        self.env.run(until=start_s + options.recovered_s)
        if not self._watch.aborted:
            for name in self._workers:
                state = machine.state(name).value
                in_service = state == "ready" or name in self._seen.retired
                require(in_service, f"{name} is {state} long after all faults")
        self._owner.post(CloseWanted())
        if not self._closed:
            self.env.run(until=float(self.env.now) + options.recovered_s)
        require(self._closed, "the sessions do not close")

    # --- the owner's process --------------------------------------------------------------------

    def _start_owner(self) -> None:
        self._incarnation += 1
        session = self._rng.randbytes(16)
        self._seen.retired |= self._caught  # whether or not the one before could act on it
        self._seen.owner_starts(session)
        self._cipher = self._arithmetic.owner_cipher(self._incarnation)
        names, config = list(self._workers), self.options.owner
        ledger = self._ledger = WorkerLedger(self._directory / "retired-workers.json")
        machine = self._machine = Owner(
            session, self._arithmetic.catalogue, names, config, retired=ledger.retired
        )
        watch = self._watch = OwnerWatch(
            self._seen,
            self._lies,
            lambda: tuple(machine.state(name).value for name in names),
            1.001 * max(config.wait_s_max, config.timeout_s_max, config.revive_s_max),
        )

        def observe(actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
            self._observe(actor, now, event, effects)
            watch.saw(event, effects)

        self._pending: dict[int, tuple[int, NDArray[np.float32], Callable[[Outcome], None]]] = {}
        self._call = 0
        self._closed = False
        self._up = True
        self._owner = Actor(
            self.env, OWNER, machine, self._transmit, self._perform, self._report, observe
        )

    def _owner_is_down(self) -> None:
        # The dead process must not be heard of again: no timer, no task.
        self._owner.reborn(self._machine)
        self._secrets.owner_died()
        self._up = False
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
        if self._arithmetic.encrypted:
            self._seen.private(x)

        def post() -> None:
            self._call += 1
            self._pending[self._call] = (matrix, x, answer)
            self._owner.post(LinearWanted(self._call, matrix, len(x), x))

        self._of_this_life(self._rng.uniform(*self.options.local_s), post)

    def _transmit(self, worker: str, frame: bytes) -> None:
        self._seen.from_owner(worker, frame)
        self.wire.send(OWNER, worker, frame)

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        seconds = self._rng.uniform(*self.options.seal_s)
        self._of_this_life(seconds, lambda: done(self._task(run)))

    def _of_this_life(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later, unless the owner has died by then."""
        life = self._incarnation

        def act() -> None:
            if self._up and life == self._incarnation:
                action()

        after(self.env, seconds, act)

    def _task(self, run: RunTask) -> TaskEnd:
        work = run.work
        assert isinstance(work, Encrypt | Decrypt)
        matrix = self._arithmetic.matrices[work.matrix]
        try:
            if isinstance(work, Encrypt):
                assert isinstance(work.x, np.ndarray)
                made = self._cipher.encrypt(work.x, matrix)
                self._secrets.encrypted(made.payload.tobytes(), made.sealed)
                self._gains[run.task] = getattr(made.sealed, "gain", 1.0)
                return TaskDone(run.task, (made.payload.data, made.sealed))
            result = self._decrypted(work)
        except WrongAnswerError as error:
            assert isinstance(work, Decrypt)
            # At once, whatever becomes of the call, as the real driver does.
            self._ledger.retire(work.worker, str(error))
            self._caught.add(work.worker)
            return AnswerRejected(run.task, str(error))
        except ValueError as error:
            return TaskFailed(run.task, str(error))
        self._secrets.opened(work.sealed)
        self._ledger.accepted(work.worker)
        self._answered.add(work.worker)
        return TaskDone(run.task, result)

    def _decrypted(self, work: Decrypt) -> NDArray[np.float32]:
        """The result, of which everything that wrapped was repaired."""
        arithmetic, cipher, sealed = self._arithmetic, self._cipher, work.sealed
        matrix = arithmetic.matrices[work.matrix]
        wraps, before = None, 0
        if isinstance(cipher, MlweOwner) and isinstance(sealed, Sealed):
            before = cipher.repairs.wraps
            if arithmetic.thin:
                wraps = arithmetic.wraps(work.matrix, sealed.x, sealed.inverse_alpha)
        result = cipher.decrypt(sealed, work.payload, matrix, work.worker)
        assert isinstance(result, np.ndarray)
        if wraps is not None and isinstance(cipher, MlweOwner):
            repaired = cipher.repairs.wraps - before
            self.wraps["wrapped"] += wraps.certain
            self.wraps["wrapped, or nearly"] += wraps.certain + wraps.possible
            self.wraps["repaired"] += repaired
            fits = wraps.certain <= repaired <= wraps.certain + wraps.possible
            require(fits, f"{wraps.certain} results wrapped, and {repaired} were repaired")
        return result

    def _report(self, effect: Effect) -> None:
        match effect:
            case Deliver(call, result):
                matrix, x, answer = self._pending.pop(call)
                assert isinstance(result, np.ndarray)
                self._arithmetic.require_right(matrix, x, result, self._gains[call])
                answer(result)
            case FailCall(call, reason):
                _, _, answer = self._pending.pop(call)
                answer(CallFailed(reason))
            case Discard(_, sealed):
                self._cipher.discard(sealed)
                self._secrets.discarded(sealed)
            case Closed():
                require(not self._closed, "the owner closed twice")
                self._closed = True

    # --- the world ------------------------------------------------------------------------------

    def _observe(self, actor: str, now: float, event: Event, effects: Sequence[Effect]) -> None:
        self._events += 1
        require(self._events < EVENTS_MAX, f"{EVENTS_MAX} events and no end")
        if self._log is not None:
            self._log(actor, now, event, effects)

    def _happened(self, what: str, whom: str = OWNER) -> None:
        self.wire.injected[what] += 1
        if self._log is not None:
            self._log.note(whom, float(self.env.now), what)

    def _arrive(self, source: str, target: str, frame: bytes) -> None:
        if target == OWNER:
            if self._up:
                self._owner.post(FrameArrived(source, frame))
            return
        self._workers[target].actor.post(FrameArrived(source, frame))

    def _schedule(self) -> None:
        plan = self.options.plan
        for moments, act in (
            (plan.worker_crashes, self._crash_worker),
            (plan.connections_lost, self._disconnect),
            (plan.jumps, self._jump),
        ):
            for moment in moments:
                after(self.env, moment.at_s, lambda act=act, m=moment: act(m))  # type: ignore[misc]
        for at_s in plan.crashes_s:
            after(self.env, at_s, self._crash_owner)
        after(self.env, plan.stop_s + self.bound_s, self._too_late)

    def _crash_worker(self, moment: Moment) -> None:
        self._happened("worker crash", moment.worker)
        self._workers[moment.worker].crash()

    def _disconnect(self, moment: Moment) -> None:
        self._happened("connection lost", moment.worker)
        if moment.delta_s > -1 / 3 and self._up:
            given_up = moment.delta_s > 0.9  # the transport will not try again
            self._owner.post((PeerLost if given_up else Disconnected)(moment.worker))
        if moment.delta_s < 1 / 3:
            self._workers[moment.worker].actor.post(PeerLost(OWNER))

    def _jump(self, moment: Moment) -> None:
        if self._up:
            self._happened("clock jump")
            self._owner.jump(moment.delta_s)

    def _crash_owner(self) -> None:
        if self._training:
            raise OwnerCrashed

    def _too_late(self) -> None:
        if self._training or not self._up:
            raise Violation(f"not finished {self.bound_s:.1f} s after the faults' end")
