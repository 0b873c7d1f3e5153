"""The same machines in both worlds: simulated time and real threads give the same history.

One owner, its workers and one lane run twice: by `sim.driver.Actor` on SimPy's clock with modelled
latencies, and by `backends.net.loop.MachineLoop` with threads on the real clock. Inputs and
scripted faults are the same; so must be, per actor, every event and every effect, in order.

Two things make the order of events a fact and not a race: there is one lane, and the network is a
bus that carries one question and its answer at a time.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from math import inf
from typing import Any, TypeAlias

import pytest
import simpy

from backends.net.loop import MachineLoop
from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    Closed,
    CloseWanted,
    Deliver,
    Effect,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    SetTimer,
    Start,
    Task,
    TaskDone,
    TaskFailed,
)
from protocol.messages import Multiply, Product, decode
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.worker import Worker
from sim.driver import Actor, TaskEnd
from tests.protocol import toys

OWNER = "owner"
PATIENT_S = 60.0
Post: TypeAlias = Callable[[str, Event], None]


@dataclass(frozen=True)
class Script:
    """Inputs and faults. Numbers of tasks and answers count from 1, per worker.

    calls         linears the lane asks for, one after the other
    lies, raises  tasks of a worker that end with wrong bytes, or not well
    lost          Products of a worker that the network loses
    forgets       calls before which a worker loses its memory
    """

    workers: tuple[str, ...] = ("w1", "w2")
    calls: int = 3
    config: OwnerConfig = field(
        default_factory=lambda: OwnerConfig(
            request_timeout_s=PATIENT_S, retry_s=0.02, slower_min=inf
        )
    )
    lies: Mapping[str, Sequence[int]] = field(default_factory=dict)
    raises: Mapping[str, Sequence[int]] = field(default_factory=dict)
    lost: Mapping[str, Sequence[int]] = field(default_factory=dict)
    forgets: Mapping[str, Sequence[int]] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """A value as it can be compared and read: names, numbers, and digests of bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        return sha256(value).hexdigest()[:12]
    if isinstance(value, SetTimer) and value.timer.startswith("call:"):
        # How long it waits for an answer follows from how long others took, in seconds.
        return ("SetTimer", value.timer)
    if is_dataclass(value):
        return (type(value).__name__, *(plain(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    return value


class Play:
    """What both worlds have in common: machines, a bus between them, a lane, and a history.

    post   hands an event to an actor, in whichever world
    carry  takes a frame across the network, then calls what it is given
    """

    def __init__(
        self, script: Script, post: Post, carry: Callable[[Callable[[], None]], None]
    ) -> None:
        self.script = script
        self.owner = Owner(toys.SESSION, toys.CATALOGUE, script.workers, script.config)
        self.machines: dict[str, Owner | Worker] = {OWNER: self.owner}
        self.machines |= {name: Worker(toys.CATALOGUE) for name in script.workers}
        self.history: dict[str, list[tuple[Any, ...]]] = {name: [] for name in self.machines}
        self.delivered: dict[int, object] = {}
        self.requests: list[tuple[str, bytes]] = []
        self.over = threading.Event()
        self._post = post
        self._carry = carry
        self._lock = threading.RLock()
        self._questions: deque[tuple[str, bytes]] = deque()
        self._asking = False
        self._products: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()
        self._calls = 0

    # --- what an actor is given -----------------------------------------------------------------

    def observe(self, name: str, event: Event, effects: Sequence[Effect]) -> None:
        """Record; and let the lane begin once every worker is ready."""
        self.history[name].append((plain(event), plain(effects)))
        if name == OWNER and not self._calls:
            ready = [self.owner.state(worker) is State.READY for worker in self.script.workers]
            if all(ready):
                self._next_call()

    def report(self, effect: Effect) -> None:
        """The lane asks again, or closes, when it has its answer."""
        match effect:
            case Deliver(call, result):
                self.delivered[call] = result
                self._next_call()
            case FailCall():
                self._next_call()
            case Closed():
                self.over.set()

    def compute(self, name: str, work: Task) -> object:
        """A task's result; a liar's is wrong, and some raise."""
        self._tasks[name] += 1
        number = self._tasks[name]
        if number in self.script.raises.get(name, ()):
            raise ValueError("a toy that broke")
        if isinstance(work, MultiplyCiphertext) and number in self.script.lies.get(name, ()):
            return bytes(len(toys.multiply(work)))
        return toys.result(work, number)

    def transmit(self, source: str, target: str, frame: bytes) -> None:
        """One question on the bus at a time; the next leaves when it was answered or lost."""
        with self._lock:
            if source == OWNER:
                if isinstance(decode(frame), Multiply):
                    self.requests.append((target, frame))
                self._questions.append((target, frame))
                self._ask()
            else:
                self._carry(lambda: self._answer(source, frame))

    # --- the bus and the lane -------------------------------------------------------------------

    def _ask(self) -> None:
        if self._asking or not self._questions:
            return
        self._asking = True
        target, frame = self._questions.popleft()
        self._carry(lambda: self._post(target, FrameArrived(OWNER, frame)))

    def _answer(self, source: str, frame: bytes) -> None:
        with self._lock:
            lost = False
            if isinstance(decode(frame), Product):
                self._products[source] += 1
                lost = self._products[source] in self.script.lost.get(source, ())
            if not lost:
                self._post(OWNER, FrameArrived(source, frame))
            self._asking = False
            self._ask()

    def _next_call(self) -> None:
        self._calls += 1
        if self._calls > self.script.calls:
            self._post(OWNER, CloseWanted())
            return
        for worker, before in self.script.forgets.items():
            if self._calls in before:
                self._post(worker, PeerLost(OWNER))
        x = (self._calls, 10 * self._calls)
        self._post(OWNER, LinearWanted(self._calls, self._calls % 2, len(x), x))


# --- the two worlds -------------------------------------------------------------------------------


def simulated(script: Script) -> Play:
    """On SimPy's clock: frames take 10 ms, tasks 2 ms."""
    env = simpy.Environment()
    actors: dict[str, Actor] = {}

    def after(delay_s: float, action: Callable[[], None]) -> None:
        env.timeout(delay_s).callbacks.append(lambda _: action())

    play = Play(
        script,
        post=lambda name, event: actors[name].post(event),
        carry=lambda arrived: after(0.010, arrived),
    )

    def actor(name: str) -> Actor:
        def end_of(run: RunTask) -> TaskEnd:
            try:
                return TaskDone(run.task, play.compute(name, run.work))
            except WrongAnswerError as error:
                return AnswerRejected(run.task, str(error))
            except ValueError as error:
                return TaskFailed(run.task, str(error))

        return Actor(
            env,
            name,
            play.machines[name],
            transmit=lambda peer, frame: play.transmit(name, peer, frame),
            perform=lambda run, done: after(0.002, lambda: done(end_of(run))),
            report=play.report,
            observe=lambda _name, _now, event, effects: play.observe(name, event, effects),
        )

    actors.update({name: actor(name) for name in play.machines})
    actors[OWNER].post(Start())
    env.run()
    assert play.over.is_set()
    return play


def real(script: Script) -> Play:
    """On the real clock: a loop and a pool of threads for each actor."""
    loops: dict[str, MachineLoop] = {}
    crashes: list[BaseException] = []
    play = Play(
        script,
        post=lambda name, event: loops[name].post(event),
        carry=lambda arrived: arrived(),
    )

    def crashed(error: BaseException) -> None:
        crashes.append(error)
        play.over.set()

    def loop(name: str) -> MachineLoop:
        return MachineLoop(
            name,
            play.machines[name],
            compute=lambda work: play.compute(name, work),
            transmit=lambda peer, frame: play.transmit(name, peer, frame),
            report=play.report,
            on_crash=crashed,
            observe=lambda event, effects: play.observe(name, event, effects),
        )

    loops.update({name: loop(name) for name in play.machines})
    for each in loops.values():
        each.start()
    loops[OWNER].post(Start())
    ended = play.over.wait(PATIENT_S)
    for each in loops.values():
        each.stop()
    assert not crashes
    assert ended
    return play


def in_both_worlds(script: Script) -> Play:
    """The history they have in common, which is all of it."""
    first, second = simulated(script), real(script)
    for name in first.machines:
        assert first.history[name] == second.history[name], name
    assert first.delivered == second.delivered
    assert first.requests == second.requests
    return first


# --- what happens in them -------------------------------------------------------------------------


def events(play: Play, kind: str, name: str = OWNER) -> list[Any]:
    """The events of a kind that an actor saw."""
    return [event for event, _ in play.history[name] if event[0] == kind]


def effects(play: Play, kind: str, name: str = OWNER) -> list[Any]:
    """The effects of a kind that an actor asked for."""
    return [effect for _, done in play.history[name] for effect in done if effect[0] == kind]


def test_without_faults() -> None:
    """Every call once, to the first worker, with the right result."""
    play = in_both_worlds(Script())
    assert [worker for worker, _ in play.requests] == ["w1"] * 3
    assert play.delivered == {n: toys.clear(n % 2, (n, 10 * n)) for n in (1, 2, 3)}
    assert len(effects(play, "Closed")) == 1


def test_a_lost_answer_is_waited_for_and_asked_again() -> None:
    """The timer fires once in both worlds, and the same bytes go out again."""
    config = OwnerConfig(request_timeout_s=1.0, slower_min=inf)
    play = in_both_worlds(Script(workers=("w1",), config=config, lost={"w1": [1]}))
    assert events(play, "TimerFired") == [("TimerFired", "call:1")]
    assert [worker for worker, _ in play.requests] == ["w1"] * 4
    assert play.requests[0] == play.requests[1]
    assert len(play.delivered) == 3


def test_a_silent_worker_is_lost_and_its_call_goes_elsewhere() -> None:
    """With one attempt per worker, the first lost answer is one too many."""
    config = OwnerConfig(
        request_timeout_s=1.0, attempts_max=1, hello_timeout_s=PATIENT_S, slower_min=inf
    )
    play = in_both_worlds(Script(config=config, lost={"w1": [1]}))
    assert [worker for worker, _ in play.requests] == ["w1", "w2", "w2", "w2"]
    assert ("SetTimer", "session:w1", config.revive_s) in effects(play, "SetTimer")
    assert len(play.delivered) == 3


def test_a_lying_worker_is_retired_and_its_call_goes_elsewhere() -> None:
    """Found out at its second answer; the same bytes go to the other, and all that follows."""
    play = in_both_worlds(Script(lies={"w1": [2]}))
    assert effects(play, "Retired") == [("Retired", "w1", "toy: not the product")]
    assert [worker for worker, _ in play.requests] == ["w1", "w1", "w2", "w2"]
    assert play.requests[1][1] == play.requests[2][1]
    assert play.delivered == {n: toys.clear(n % 2, (n, 10 * n)) for n in (1, 2, 3)}


def test_workers_that_all_lie_end_in_an_abort() -> None:
    """Both worlds give up with the same words."""
    play = in_both_worlds(Script(lies={"w1": [1], "w2": [1]}))
    ((_, reason),) = effects(play, "Abort")
    assert "'w1': toy" in reason
    assert not play.delivered


def test_a_worker_that_forgot_is_greeted_again() -> None:
    """Before the second call; the frame it refused is the frame it answers."""
    play = in_both_worlds(Script(workers=("w1",), forgets={"w1": [2]}))
    assert [worker for worker, _ in play.requests] == ["w1"] * 4
    assert play.requests[1] == play.requests[2]
    assert len(play.delivered) == 3


def test_tasks_that_fail_on_every_worker_are_tried_again_after_a_while() -> None:
    """One after the other at once, then the last one when the timer fires."""
    play = in_both_worlds(Script(raises={"w1": [1], "w2": [1]}))
    assert [worker for worker, _ in play.requests] == ["w1", "w2", "w1", "w1", "w1"]
    assert events(play, "TimerFired") == [("TimerFired", "call:1")]
    assert len(play.delivered) == 3


def test_a_failed_encryption_fails_its_call_only() -> None:
    """Tasks of the owner: encrypt and decrypt in turn, so its third belongs to call 2."""
    play = in_both_worlds(Script(raises={OWNER: [3]}))
    assert effects(play, "FailCall") == [("FailCall", 2, "a toy that broke")]
    assert sorted(play.delivered) == [1, 3]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_scripted(seed: int) -> None:
    """Three workers and a dozen calls, with faults that need no patience."""
    draw = random.Random(seed)
    workers = ("w1", "w2", "w3")

    def some(limit: int, share: float) -> list[int]:
        return [number for number in range(1, limit) if draw.random() < share]

    script = Script(
        workers=workers,
        calls=12,
        lies={name: some(12, 0.1) for name in workers[:2]},
        raises={name: some(12, 0.15) for name in (*workers, OWNER)},
        forgets={name: some(12, 0.2) for name in workers},
    )
    play = in_both_worlds(script)
    assert effects(play, "Closed")
    for call, result in play.delivered.items():
        assert result == toys.clear(call % 2, (call, 10 * call))


def test_a_difference_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a driver that reports another reason fails it."""
    monkeypatch.setattr(
        "backends.net.loop.AnswerRejected", lambda task, _: AnswerRejected(task, "something else")
    )
    with pytest.raises(AssertionError, match=OWNER):
        in_both_worlds(Script(lies={"w1": [1]}))
