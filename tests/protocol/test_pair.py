"""A real owner and real workers over a network that does its worst.

Hypothesis plays network, clock, processors and workers of bad character: it reorders, drops,
duplicates, truncates and corrupts frames, fires timers, ends or fails tasks, lies, refuses,
crashes workers and the owner, and breaks connections. Whatever it does, the owner's promises
hold; and once it stops, every call ends.

Frames are corrupted in the header only: integrity of what is inside is the transport's (TLS), and
a worker's own lies are found by the check of the product.
"""

from __future__ import annotations

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

from protocol.events import PeerLost
from protocol.messages import HEADER_BYTES
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.placement import Placement
from tests.protocol import toys
from tests.protocol.pair import OWNER, World

THREE = ("w1", "w2", "w3")
picks = st.integers(0, 1 << 16)
values = st.lists(st.integers(0, toys.MODULUS - 1), min_size=1, max_size=3)
# Bit i: worker i holds the matrix. Most runs let everyone hold everything.
placed = st.just((7, 7)) | st.tuples(st.integers(1, 7), st.integers(1, 7))


def config(window: int = 2, attempts_max: int = 2, refusals_max: int = 4) -> OwnerConfig:
    """Waits that fit each other; their length means nothing here."""
    return OwnerConfig(
        1.0, 4.0, 16.0, attempts_max, 0.5, refusals_max, 20.0, window, window_bytes=60,
        quiet_s=2.0, greetings_max=attempts_max, slow_bytes_per_s=20.0,
    )  # fmt: skip


