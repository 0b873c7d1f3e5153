"""A private training pass on this machine, in miniature, with a clock at every step.

What a task takes inside a training run is not what it takes in a loop of its own: caches are
cold, threads have to be woken, torch and the cipher's kernels fight for cores. So calibration
times tasks where they happen: the real program of the owner (skeleton, adapters, autograd), the
real machines, the real cipher with its integrity check, on the threads that a real run has: one a
lane, one a machine, a pool of as many as lanes for the owner's tasks and one for the worker's.

Two things are not real. Frames pass between the two sides as they are, without timers: nothing
is lost here. And the weights are noise, their products scaled to about the size of the inputs:
training goes nowhere.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from backends.he.interface import OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from backends.he.plan import MatrixPlan, plan_directions
from backends.he.preparation import weight_limit
from backends.he.public import HintBuilder, PublicMatrix
from backends.he.store import shapes_of
from backends.nn.adapters import add_lora, trainable
from backends.nn.losses import token_losses
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from protocol.catalogue import Catalogue
from protocol.events import (
    CancelTimer,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Discard,
    Effect,
    Encrypt,
    Event,
    FrameArrived,
    LinearWanted,
    Machine,
    MultiplyCiphertext,
    RunTask,
    Send,
    SetTimer,
    Start,
    Task,
    TaskDone,
)
from protocol.messages import SESSION_BYTES
from protocol.owner import Owner
from protocol.worker import Worker
from sim.frames import call_of

_RANK = 16


class RehearsalError(RuntimeError):
    """The rehearsal ended early; the text says why."""


@dataclass
class PassTimes:
    """One pass of one lane, alone. Seconds.

    local    between the remote linears, all together
    linears  (matrix, encrypt, multiply, decrypt) of every remote linear; a phase ends when its
             result is where the next one takes it, hand-over between threads included
    """

    local: float = 0.0
    linears: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Of the whole pass."""
        return self.local + sum(sum(phases) for _, *phases in self.linears)


class _Side:
    """A machine on a thread of its own, its tasks on a pool."""

    def __init__(
        self,
        machine: Machine,
        compute: Callable[[Task], object],
        transmit: Callable[[bytes], None],
        report: Callable[[Effect | Exception], None],
        threads: int,
    ) -> None:
        self._machine, self._compute = machine, compute
        self._transmit, self._report = transmit, report
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def post(self, event: Event | None) -> None:
        """Queue an event; None stops the thread."""
        self._events.put(event)

    def stop(self) -> None:
        """Stop after the events already queued."""
        self.post(None)
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                for effect in self._machine.handle(event, time.monotonic()):
                    match effect:
                        case Send(_, frame):
                            assert isinstance(frame, bytes)
                            self._transmit(frame)
                        case RunTask(task, work):
                            self._pool.submit(self._perform, task, work)
                        case SetTimer() | CancelTimer():
                            pass
                        case _:
                            self._report(effect)
            except Exception as error:
                self._report(error)

    def _perform(self, task: int, work: Task) -> None:
        try:
            self.post(TaskDone(task, self._compute(work)))
        except Exception as error:
            self._report(error)


