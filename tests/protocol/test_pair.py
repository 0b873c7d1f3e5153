"""A real owner and real workers over a network that does its worst.

Hypothesis plays network, clock and processors: it reorders, drops, duplicates, truncates and
corrupts frames, fires timers, ends or fails tasks, crashes workers and breaks connections.
Whatever it does, the owner's promises hold; and once it stops, every call ends.

Frames are corrupted in the header only: integrity of what is inside is the transport's (TLS) and
the owner's check of the product, not the machines'.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from protocol.events import (
    Abort,
    CancelTimer,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Send,
    SetTimer,
    Start,
    Task,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import HEADER_BYTES, Multiply, decode
from protocol.owner import Owner, OwnerConfig
from protocol.owner_tables import CallState, State
from protocol.worker import Worker, WorkerConfig
from tests.protocol import toys

OWNER = "owner"
STEPS_MAX = 5_000
picks = st.integers(0, 1 << 16)
values = st.lists(st.integers(0, toys.MODULUS - 1), min_size=1, max_size=3)


class Pair(RuleBasedStateMachine):
    """The driver of all machines at once: lists instead of sockets, threads and clocks."""

    @initialize(
        names=st.sampled_from([("w1",), ("w1", "w2")]),
        window=st.integers(1, 3),
        attempts_max=st.integers(2, 8),
        max_in_flight=st.integers(1, 3),
        calm=st.sampled_from([0, 4, 4, 4]),
    )
    def begin(
        self,
        names: tuple[str, ...],
        window: int,
        attempts_max: int,
        max_in_flight: int,
        calm: int = 0,
    ) -> None:
        """Everyone starts; most runs let the first greeting through, to get to the calls."""
        self.window = window
        self.worker_config = WorkerConfig(max_in_flight=max_in_flight)
        self.owner = Owner(
            toys.SESSION,
            toys.CATALOGUE,
            names,
            OwnerConfig(1.0, 4.0, 16.0, attempts_max, window),
        )
        self.workers = {name: Worker(toys.CATALOGUE, self.worker_config) for name in names}
        self.wire: list[tuple[str, str, bytes]] = []
        self.tasks: list[tuple[str, int, Task]] = []
        self.timers: dict[str, float] = {}
        self.now = 0.0
        self.asked: dict[int, tuple[int, list[int]]] = {}
        self.encryptions: Counter[int] = Counter()
        self.frames: defaultdict[int, set[bytes]] = defaultdict(set)
        self.sent_to: dict[int, str] = {}
        self.ended: Counter[int] = Counter()
        self.excused: set[int] = set()
        self.aborted = False
        self.closing = False
        self.closed = 0
        self.owner_does(Start())
        self.calm(calm)

    # --- the driver ---------------------------------------------------------------------------

    def owner_does(self, event: Event) -> None:
        """One event for the owner, and its effects, checked as they come."""
        for effect in self.owner.handle(event, self.now):
            self.interpret(effect)

    def interpret(self, effect: Effect) -> None:
        """What a driver of the owner does."""
        match effect:
            case Send(peer, frame):
                message = decode(frame)
                if isinstance(message, Multiply):
                    self.frames[message.request].add(frame)
                    self.sent_to[message.request] = peer
                self.wire.append((OWNER, peer, frame))
            case RunTask(task, work):
                self.encryptions[task] += isinstance(work, Encrypt)
                self.tasks.append((OWNER, task, work))
            case SetTimer(timer, delay_s):
                self.timers[timer] = self.now + delay_s
            case CancelTimer(timer):
                self.timers.pop(timer, None)
            case Deliver(call, result):
                self.ended[call] += 1
                assert result == toys.clear(*self.asked[call])
            case FailCall(call, reason):
                self.ended[call] += 1
                assert reason
                assert call in self.excused or self.closing or self.owner_is_alone()
            case Abort(reason):
                assert reason
                assert not self.aborted
                assert self.owner_is_alone()
                self.aborted = True
            case Closed():
                self.closed += 1
            case Dropped():
                pass

    def owner_is_alone(self) -> bool:
        """No worker is left that could ever serve."""
        return all(self.owner.state(name) is State.LOST for name in self.workers)

    def worker_does(self, name: str, event: Event) -> None:
        """One event for a worker, and its effects."""
        for effect in self.workers[name].handle(event, self.now):
            match effect:
                case Send(peer, frame):
                    self.wire.append((name, peer, frame))
                case RunTask(task, work):
                    self.tasks.append((name, task, work))
                case _:
                    assert isinstance(effect, Dropped)

    def arrive(self, source: str, target: str, frame: bytes) -> None:
        """A frame reaches its machine."""
        event = FrameArrived(source, frame)
        if target == OWNER:
            self.owner_does(event)
        else:
            self.worker_does(target, event)

    def compute(self, task: int, work: Task) -> object:
        """Really compute, in toy."""
        match work:
            case Encrypt(_, _, x):
                assert isinstance(x, list)
                return toys.encrypt(x, serial=task)
            case MultiplyCiphertext():
                return toys.multiply(work)
            case Decrypt():
                return toys.decrypt(work)

    def end_task(self, index: int, fails: bool) -> None:
        """A task leaves the pool."""
        where, task, work = self.tasks.pop(index)
        event = TaskFailed(task, "toy") if fails else TaskDone(task, self.compute(task, work))
        if where == OWNER:
            self.excused.update({task} if fails else ())
            self.owner_does(event)
        else:
            self.worker_does(where, event)

    def fire(self, timer: str) -> None:
        """A timer runs out; the clock never goes back."""
        self.now = max(self.now, self.timers.pop(timer))
        self.owner_does(TimerFired(timer))

    # --- what may happen ------------------------------------------------------------------------

    @rule(matrix=st.integers(0, 1), xs=st.lists(values, min_size=1, max_size=3))
    def ask(self, matrix: int, xs: list[list[int]]) -> None:
        """Some lanes meet a remote linear."""
        for x in xs:
            call = len(self.asked) + 1
            self.asked[call] = (matrix, x)
            self.owner_does(LinearWanted(call, matrix, len(x), x))

    @rule(steps=st.integers(1, 12))
    def calm(self, steps: int) -> None:
        """For a while all is well: frames arrive in order and tasks end."""
        for _ in range(steps):
            if self.wire:
                self.arrive(*self.wire.pop(0))
            elif self.tasks:
                self.end_task(0, fails=False)

    @precondition(lambda self: self.wire)
    @rule(pick=picks)
    def deliver_out_of_order(self, pick: int) -> None:
        """Any frame arrives before its turn."""
        self.arrive(*self.wire.pop(pick % len(self.wire)))

    @precondition(lambda self: self.wire)
    @rule(pick=picks)
    def drop(self, pick: int) -> None:
        """A frame is lost."""
        self.wire.pop(pick % len(self.wire))

    @precondition(lambda self: self.wire)
    @rule(pick=picks)
    def duplicate(self, pick: int) -> None:
        """A frame will arrive twice."""
        self.wire.append(self.wire[pick % len(self.wire)])

    @precondition(lambda self: self.wire)
    @rule(pick=picks, at=st.integers(0, HEADER_BYTES - 1), flip=st.integers(1, 255))
    def corrupt(self, pick: int, at: int, flip: int) -> None:
        """A byte of a header changes on the way."""
        index = pick % len(self.wire)
        source, target, frame = self.wire[index]
        spoilt = bytearray(frame)
        if at < len(spoilt):
            spoilt[at] ^= flip
        self.wire[index] = (source, target, bytes(spoilt))

    @precondition(lambda self: self.wire)
    @rule(pick=picks, cut=picks)
    def truncate(self, pick: int, cut: int) -> None:
        """A frame loses its end."""
        index = pick % len(self.wire)
        source, target, frame = self.wire[index]
        self.wire[index] = (source, target, frame[: cut % max(1, len(frame))])

    @precondition(lambda self: self.timers)
    @rule(pick=picks)
    def time_passes(self, pick: int) -> None:
        """Any timer fires, as clocks and delays may have it."""
        self.fire(sorted(self.timers)[pick % len(self.timers)])

    @precondition(lambda self: self.tasks)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        """A task ends well."""
        self.end_task(pick % len(self.tasks), fails=False)

    @precondition(lambda self: self.tasks)
    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        """A task raises."""
        self.end_task(pick % len(self.tasks), fails=True)

    @rule(pick=picks)
    def crash(self, pick: int) -> None:
        """A worker restarts with an empty memory; its address stays."""
        name = sorted(self.workers)[pick % len(self.workers)]
        self.workers[name] = Worker(toys.CATALOGUE, self.worker_config)
        self.tasks = [task for task in self.tasks if task[0] != name]

    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        """A worker sees its connection break, the owner does not."""
        self.worker_does(sorted(self.workers)[pick % len(self.workers)], PeerLost(OWNER))

    @precondition(lambda self: len(self.workers) > 1)
    @rule(at=st.integers(0, 20))
    def disconnect(self, at: int) -> None:
        """Rarely, a connection is gone for good."""
        if at == 20:
            self.owner_does(PeerLost("w1"))
            self.worker_does("w1", PeerLost(OWNER))

    @rule(at=st.integers(0, 30))
    def close(self, at: int) -> None:
        """Rarely, the owner closes in the middle of everything."""
        if at == 30:
            self.closing = True
            self.owner_does(CloseWanted())

    # --- what holds throughout --------------------------------------------------------------------

    @invariant()
    def a_call_ends_once_and_is_encrypted_once(self) -> None:
        """One secret per call; one result or one failure per lane that waits."""
        assert all(count == 1 for count in self.encryptions.values())
        assert all(count == 1 for count in self.ended.values())

    @invariant()
    def a_request_never_changes(self) -> None:
        """Every frame of a call, to whichever worker and however often, is the same bytes."""
        assert all(len(frames) == 1 for frames in self.frames.values())

    @invariant()
    def every_wait_has_a_timer_and_every_timer_a_wait(self) -> None:
        """Timers run for calls in flight and for sessions that open or close, and no others."""
        waiting = {
            f"call:{call}"
            for call in self.asked
            if self.owner.call_state(call) is CallState.IN_FLIGHT
        }
        waiting |= {
            f"session:{name}"
            for name in self.workers
            if self.owner.state(name) in (State.GREETING, State.CLOSING)
        }
        assert set(self.timers) == waiting

    @invariant()
    def the_window_holds(self) -> None:
        """No worker has more requests in flight than the window."""
        load = Counter(
            self.sent_to[call]
            for call in self.asked
            if self.owner.call_state(call) is CallState.IN_FLIGHT
        )
        assert all(count <= self.window for count in load.values())

    @invariant()
    def a_call_waits_or_has_ended(self) -> None:
        """No call is lost without a word."""
        for call in self.asked:
            assert (self.owner.call_state(call) is CallState.DONE) == (self.ended[call] == 1)

    @invariant()
    def closed_comes_once_and_only_when_asked_for(self) -> None:
        """And not before the last session has ended."""
        assert self.closed <= self.closing

    # --- what holds in the end --------------------------------------------------------------------

    def settle(self) -> None:
        """Faults stop: frames arrive in order, tasks end well, timers fire when due."""
        for _ in range(STEPS_MAX):
            if self.wire:
                self.arrive(*self.wire.pop(0))
            elif self.tasks:
                self.end_task(0, fails=False)
            elif self.timers:
                self.fire(min(self.timers, key=lambda timer: (self.timers[timer], timer)))
            else:
                return
        raise AssertionError(f"still busy after {STEPS_MAX} steps without a fault")

    def teardown(self) -> None:
        """Every call ends, in failure only with an excuse; and a close ends every session."""
        if not hasattr(self, "owner"):
            return
        self.settle()
        assert set(self.ended) == set(self.asked)
        self.closing = True
        self.owner_does(CloseWanted())
        self.settle()
        self.owner_does(CloseWanted())
        assert self.closed == 1
        assert not self.timers


TestPair = Pair.TestCase
TestPair.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_without_faults_every_call_is_delivered() -> None:
    """The plain run of the same harness: right values, one request each, nothing dropped."""
    pair = Pair()
    pair.begin(("w1", "w2"), window=2, attempts_max=2, max_in_flight=2)
    for number in range(20):
        pair.ask(number % 2, [[number, number + 1]])
    pair.settle()
    assert pair.ended == Counter(range(1, 21))
    assert pair.now == 0.0
    assert set(pair.sent_to.values()) == {"w1", "w2"}
    pair.teardown()


def test_the_harness_would_notice_a_wrong_value() -> None:
    """The checker itself: a product computed wrongly makes it fail."""
    pair = Pair()
    pair.begin(("w1",), window=1, attempts_max=2, max_in_flight=1)
    pair.ask(0, [[1]])
    pair.compute = lambda task, work: (  # type: ignore[method-assign]
        bytes(8) if isinstance(work, MultiplyCiphertext) else Pair.compute(pair, task, work)
    )
    with pytest.raises(AssertionError):
        pair.settle()