class Pair(RuleBasedStateMachine):
    """What may happen, one rule each; the harness carries it out and checks it."""

    @initialize(
        count=st.sampled_from([2, 3, 2, 1]),
        holds=placed,
        window=st.integers(1, 3),
        attempts_max=st.integers(1, 5),
        refusals_max=st.integers(1, 6),
        max_in_flight=st.integers(1, 3),
        calm=st.sampled_from([6, 6, 6, 0]),
    )
    def begin(
        self,
        count: int,
        holds: tuple[int, int],
        window: int,
        attempts_max: int,
        refusals_max: int,
        max_in_flight: int,
        calm: int,
    ) -> None:
        """Everyone starts; most runs let the first greeting through, to get to the calls."""
        names = THREE[:count]
        where = tuple(
            tuple(name for bit, name in enumerate(names) if mask >> bit & 1) or names
            for mask in holds
        )
        settings_drawn = config(window, attempts_max, refusals_max)
        self.world = World(names, settings_drawn, max_in_flight, Placement(where))
        self.world.calm(calm)

    def name(self, pick: int) -> str:
        """Any worker."""
        return self.world.names[pick % len(self.world.names)]

    def lies(self) -> list[int]:
        """Tasks that may end with a lie."""
        return [i for i, task in enumerate(self.world.tasks) if task[0] in self.world.liars]

    # --- lanes, and things going well -----------------------------------------------------------

    @rule(matrix=st.integers(0, 1), xs=st.lists(values, min_size=1, max_size=3))
    def ask(self, matrix: int, xs: list[list[int]]) -> None:
        """Some lanes meet a remote linear."""
        for x in xs:
            self.world.ask(matrix, x)

    @rule(matrix=st.integers(0, 1), x=values, steps=st.integers(1, 6))
    def ask_and_wait(self, matrix: int, x: list[int], steps: int) -> None:
        """A lane meets a remote linear, and something comes of it."""
        self.world.ask(matrix, x)
        self.world.calm(steps)

    @rule(steps=st.integers(1, 20))
    def calm(self, steps: int) -> None:
        """For a while all is well."""
        self.world.calm(steps)

    @precondition(lambda self: self.world.tasks)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        """Any task ends well."""
        self.world.end_task(pick % len(self.world.tasks))

    # --- the network ------------------------------------------------------------------------------

    @precondition(lambda self: self.world.wire)
    @rule(pick=picks)
    def deliver_out_of_order(self, pick: int) -> None:
        """Any frame arrives before its turn."""
        self.world.arrive(pick % len(self.world.wire))

    @precondition(lambda self: self.world.wire)
    @rule(pick=picks)
    def drop(self, pick: int) -> None:
        """A frame is lost."""
        self.world.wire.pop(pick % len(self.world.wire))

    @precondition(lambda self: self.world.wire)
    @rule(pick=picks)
    def duplicate(self, pick: int) -> None:
        """A frame will arrive twice."""
        self.world.wire.append(self.world.wire[pick % len(self.world.wire)])

    @precondition(lambda self: self.world.wire)
    @rule(pick=picks, at=st.integers(0, HEADER_BYTES - 1), flip=st.integers(1, 255))
    def corrupt(self, pick: int, at: int, flip: int) -> None:
        """A byte of a header changes on the way."""
        index = pick % len(self.world.wire)
        source, target, frame = self.world.wire[index]
        spoilt = bytearray(frame)
        if at < len(spoilt):
            spoilt[at] ^= flip
        self.world.wire[index] = (source, target, bytes(spoilt))

    @precondition(lambda self: self.world.wire)
    @rule(pick=picks, cut=picks)
    def truncate(self, pick: int, cut: int) -> None:
        """A frame loses its end."""
        index = pick % len(self.world.wire)
        source, target, frame = self.world.wire[index]
        self.world.wire[index] = (source, target, frame[: cut % max(1, len(frame))])

    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        """A worker sees its connection break, the owner does not."""
        self.world.worker_does(self.name(pick), PeerLost(OWNER))

    @rule(pick=picks)
    def disconnect(self, pick: int) -> None:
        """A connection breaks."""
        self.world.disconnect(self.name(pick))

    @rule(pick=picks, at=st.integers(0, 8))
    def give_up(self, pick: int, at: int) -> None:
        """Rarely, one breaks for good."""
        if at == 5:
            self.world.give_up(self.name(pick))

    # --- time -------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.timers)
    @rule()
    def tick(self) -> None:
        """Time passes, and the timer that is due first fires."""
        self.world.tick()

    @precondition(lambda self: self.world.timers)
    @rule(pick=picks)
    def fire_early(self, pick: int) -> None:
        """A clock jumps, and any timer fires."""
        self.world.fire(sorted(self.world.timers)[pick % len(self.world.timers)])

    # --- workers ----------------------------------------------------------------------------------

    @precondition(lambda self: self.lies())
    @rule(pick=picks, flip=picks, steps=st.sampled_from([3, 0, 1]))
    def lie(self, pick: int, flip: int, steps: int) -> None:
        """A worker that is not the honest one answers with something else."""
        lies = self.lies()
        self.world.lie(lies[pick % len(lies)], flip)
        self.world.calm(steps)

    @precondition(lambda self: self.world.in_flight() and self.world.liars)
    @rule(flip=picks)
    def lie_soon(self, flip: int) -> None:
        """All goes well until a liar has something to answer."""
        for _ in range(12):
            if self.lies():
                self.lie(0, flip, 3)
                return
            self.world.calm(1)

    @precondition(lambda self: self.world.requests_on_the_wire())
    @rule(pick=picks)
    def refuse(self, pick: int) -> None:
        """A worker is busy."""
        found = self.world.requests_on_the_wire()
        self.world.refuse(found[pick % len(found)])

    @precondition(lambda self: self.world.tasks)
    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        """A task raises, on either side."""
        self.world.fail_task(pick % len(self.world.tasks))

    @rule(pick=picks)
    def crash_worker(self, pick: int) -> None:
        """A worker restarts with an empty memory."""
        self.world.crash_worker(self.name(pick))

    # --- the owner --------------------------------------------------------------------------------

    @rule(at=st.integers(0, 8))
    def crash_owner(self, at: int) -> None:
        """Rarely, the owner restarts; its frames and the answers to them are still on the wire."""
        if at == 5:
            self.world.begin_life()

    @precondition(lambda self: self.world.life.aborted or self.world.life.closed)
    @rule()
    def restart_owner(self) -> None:
        """When it has given up or has closed, somebody starts it again."""
        self.world.begin_life()

    @rule(at=st.integers(0, 30))
    def close(self, at: int) -> None:
        """Rarely, the owner closes in the middle of everything."""
        if at == 17:
            self.world.close()

    @invariant()
    def promises_hold(self) -> None:
        """See World.check; what concerns one effect is checked as the effect comes."""
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """See World.finish."""
        if hasattr(self, "world"):
            self.world.finish()


