"""OpenFHE in the simulated world: the real machines and ciphertexts, a clock that is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy

from backends.he.conformance import Case
from backends.he.openfhe import NAMES, scheme
from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    Decrypt,
    Deliver,
    Effect,
    Encrypt,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    RunTask,
    Start,
    TaskDone,
)
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.worker import Worker
from sim.driver import Actor, TaskEnd
from sim.faults import FaultPlan, FaultyWire, after
from tests.openfhe.test_openfhe import scheme_of

library = pytest.mark.library
CALLS, TOKENS = 12, 4
PATIENCE = OwnerConfig(
    hello_timeout_s=0.5, request_timeout_s=0.5, quiet_s=0.5, revive_s=1.0, slow_bytes_per_s=1e8
)
PLAN = FaultPlan(
    stop_s=1e9, latency_s=(0.01, 0.03), delay_s=(0.1, 0.9), drop=0.15, duplicate=0.15, delay=0.2,
    corrupt=0.1,
)  # fmt: skip


class World:
    """One matrix, an owner and two workers, of which the first lies about every other product."""

    def __init__(self, name: str) -> None:
        case, used = Case(scheme_of(name)), scheme.scheme(name)
        self.case = case
        self.facts = replace(case.matrix, name="only")
        case.owner.guard(self.facts, case.weight, True)
        shape = MatrixShape(
            "only", 12, 10, used.packing.bytes_of(12, 1), used.packing.bytes_of(10, 1),
            used.packing.block_tokens,
        )  # fmt: skip
        catalogue = Catalogue(bytes(32), used.packing.digest, (shape,))
        self.env, self.delivered, self.rejected, self._products = simpy.Environment(), {}, [], 0
        self.wire = FaultyWire(self.env, PLAN, random.Random(1), "owner", self._arrive)
        self.actors = {
            "owner": Actor(
                self.env, "owner", Owner(bytes(16), catalogue, ["liar", "honest"], PATIENCE),
                lambda peer, frame: self.wire.send("owner", peer, frame), self._perform,
                self._report,
            )
        }  # fmt: skip
        for worker in ("liar", "honest"):
            self.actors[worker] = Actor(
                self.env, worker, Worker(catalogue),
                lambda peer, frame, own=worker: self.wire.send(own, peer, frame),
                lambda run, done, own=worker: self._multiply(own, run, done),
            )  # fmt: skip

    def ask(self, call: int) -> np.ndarray:
        """Post a call; its inputs."""
        x = self.case.inputs(TOKENS)
        self.actors["owner"].post(LinearWanted(call, 0, TOKENS, x))
        return x

    def _arrive(self, source: str, target: str, frame: bytes) -> None:
        self.actors[target].post(FrameArrived(source, frame))

    def _report(self, effect: Effect) -> None:
        assert not type(effect).__name__.startswith(("Fail", "Abort")), effect
        if isinstance(effect, Deliver):
            assert effect.call not in self.delivered
            self.delivered[effect.call] = effect.result

    def _perform(self, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        work, owner = run.work, self.case.owner
        end: TaskEnd
        try:
            if isinstance(work, Encrypt):
                made = owner.encrypt(work.x, self.facts)
                end = TaskDone(run.task, (made.payload.data, made.sealed))
            else:
                assert isinstance(work, Decrypt)
                found = owner.decrypt(work.sealed, work.payload, self.facts, work.worker)
                end = TaskDone(run.task, found)
        except WrongAnswerError as error:
            assert isinstance(work, Decrypt)
            self.rejected.append(work.worker)
            end = AnswerRejected(run.task, str(error))
        after(self.env, 0.005, lambda: done(end))

    def _multiply(self, own: str, run: RunTask, done: Callable[[TaskEnd], None]) -> None:
        work = run.work
        assert isinstance(work, MultiplyCiphertext)
        told = self.case.answer(work.payload, work.tokens)
        self._products += 1
        if own == "liar" and self._products > 3:
            told[-3] ^= 1 << 7  # bit 47 of the last of the numbers, which have 53 or 54
        after(self.env, 0.01, lambda: done(TaskDone(run.task, told.tobytes())))


@library
@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_runs_over_it_in_simulated_time(name: str) -> None:
    """Frames are lost, doubled, late and broken, a worker lies: every product comes, and right."""
    world = World(name)
    world.actors["owner"].post(Start())
    asked = {}
    for call in range(1, CALLS + 1):
        asked[call] = world.ask(call)
        world.env.run(until=world.env.now + 0.4)
    world.env.run(until=world.env.now + 200)
    assert sorted(world.delivered) == list(asked)
    for call, x in asked.items():
        right = world.case.exact(x)
        assert np.allclose(world.delivered[call], right, rtol=1e-3, atol=1e-2), call
    assert set(world.rejected) == {"liar"}
    assert {"drop", "duplicate", "delay", "corrupt"} <= set(world.wire.injected)


@library
@pytest.mark.parametrize(("name", "seed"), [("openfhe-bfv", 222), ("openfhe-ckks", 284)])
def test_a_model_is_trained_over_it_while_everything_goes_wrong(
    name: str, seed: int, tmp_path: Path
) -> None:
    """Chaos with crafted lies: every promise that it watches is kept. Where torch is beside it."""
    pytest.importorskip("torch")
    from scenarios.chaos.search import Bench

    result = Bench(tmp_path, name).run(seed)
    assert result.violation == ""
    assert result.trained_s > 0
    assert any(kind.startswith("lie: ") for kind in result.injected)
