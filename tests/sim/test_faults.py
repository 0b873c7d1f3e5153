"""Faults: drawn from a seed alone, stopped in time, and each what its name says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.messages import Hello, Multiply, decode, encode
from sim.faults import (
    LIES,
    FaultPlan,
    FaultyWire,
    Liar,
    Lies,
    Window,
    corrupted,
    draw_plan,
)

WORKERS = ("w0", "w1", "w2")
CALM = FaultPlan(stop_s=10.0, latency_s=(0.1, 0.2), delay_s=(1.0, 2.0))
FRAME = encode(Multiply(b"s" * 16, 7, 1, 2, bytes(range(64))))


def plans(count: int) -> list[FaultPlan]:
    """Plans of the first seeds."""
    return [draw_plan(random.Random(seed), WORKERS, steps=4) for seed in range(count)]


def carry(plan: FaultPlan, frames: int = 400, start_s: float = 0.0) -> tuple[FaultyWire, Counter]:
    """Send numbered frames to w0, one every 10 ms; counts what arrived."""
    env = simpy.Environment(initial_time=start_s)
    arrived: Counter[bytes] = Counter()
    wire = FaultyWire(
        env, plan, random.Random(1), "owner", lambda source, target, frame: arrived.update([frame])
    )
    for number in range(frames):
        event = env.timeout(number / 100)
        event.callbacks.append(
            lambda _, n=number: wire.send("owner", "w0", FRAME + n.to_bytes(4, "little"))
        )
    env.run()
    return wire, arrived


def test_a_plan_is_its_seed() -> None:
    """The same generator gives the same plan, another one another."""
    assert plans(20) == plans(20)
    assert len({str(plan) for plan in plans(20)}) == 20


def test_plans_leave_one_honest_worker_and_stop_in_time() -> None:
    """For many seeds, and every kind of fault is drawn by some and left out by others."""
    drawn: Counter[str] = Counter()
    many = plans(300)
    for plan in many:
        assert len({liar.worker for liar in plan.liars}) == len(plan.liars) < len(WORKERS)
        windows = (*plan.partitions, *plan.one_way, *plan.slow)
        assert all(w.start_s <= w.end_s <= plan.stop_s for w in windows)
        moments = (*plan.worker_crashes, *plan.connections_lost, *plan.jumps)
        assert all(moment.at_s <= plan.stop_s for moment in moments)
        assert all(at <= plan.stop_s for at in plan.crashes_s)
        drawn.update(name for name, value in vars(plan).items() if value not in (0.0, (), False))
        drawn.update(liar.way for liar in plan.liars)
    optional = {
        "drop", "duplicate", "reorder", "corrupt", "delay", "twice", "failed", "busy",
        "partitions", "one_way", "slow", "worker_crashes", "connections_lost", "jumps", "liars",
        "crashes_s", "crash_steps", "torn_checkpoint", *LIES,
    }  # fmt: skip
    assert all(0 < drawn[name] < len(many) for name in optional)


def test_a_plan_is_told_in_one_line() -> None:
    """And names the faults that are on, only."""
    text = str(replace(CALM, drop=0.25, liars=(Liar("w1", "zeros", 0.5),)))
    assert "\n" not in text
    assert "drop=0.25" in text
    assert "w1/zeros/0.5" in text
    assert "corrupt" not in text


def test_a_calm_wire_carries_everything_once() -> None:
    """Without faults nothing is lost, doubled or changed."""
    wire, arrived = carry(CALM)
    assert len(arrived) == 400
    assert set(arrived.values()) == {1}
    assert not wire.injected


def test_drop_and_duplicate() -> None:
    """As many frames are missing or double as were counted."""
    wire, arrived = carry(replace(CALM, drop=0.3))
    assert len(arrived) == 400 - wire.injected["drop"]
    assert 60 < wire.injected["drop"] < 180
    wire, arrived = carry(replace(CALM, duplicate=0.3))
    assert sum(arrived.values()) == 400 + wire.injected["duplicate"]
    assert 60 < wire.injected["duplicate"] < 180


@pytest.mark.parametrize("kind", ["drop", "duplicate", "corrupt", "reorder", "delay"])
def test_faults_stop(kind: str) -> None:
    """After `stop_s` a wire is calm, whatever its rates."""
    wire, arrived = carry(replace(CALM, **{kind: 1.0}), start_s=10.0)
    assert not wire.injected
    assert set(arrived.values()) == {1}


def test_delay_and_reorder_let_frames_overtake() -> None:
    """Frames arrive in another order than they were sent in; none is lost."""
    for plan in (replace(CALM, delay=0.2), replace(CALM, reorder=0.5)):
        env = simpy.Environment()
        order: list[int] = []
        wire = FaultyWire(
            env, plan, random.Random(2), "owner",
            lambda source, target, frame, order=order: order.append(frame[0]),
        )  # fmt: skip
        for number in range(100):
            wire.send("owner", "w0", bytes([number]))
        env.run()
        assert sorted(order) == list(range(100))
        assert order != sorted(order)


def test_a_partition_stops_both_ways_and_heals() -> None:
    """Frames of the window are gone, to and from that worker and no other."""
    plan = replace(CALM, partitions=(Window("w0", 1.0, 2.0),), one_way=(Window("w1", 1.0, 2.0),))
    env = simpy.Environment()
    arrived: Counter[tuple[str, str]] = Counter()
    wire = FaultyWire(
        env, plan, random.Random(3), "owner",
        lambda source, target, frame: arrived.update([(source, target)]),
    )  # fmt: skip
    for at in (0.5, 1.5, 2.5):
        for worker in WORKERS:
            for pair in (("owner", worker), (worker, "owner")):
                event = env.timeout(at)
                event.callbacks.append(lambda _, pair=pair: wire.send(*pair, FRAME))
    env.run()
    assert arrived["owner", "w0"] == arrived["w0", "owner"] == 2
    assert arrived["owner", "w1"] == 2
    assert arrived["w1", "owner"] == 3
    assert arrived["owner", "w2"] == arrived["w2", "owner"] == 3


@settings(max_examples=300)
@given(st.integers(0, 1 << 32), st.booleans())
def test_a_corrupt_frame_is_seen_to_be_one(seed: int, hello: bool) -> None:
    """It differs, and is refused, of another session, or of a kind with another layout."""
    frame = encode(Hello(b"s" * 16, b"p" * 32, b"m" * 32)) if hello else FRAME
    spoilt = corrupted(random.Random(seed), frame)
    assert spoilt != frame
    try:
        message = decode(spoilt)
    except ProtocolError:
        return
    assert message.session != b"s" * 16 or type(message) is not type(decode(frame))


@pytest.mark.parametrize("way", LIES)
def test_lies_are_of_the_right_size_and_in_the_end_wrong(way: str) -> None:
    """Each way of lying gives another product than the honest one, once it has one to take."""
    lies = Lies(
        Liar("w0", way, 1.0), random.Random(4), lambda way, matrix, product: b"!" + product[1:]
    )
    honest = [bytes([n]) * 8 for n in range(1, 6)]
    told = [lies.tell(0, product) for product in honest]
    assert all(len(lie) == 8 for lie in told)
    assert all(lie != product for lie, product in list(zip(told, honest, strict=True))[1:])
    if way == "stale product":
        assert set(told[1:]) == {honest[0]}
    if way == "another request's product":
        assert told[1:] == honest[:-1]