class Rehearsal:
    """One small model, its worker, and as many lanes as it is told to; close it after use."""

    def __init__(self, config: PretrainedConfig, parameters: Parameters, lanes: int) -> None:
        skeleton = build_skeleton(RandomBase(config, 0))
        self._model = add_lora(skeleton.model, _RANK, 2 * _RANK, 0)
        self._model.train()
        self.remote = skeleton.remote
        self._vocabulary = config.get_text_config().vocab_size
        self.parameters = list(trainable(self._model).values())
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0)
        public = PublicMatrix(bytes(32), parameters.rank)
        self._cipher, hints = MlweOwner(parameters, public), HintBuilder(public)
        self._worker = MlweWorker()
        self._matrices: list[OwnerMatrix] = []
        self._loaded: list[Any] = []
        rng = np.random.default_rng(0)
        for group in skeleton.groups:
            limit = weight_limit(group, parameters)
            shape = group.total_out, group.in_features
            weight = rng.integers(-limit, limit + 1, shape, np.int8)
            ones = np.ones(group.total_out, np.float32)
            plans = plan_directions(weight, ones, parameters, group.precise)
            for forward, plan in zip((True, False), plans, strict=True):
                hint = hints.build(weight, forward)
                matrix = _matrix(group.name, weight, forward, hint, plan)
                self._cipher.guard(matrix, weight, forward)
                self._matrices.append(matrix)
                self._loaded.append(self._worker.load(weight, forward, plan.format))
        shapes = shapes_of(skeleton.groups, [matrix.plan.format for matrix in self._matrices])
        catalogue = Catalogue(bytes(32), parameters.digest(), shapes)
        self._waiting: dict[int, Future[NDArray[np.float32]]] = {}
        self._marks: dict[int, list[float]] = {}
        self._asking = threading.Lock()
        self._calls = 0
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._lanes = ThreadPoolExecutor(lanes)
        self._lane = threading.local()
        self._there = _Side(
            Worker(catalogue), self._multiply, lambda f: self._arrived(f, self._here, "worker"),
            self._report, 1,
        )  # fmt: skip
        self._here = _Side(
            Owner(bytes(SESSION_BYTES), catalogue, ["worker"]), self._secret_task,
            lambda f: self._arrived(f, self._there, "owner"), self._report, lanes,
        )  # fmt: skip
        self._here.post(Start())

    def alone(self, tokens: int) -> PassTimes:
        """Time one pass of one lane over a sequence of `tokens` random tokens."""
        times = PassTimes()
        self._lanes.submit(self._pass, tokens, times).result()
        return times

    def together(self, tokens: int, lanes: int) -> float:
        """Seconds that `lanes` passes take which start at the same moment."""
        start = time.perf_counter()
        for lane in [self._lanes.submit(self._pass, tokens, None) for _ in range(lanes)]:
            lane.result()
        return time.perf_counter() - start

    def update(self) -> float:
        """Seconds of clipping and one optimiser step on the gradients of the last pass."""
        start = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        return time.perf_counter() - start

    def close(self) -> None:
        """End the session and the threads."""
        self._here.post(CloseWanted())
        self._closed.wait(10.0)
        for side in (self._here, self._there):
            side.stop()
        self._lanes.shutdown()

    # --- a lane -----------------------------------------------------------------------------

    def _pass(self, tokens: int, times: PassTimes | None) -> None:
        self._lane.times, self._lane.left_at = times, time.perf_counter()
        ids = torch.randint(0, self._vocabulary, (1, tokens))
        loss = token_losses(self._model, ids) / tokens
        gradients = torch.autograd.grad(loss, self.parameters)
        loss.item()
        if times is not None:
            times.local += time.perf_counter() - self._lane.left_at
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def linear(self, matrix: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the model's remote linears call."""
        asked_at = time.perf_counter()
        future: Future[NDArray[np.float32]] = Future()
        with self._asking:
            if self._failure is not None:
                raise self._failure
            self._calls += 1
            call = self._calls
            self._waiting[call], self._marks[call] = future, []
            self._here.post(LinearWanted(call, matrix, len(x), x))
        y = future.result()
        sent_at, answered_at = self._marks.pop(call)
        now = time.perf_counter()
        times: PassTimes | None = self._lane.times
        if times is not None:
            times.local += asked_at - self._lane.left_at
            phases = (sent_at - asked_at, answered_at - sent_at, now - answered_at)
            times.linears.append((matrix, *phases))
            self._lane.left_at = now
        return y

    # --- the driver's part ------------------------------------------------------------------

    def _arrived(self, frame: bytes, side: _Side, sender: str) -> None:
        if call := call_of(frame):
            self._marks[call].append(time.perf_counter())
        side.post(FrameArrived(sender, frame))

    def _secret_task(self, task: Task) -> object:
        if isinstance(task, Encrypt):
            assert isinstance(task.x, np.ndarray)
            encrypted = self._cipher.encrypt(task.x, self._matrices[task.matrix])
            return encrypted.payload.data, encrypted.sealed
        assert isinstance(task, Decrypt)
        sealed: Any = task.sealed
        matrix = self._matrices[task.matrix]
        return self._cipher.decrypt(sealed, task.payload, matrix, task.worker)

    def _multiply(self, task: Task) -> object:
        assert isinstance(task, MultiplyCiphertext)
        answer = self._worker.multiply(task.payload, task.tokens, self._loaded[task.matrix])
        return answer.data

    def _report(self, effect: Effect | Exception) -> None:
        match effect:
            case Deliver(call, result):
                assert isinstance(result, np.ndarray)
                self._waiting.pop(call).set_result(result)
            case Closed():
                self._closed.set()
            case Discard():
                sealed: Any = effect.sealed
                self._cipher.discard(sealed)
            case _:
                with self._asking:
                    self._failure = RehearsalError(f"the rehearsal failed: {effect}")
                    for future in self._waiting.values():
                        future.set_exception(self._failure)
                    self._waiting.clear()


def _matrix(
    name: str, weight: NDArray[np.int8], forward: bool, hint: NDArray[np.int32], plan: MatrixPlan
) -> OwnerMatrix:
    """What the owner knows of a matrix, its results scaled to the size of the inputs."""
    outputs, inputs = weight.shape if forward else reversed(weight.shape)
    return OwnerMatrix(
        f"{name} {'forward' if forward else 'backward'}",
        np.ones(inputs, np.float32),
        np.full(outputs, 1 / plan.max_norm, np.float32),
        plan,
        hint,
    )


@contextmanager
def rehearsal(config: PretrainedConfig, parameters: Parameters, lanes: int) -> Iterator[Rehearsal]:
    """A rehearsal that is closed at the end of the `with`."""
    rehearsed = Rehearsal(config, parameters, lanes)
    try:
        with rehearsed.remote.connected(rehearsed.linear):
            yield rehearsed
    finally:
        rehearsed.close()
