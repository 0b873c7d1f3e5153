"""Which worker gets the next request, and how long its answer is waited for."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.catalogue import Catalogue, MatrixShape
from protocol.events import (
    Deliver,
    Event,
    FailCall,
    FrameArrived,
    LinearWanted,
    RunTask,
    Send,
    SetTimer,
    Start,
    TaskDone,
    TimerFired,
)
from protocol.fleet import Fleet, Load
from protocol.messages import MAX_BODY_BYTES, OVERHEAD_BYTES, Product, Reason, Welcome, encode
from protocol.owner import Owner
from protocol.owner_memory import Call, OwnerConfig, Peer
from protocol.owner_tables import State
from protocol.pace import Pace
from protocol.placement import Placement
from tests.protocol.toys import MODEL, PARAMETERS, SESSION, OwnerDesk, all_of, one, requests

THREE = ("w1", "w2", "w3")
TWO = THREE[:2]
drawn_workers = st.tuples(
    st.integers(0, 4), st.integers(0, 5), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 4.0])
)


@settings(deadline=None)
@given(st.lists(drawn_workers, min_size=3, max_size=3), st.integers(1, 4), st.integers(1, 300))
def test_who_should_answer_first_is_chosen(
    drawn: list[tuple[int, int, int, float]], window: int, window_bytes: int
) -> None:
    """With room for a request, its bytes and its tokens; reluctance weighs; first of equals.

    A pace of 0 stands for a worker that has not answered yet.
    """
    peers, found = {}, {}
    for name, (requested, reluctance, tokens, pace) in zip(THREE, drawn, strict=True):
        peers[name] = Peer(name, State.READY, max_tokens=tokens, reluctance=reluctance)
        found[name] = Load(requested, 50 * requested)
        if pace:
            peers[name].pace.observe(100 * pace, 100)
    config = OwnerConfig(window=window, window_bytes=window_bytes)
    fleet = Fleet(peers, {}, Placement.everywhere(THREE, 1), config)
    fastest = min([pace for *_, pace in drawn if pace], default=1.0)
    times = {}
    for name, (requested, reluctance, tokens, pace) in zip(THREE, drawn, strict=True):
        fits = requested == 0 or 50 * requested + 100 <= window_bytes
        if tokens >= 2 and requested < window and fits:
            slower = pace / fastest if pace / fastest >= 4.0 else 1.0
            times[name] = slower * (50 * requested + 100) * (1 + reluctance)
    first = min(times, key=lambda name: times[name], default=None)
    assert fleet.choose(Call(1, 0, 2, 100), found) == first
    assert fleet.choose(Call(1, 0, 2, 100), found, but=THREE) is None


# --- what is in flight is bounded in bytes --------------------------------------------------------


def test_bytes_in_flight_are_bounded_per_worker() -> None:
    """12 bytes a token and call here: two small calls fit, a third waits for an answer."""
    desk = OwnerDesk(config=OwnerConfig(window_bytes=24)).open()
    assert [requests(desk.ask(call)) for call in (1, 2, 3)] == [[("w1", 1)], [("w1", 2)], []]
    assert requests(desk.product(1)) == [("w1", 3)]


def test_a_request_larger_than_the_window_goes_alone() -> None:
    """Or it would never go."""
    desk = OwnerDesk(config=OwnerConfig(window_bytes=1)).open()
    assert requests(desk.ask(1, x=(1, 2, 3))) == [("w1", 1)]
    assert requests(desk.ask(2)) == []


def test_what_no_frame_can_hold_fails_before_it_is_encrypted() -> None:
    """A remote head of a large vocabulary reaches 1 GiB; the text says what would fit."""
    wide = MatrixShape("head", 2, 2, up_bytes_per_block=5, down_bytes_per_block=1 << 20)
    owner = Owner(SESSION, Catalogue(MODEL, PARAMETERS, (wide,)), ("w1",))
    most = (MAX_BODY_BYTES - OVERHEAD_BYTES) >> 20
    assert isinstance(owner.handle(LinearWanted(1, 0, most, ()), 0.0)[0], RunTask)
    (failed,) = owner.handle(LinearWanted(2, 0, most + 1, ()), 0.0)
    assert isinstance(failed, FailCall)
    assert str(most) in failed.reason


# --- silence --------------------------------------------------------------------------------------


def test_after_a_silence_the_same_bytes_go_to_another_holder() -> None:
    """At once, and the worker that was silent gets less from then on; its late answer is late."""
    desk = OwnerDesk(TWO).open()
    first = one(desk.ask(1), Send)
    effects = desk.fire("call:1")
    assert one(effects, Send) == Send("w2", first.frame)
    assert desk.owner.state("w1") is State.READY
    assert not all_of(desk.product(1, peer="w1"), RunTask)
    desk.product(1, peer="w2")
    desk.do(TaskDone(1, "value"))
    # A silence and no request of w1 weigh as much as one request of w2.
    asked = [requests(desk.ask(call))[0][0] for call in (2, 3, 4)]
    assert asked == ["w2", "w1", "w2"]


def test_without_another_it_is_asked_again() -> None:
    """Nobody else holds the matrix, or whoever does has no room."""
    for desk in (
        OwnerDesk(placement=None),
        OwnerDesk(TWO, placement=Placement((("w1",), ("w2",)))),
        OwnerDesk(TWO, OwnerConfig(window=1)),
    ):
        desk.open().ask(1)
        desk.ask(2, matrix=1)
        assert requests(desk.fire("call:1")) == [("w1", 1)]


def test_silences_in_a_row_lose_a_worker_and_an_answer_forgives_them() -> None:
    """Eight lanes find out together: it takes one wait, not one for each attempt of each call."""
    config = OwnerConfig(attempts_max=3)
    for answers in (False, True):
        desk = OwnerDesk(TWO, config).open()
        for call in range(1, 9):
            desk.ask(call)
        theirs = [1, 3, 5, 7]
        for call in theirs[:2]:
            assert requests(desk.fire(f"call:{call}")) == [("w2", call)]
        if answers:
            desk.product(7, peer="w1")
        effects = desk.fire("call:5")
        assert (desk.owner.state("w1") is State.LOST) is not answers
        assert ("w2", 5) in requests(effects)


def test_a_wait_after_a_refusal_is_no_silence() -> None:
    """The worker has just spoken."""
    for names in (TWO[:1], TWO):
        desk = OwnerDesk(names).open()
        desk.ask(1)
        peer = "w1"
        for _ in range(8):
            for effects in (desk.refuse(Reason.BUSY, peer=peer), desk.fire("call:1")):
                peer = ([peer] + [name for name, _ in requests(effects)])[-1]
                if requests(effects):
                    break
        assert {desk.owner.state(name) for name in names} == {State.READY}


def test_who_refuses_often_is_asked_less_and_an_answer_forgives_half() -> None:
    """BUSY that sends calls elsewhere weighs like bytes; it loses nobody."""
    desk = OwnerDesk(TWO).open()
    for call in (1, 2):
        assert requests(desk.ask(call)) == [("w1", call)]
        assert requests(desk.refuse(Reason.BUSY, call)) == [("w2", call)]
        desk.product(call, peer="w2")
        desk.do(TaskDone(call, "value"))
        desk.owner._peers["w2"].pace = Pace()
        if call == 1:
            desk.owner._peers["w1"].reluctance = 0
    assert desk.owner._peers["w1"].reluctance == 1
    assert requests(desk.ask(3)) == [("w2", 3)]
    assert requests(desk.ask(4)) == [("w1", 4)], "two of w2's, and one of a reluctant w1"
    desk.product(4)
    assert desk.owner._peers["w1"].reluctance == 0


# --- patience -------------------------------------------------------------------------------------

UP, DOWN = 10_000, 20_000
WIDE = Catalogue(MODEL, PARAMETERS, (MatrixShape("m", 1, 1, UP, DOWN),))


class Timed:
    """An owner of a one-matrix model, with a clock that the test moves."""

    def __init__(self, *names: str, config: OwnerConfig | None = None) -> None:
        self.owner = Owner(SESSION, WIDE, names, config)
        self.now = 100.0
        self.do(Start())
        for name in names:
            self.hear(name, Welcome(SESSION, PARAMETERS, MODEL, 4096))

    def do(self, event: Event) -> list[object]:
        """One event now."""
        return list(self.owner.handle(event, self.now))

    def hear(self, name: str, message: Welcome | Product) -> list[object]:
        """A message of a worker, now."""
        return self.do(FrameArrived(name, encode(message)))

    def ask(self, call: int) -> tuple[str, float]:
        """(who was asked, how long its answer is waited for)."""
        self.do(LinearWanted(call, 0, 1, ()))
        sent, timer = self.do(TaskDone(call, (bytes(UP), "sealed")))
        assert isinstance(sent, Send)
        assert isinstance(timer, SetTimer)
        return sent.peer, timer.delay_s

    def answer(self, call: int, name: str, after_s: float) -> None:
        """It comes so much later."""
        self.now += after_s
        self.hear(name, Product(SESSION, call, bytes(DOWN)))
        (delivered,) = self.do(TaskDone(call, "value"))
        assert isinstance(delivered, Deliver)


def test_before_any_answer_the_line_is_taken_for_a_slow_one() -> None:
    """Each request waits for those before it as well."""
    config = OwnerConfig(request_timeout_s=60.0, slow_bytes_per_s=1000.0, window=3)
    line = Timed("w1", config=config)
    assert [line.ask(call)[1] for call in (1, 2, 3)] == [90.0, 120.0, 150.0]


def test_the_wait_follows_the_line() -> None:
    """A thousand times slower: so is the patience, and nothing is sent twice; nor too patient."""
    for seconds in (0.01, 10.0):
        line = Timed("w1")
        for call in range(1, 30):
            line.ask(call)
            line.answer(call, "w1", seconds)
        waits = [line.ask(call)[1] for call in range(30, 38)]
        steps = [b - a for a, b in pairwise(waits)]
        assert waits[0] == pytest.approx(15.0 + seconds, rel=0.01)
        assert steps == pytest.approx([seconds] * 7, rel=0.01)


def test_answers_to_a_queue_tell_the_time_of_each() -> None:
    """Eight sent at once and answered one by one, one second each: a second is what one takes."""
    line = Timed("w1")
    for call in range(1, 9):
        line.ask(call)
    for call in range(1, 9):
        line.answer(call, "w1", 1.0)
    assert line.owner._peers["w1"].pace.mean_s * (UP + DOWN) == pytest.approx(1.0)


def test_a_line_that_has_become_slow_is_learned() -> None:
    """An answer to a call that was sent twice is timed from the first sending: then once is enough.

    Were it left out (Karn's rule), every call would start again with the old wait.
    """
    line, call = Timed("w1"), 0
    for _ in range(20):
        line.ask(call := call + 1)
        line.answer(call, "w1", 1.0)
    sendings = []
    for _ in range(6):
        _, wait_s = line.ask(call := call + 1)
        sent, left_s = 1, 120.0
        while wait_s < left_s:
            line.now += wait_s
            left_s -= wait_s
            again, timer = line.do(TimerFired(f"call:{call}"))
            assert isinstance(again, Send)
            assert isinstance(timer, SetTimer)
            sent, wait_s = sent + 1, timer.delay_s
        line.answer(call, "w1", left_s)
        sendings.append(sent)
    assert sendings[0] > 1
    assert sendings[-3:] == [1, 1, 1]


def test_one_that_is_always_slow_is_not_waited_for_without_end() -> None:
    """Answers just inside the wait make it no longer than a few of the other's."""
    line = Timed("w1", "w2")
    call, slow = 2, 0
    assert (line.ask(1)[0], line.ask(2)[0]) == ("w1", "w2")
    line.answer(1, "w1", 14.0)
    line.answer(2, "w2", 0.1)
    line.owner._peers["w2"].pace = Pace(0.1 / (UP + DOWN), 0.0, seen=True)
    for _ in range(60):
        name, wait_s = line.ask(call := call + 1)
        line.answer(call, name, 0.1 if name == "w2" else 0.9 * wait_s)
        slow += name == "w1"
    assert slow <= 2, "it is asked when there is nobody quicker with room"
    line.owner._peers["w2"].max_tokens = 0
    name, wait_s = line.ask(call + 1)
    assert name == "w1"
    assert wait_s < 15.0 + 8 * 0.2


def test_a_clock_that_runs_back_does_no_harm() -> None:
    """Contrary to what a driver promises; chaos does it. Every wait is still a wait."""
    line = Timed("w1")
    for call in range(1, 9):
        assert line.ask(call)[1] > 0
        line.answer(call, "w1", -30.0 if call % 2 else 20.0)
    assert line.owner._peers["w1"].pace.mean_s >= 0


def test_a_new_worker_is_taken_for_as_slow_as_the_slowest_known() -> None:
    """Until it has answered itself, with the patience of a first answer."""
    config = OwnerConfig(request_timeout_s=60.0)
    line = Timed("w1", "w2", config=config)
    assert line.ask(1)[0] == "w1"
    line.answer(1, "w1", 3.0)
    line.ask(2)
    name, wait_s = line.ask(3)
    assert name == "w2"
    assert wait_s == pytest.approx(60.0 + 3.0 + 4 * 1.5)


def test_waits_stay_finite_however_often() -> None:
    """Doubled a thousand times and more, as for a worker that stays away for weeks."""
    config = OwnerConfig()
    assert config.revived_s(5_000) == config.revive_s_max
    assert config.doubled(1.0, 5_000) == config.timeout_s_max


def test_no_wait_is_longer_than_the_longest() -> None:
    """However slow the line, and however often."""
    line = Timed("w1", config=OwnerConfig(wait_s_max=100.0, slow_bytes_per_s=1.0))
    assert line.ask(1)[1] == 100.0


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=50), st.integers(1, 1 << 30))
def test_a_pace_lies_among_what_was_seen(samples: list[float], size: int) -> None:
    """The mean never leaves the samples, and no wait is shorter than the mean."""
    pace = Pace()
    for sample in samples:
        pace.observe(sample * size, size)
    assert min(samples) * 0.999 <= pace.mean_s <= max(samples) * 1.001
    assert pace.seconds(size) >= pace.mean_s * size
    assert Pace(1 / inf).seconds(size) == 0.0