TestPair = Pair.TestCase
TestPair.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- the harness itself ---------------------------------------------------------------------------


def test_without_faults_every_call_is_delivered() -> None:
    """The plain run of the same harness: right values, one request each, nothing dropped."""
    world = World(("w1", "w2"), config(), max_in_flight=2)
    for number in range(20):
        world.ask(number % 2, [number, number + 1])
    world.settle()
    assert world.life.delivered == dict.fromkeys(range(1, 21), 1)
    assert world.now == 0.0
    assert set(world.life.sent_to.values()) == {"w1", "w2"}
    world.finish()


def test_a_liar_is_retired_and_everything_still_delivered() -> None:
    """The plain run with a worker that answers nothing but lies."""
    world = World(("w1", "w2"), config(), max_in_flight=2)
    for number in range(8):
        world.ask(0, [number])
    while world.wire or world.tasks:
        if world.wire:
            world.arrive(0)
        elif world.tasks[0][0] == "w1":
            world.lie(0, flip=7)
        else:
            world.end_task(0)
        world.check()
    assert world.life.retired == {"w1"}
    assert world.life.delivered == dict.fromkeys(range(1, 9), 1)
    world.finish()


def test_answers_to_an_owner_that_crashed_are_dropped() -> None:
    """The next one uses the same numbers for other calls; nothing of the old life reaches it."""
    world = World(("w1",), config(), max_in_flight=4)
    world.calm(2)
    world.ask(0, [1])
    world.ask(0, [2])
    world.calm(4)
    world.end_task(0)
    world.end_task(0)
    # Encrypted, sent, multiplied: both answers are on their way when the owner crashes.
    assert [target for _, target, _ in world.wire] == [OWNER] * 2
    world.begin_life()
    world.ask(0, [3])
    world.settle()
    assert world.stale == 2
    assert world.life.delivered == {1: 1}
    world.finish()


def test_the_harness_would_notice_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: with the toy's check off, a product computed wrongly makes it fail."""
    world = World(("w1",), config(window=1), max_in_flight=1)
    world.ask(0, [1])
    monkeypatch.setattr(toys, "multiply", lambda work: bytes(8))
    monkeypatch.setattr(toys, "decrypt", lambda work: (12345,))
    with pytest.raises(AssertionError):
        world.settle()


def test_the_harness_would_notice_an_honest_worker_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: a lie of the worker that never lies makes it fail."""
    world = World(("w1", "w2"), config(window=1), max_in_flight=1)
    world.disconnect("w1")
    world.ask(0, [1])
    monkeypatch.setattr(toys, "multiply", lambda work: bytes(8))
    with pytest.raises(AssertionError, match="an honest worker was retired"):
        world.settle()


@pytest.mark.parametrize("state", [State.LOST, State.RETIRED])
def test_the_harness_reaches(state: State) -> None:
    """The rules lead where the promises are hard to keep; shown here in a few steps."""
    world = World(("w1", "w2"), config(attempts_max=1), max_in_flight=2)
    world.calm(4)
    world.ask(0, [1])
    world.end_task(0)
    if state is State.LOST:
        world.tick()
    else:
        world.arrive(0)
        world.lie(0, flip=0)
        world.calm(2)
    assert world.life.owner.state("w1") is state
    world.check()
    world.finish()
