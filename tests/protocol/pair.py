"""A real owner and real workers, with lists in place of sockets, threads and clocks.

The harness of test_pair.py: it drives all machines at once, carries out their effects, and checks
each as it comes. It shares no code with the machines but the encoding of frames.

The last worker is honest; the others may lie. The owner may crash and start anew: then a new life
begins, under a new session, while frames of the old one are still on the wire.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.admission import Quota
from protocol.errors import ProtocolError
from protocol.events import (
    Abort,
    AnswerRejected,
    CancelTimer,
    Closed,
    CloseWanted,
    Deliver,
    Discard,
    Disconnected,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    PeerLost,
    Retired,
    RunTask,
    Send,
    SetTimer,
    Start,
    Task,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import Multiply, Reason, Refuse, decode, encode
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import CallState, State
from protocol.placement import Placement
from protocol.worker import Worker, WorkerConfig
from tests.protocol import toys

OWNER = "owner"
STEPS_MAX = 5_000
IDLE = (State.CLOSED, State.LOST, State.REVIVING, State.RETIRED)
TIMED = (State.GREETING, State.CLOSING, State.LOST, State.REVIVING)


@dataclass
class Life:
    """One incarnation of the owner, and what it has done so far."""

    owner: Owner
    session: bytes
    asked: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    encryptions: Counter[int] = field(default_factory=Counter)
    frames: defaultdict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    sent_to: dict[int, str] = field(default_factory=dict)
    delivered: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)
    timeouts: Counter[int] = field(default_factory=Counter)
    refusals: Counter[int] = field(default_factory=Counter)
    excused: set[int] = field(default_factory=set)
    sealed: dict[int, object] = field(default_factory=dict)
    discarded: Counter[int] = field(default_factory=Counter)
    retired: set[str] = field(default_factory=set)
    aborted: bool = False
    closing: bool = False
    closed: int = 0


class World:
    """Owner, workers and everything between them; the caller decides what happens next."""

    def __init__(
        self,
        names: Sequence[str],
        config: OwnerConfig,
        max_in_flight: int,
        placement: Placement | None = None,
    ) -> None:
        self.names = tuple(names)
        self.config = config
        self.placement = placement or Placement.everywhere(self.names, len(toys.CATALOGUE.matrices))
        self.worker_config = WorkerConfig(quota=Quota(requests=max_in_flight))
        self.workers = {name: Worker(toys.CATALOGUE, self.worker_config) for name in names}
        self.wire: list[tuple[str, str, bytes]] = []
        self.tasks: list[tuple[str, int, Task]] = []
        self.timers: dict[str, float] = {}
        self.now = 0.0
        self.lives = 0
        self.lies = 0
        self.stale = 0
        self.begin_life()

    def begin_life(self) -> None:
        """A fresh owner starts; nothing of an earlier one is left on its side."""
        self.lives += 1
        session = self.lives.to_bytes(16, "big")
        owner = Owner(session, toys.CATALOGUE, self.names, self.config, self.placement)
        self.life = Life(owner, session)
        self.timers.clear()
        self.tasks = [task for task in self.tasks if task[0] != OWNER]
        self.owner_does(Start())

    # --- the owner's driver ---------------------------------------------------------------------

    def owner_does(self, event: Event) -> list[Effect]:
        """One event for the owner, and its effects, checked as they come."""
        effects = self.life.owner.handle(event, self.now)
        for effect in effects:
            self._interpret(effect)
        return effects

    def _interpret(self, effect: Effect) -> None:
        life = self.life
        match effect:
            case Send(peer, frame):
                self._check_request(peer, frame)
                self.wire.append((OWNER, peer, frame))
            case RunTask(task, work):
                life.encryptions[task] += isinstance(work, Encrypt)
                self.tasks.append((OWNER, task, work))
            case SetTimer(timer, delay_s):
                self.timers[timer] = self.now + delay_s
            case CancelTimer(timer):
                self.timers.pop(timer, None)
            case Deliver(call, result):
                life.delivered[call] += 1
                assert result == toys.clear(*life.asked[call])
            case FailCall(call, reason):
                life.failed[call] += 1
                assert reason
                assert self._may_fail(call)
            case Discard(call, sealed):
                life.discarded[call] += 1
                assert sealed is life.sealed[call]
                assert not self.working_on(call), "secrets were wiped that a task works with"
            case Retired(peer, reason):
                assert reason
                assert peer != self.names[-1], "an honest worker was retired"
                assert peer not in life.retired
                life.retired.add(peer)
            case Abort(reason):
                assert reason
                assert not life.aborted
                assert self.nobody_serves()
                life.aborted = True
            case Closed():
                life.closed += 1
            case Dropped():
                pass

    def _check_request(self, peer: str, frame: bytes) -> None:
        message = decode(frame)
        assert message.session == self.life.session
        if isinstance(message, Multiply):
            assert peer not in self.life.retired
            assert peer in self.placement.where[message.matrix]
            self.life.frames[message.request].add(frame)
            self.life.sent_to[message.request] = peer

    def _may_fail(self, call: int) -> bool:
        life, often = self.life, self.config.refusals_max
        return (
            call in life.excused
            or life.closing
            or life.aborted
            or life.refusals[call] >= often
            or life.timeouts[call] >= often
            or self.nobody_serves()
        )

    def nobody_serves(self) -> bool:
        """Some matrix has no holder that answers, as far as the owner can know."""
        idle = {name for name in self.names if self.life.owner.state(name) in IDLE}
        return any(idle >= set(holders) for holders in self.placement.where)

    def in_flight(self) -> list[int]:
        """Calls that wait for an answer."""
        owner, asked = self.life.owner, self.life.asked
        return [call for call in asked if owner.call_state(call) is CallState.IN_FLIGHT]

    def working_on(self, call: int) -> bool:
        """Whether a task of the owner's has the secrets of a call in its hands."""
        return any(where == OWNER and task == call for where, task, _ in self.tasks)

    def timers_due(self) -> set[str]:
        """The timers that must run: one per wait, and after an abort only for goodbyes."""
        timed = (State.CLOSING,) if self.life.aborted else TIMED
        sessions = {n for n in self.names if self.life.owner.state(n) in timed}
        return {f"call:{c}" for c in self.in_flight()} | {f"session:{n}" for n in sessions}

    # --- the workers' drivers -------------------------------------------------------------------

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

    # --- what can happen ------------------------------------------------------------------------

    def ask(self, matrix: int, x: list[int]) -> None:
        """A lane meets a remote linear."""
        call = len(self.life.asked) + 1
        self.life.asked[call] = (matrix, x)
        self.owner_does(LinearWanted(call, matrix, len(x), x))

    def arrive(self, index: int) -> None:
        """A frame on the wire reaches its machine; one of an older life is dropped by the owner."""
        source, target, frame = self.wire.pop(index)
        event = FrameArrived(source, frame)
        if target != OWNER:
            self.worker_does(target, event)
            return
        self._count_refusal(frame)
        effects = self.owner_does(event)
        if frame[8:24] != self.life.session:
            self.stale += 1
            assert toys.is_dropped(effects), "a frame of another session had an effect"

    def _count_refusal(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ProtocolError:
            return
        if isinstance(message, Refuse) and message.reason in (Reason.BUSY, Reason.FAILED):
            self.life.refusals[message.request] += 1

    def end_task(self, index: int) -> None:
        """A task ends well; one that opens an answer may find it wrong."""
        where, task, work = self.tasks.pop(index)
        end = toys.compute(task, work)
        if isinstance(work, Encrypt) and isinstance(end, TaskDone):
            assert isinstance(end.result, tuple)
            self.life.sealed[task] = end.result[1]
        self._report(where, end)

    def fail_task(self, index: int) -> None:
        """A task raises."""
        where, task, _ = self.tasks.pop(index)
        if where == OWNER:
            self.life.excused.add(task)
        self._report(where, TaskFailed(task, "toy"))

    def lie(self, index: int, flip: int) -> None:
        """A worker's task ends with bytes that are not the product: flipped, or all zero."""
        where, task, work = self.tasks.pop(index)
        assert where in self.liars
        assert isinstance(work, MultiplyCiphertext)
        right = toys.multiply(work)
        at = flip % len(right)
        wrong = bytes(b ^ (1 + flip % 255) * (i == at) for i, b in enumerate(right))
        self.lies += 1
        self._report(where, TaskDone(task, wrong if flip else bytes(len(right))))

    def _report(self, where: str, event: Event) -> None:
        if where != OWNER:
            self.worker_does(where, event)
        elif isinstance(event, AnswerRejected):
            self._reject(event)
        else:
            self.owner_does(event)

    def _reject(self, event: AnswerRejected) -> None:
        pending = self.life.owner.call_state(event.task) is not CallState.DONE
        liar = self.life.sent_to[event.task]
        self.owner_does(event)
        assert self.life.owner.state(liar) is State.RETIRED or not pending

    @property
    def liars(self) -> tuple[str, ...]:
        """Workers that may lie: all but the last."""
        return self.names[:-1]

    def refuse(self, index: int) -> None:
        """A worker answers BUSY to a request on the wire, unread."""
        _, worker, frame = self.wire[index]
        message = decode(frame)
        assert isinstance(message, Multiply)
        refusal = Refuse(message.session, message.request, Reason.BUSY)
        self.wire[index] = (worker, OWNER, encode(refusal))

    def requests_on_the_wire(self) -> list[int]:
        """Where on the wire an unspoilt request is."""
        found = []
        for index, (_, target, frame) in enumerate(self.wire):
            try:
                if target != OWNER and isinstance(decode(frame), Multiply):
                    found.append(index)
            except ProtocolError:
                continue
        return found

    def fire(self, timer: str) -> None:
        """A timer runs out; the clock never goes back."""
        self.now = max(self.now, self.timers.pop(timer))
        if timer.startswith("call:"):
            self.life.timeouts[int(timer[5:])] += 1
        self.owner_does(TimerFired(timer))

    def tick(self) -> None:
        """Time passes until the next timer is due."""
        self.fire(min(self.timers, key=lambda timer: (self.timers[timer], timer)))

    def crash_worker(self, name: str) -> None:
        """A worker restarts with an empty memory; its address stays."""
        self.workers[name] = Worker(toys.CATALOGUE, self.worker_config)
        self.tasks = [task for task in self.tasks if task[0] != name]

    def disconnect(self, name: str) -> None:
        """A connection breaks; what was on it is gone. The next frame finds another."""
        self.wire = [frame for frame in self.wire if name not in frame[:2]]
        self.owner_does(Disconnected(name))
        self.worker_does(name, PeerLost(OWNER))

    def give_up(self, name: str) -> None:
        """The transport will open no other connection."""
        self.owner_does(PeerLost(name))
        self.worker_does(name, PeerLost(OWNER))

    def close(self) -> None:
        """The owner wants no more."""
        self.life.closing = True
        self.owner_does(CloseWanted())

    def calm(self, steps: int) -> None:
        """For a while all is well: frames arrive in order and tasks end."""
        for _ in range(steps):
            if self.wire:
                self.arrive(0)
            elif self.tasks:
                self.end_task(0)

    def settle(self) -> None:
        """Faults stop: frames arrive in order, tasks end well, timers fire when due."""
        for _ in range(STEPS_MAX):
            if self.wire:
                self.arrive(0)
            elif self.tasks:
                self.end_task(0)
            elif self.timers:
                self.tick()
            else:
                return
        raise AssertionError(f"still busy after {STEPS_MAX} steps without a fault")

    # --- what holds throughout --------------------------------------------------------------------

    def check(self) -> None:
        """Everything that must hold between two events."""
        life = self.life
        ended = life.delivered + life.failed
        # One secret per call; one result or one failure per lane that waits, and none forgotten.
        assert all(count == 1 for count in life.encryptions.values())
        assert all(count == 1 for count in ended.values())
        for call in life.asked:
            assert (life.owner.call_state(call) is CallState.DONE) == (ended[call] == 1)
        # Secrets are in use until their call ends; then they are wiped, by whoever has them.
        assert all(count == 1 for count in life.discarded.values())
        gone = {call for call in life.sealed if ended[call] and not self.working_on(call)}
        assert gone == {
            call for call in life.sealed if life.delivered[call] or life.discarded[call]
        }
        assert not [call for call in life.delivered if life.discarded[call]]
        # Every sending of a call, to whichever worker and however often, is the same bytes.
        assert all(len(frames) == 1 for frames in life.frames.values())
        assert set(self.timers) == self.timers_due()
        load = Counter(life.sent_to[call] for call in self.in_flight())
        assert all(count <= self.config.window for count in load.values())
        for name, count in load.items():
            theirs = [call for call in self.in_flight() if life.sent_to[call] == name]
            size = sum(12 * len(life.asked[call][1]) for call in theirs)
            assert count == 1 or size <= self.config.window_bytes
        assert not any(life.owner.state(name) is State.READY for name in life.retired)
        assert life.closed <= life.closing

    def finish(self) -> None:
        """Every call ends, one more is served unless nobody can, and a close ends it all."""
        self.settle()
        self.check()
        life = self.life
        assert set(life.delivered + life.failed) == set(life.asked)
        if not (life.aborted or life.closing):
            self.ask(0, [1, 2, 3])
            self.settle()
            assert life.delivered[len(life.asked)] == 1
        self.close()
        self.settle()
        self.close()
        assert life.closed == 1
        assert not self.timers
