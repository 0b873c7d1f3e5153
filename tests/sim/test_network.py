"""How frames share links, how long they take, which way they go."""

from __future__ import annotations

import math
import random
from typing import Any
from unittest.mock import patch

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import network
from sim.flows import MATHIS, MSS_BYTES, Link
from sim.topologies import star
from tests.sim.slow_network import (
    FAST,
    SLOW,
    Change,
    Frame,
    World,
    apply,
    cable,
    cap_bps,
    cases,
    chain,
    fair_rates,
    frames_on,
    graphs,
    hops_of,
    reference,
)

# --- sharing --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**9), st.floats(1e3, 1e12), st.floats(0, 10))
def test_a_lone_frame_takes_transmission_and_delay(
    size_bytes: int, bandwidth_bps: float, delay_s: float
) -> None:
    """size * 8 / bandwidth + delay."""
    world = World(cable(Link(bandwidth_bps, delay_s)))
    world.send("frame", "a", "b", size_bytes)
    expected = size_bytes * 8 / bandwidth_bps + delay_s
    assert world.run()["frame"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_path_is_as_fast_as_its_narrowest_link() -> None:
    """Delays of a path add up, bandwidths do not."""
    world = World(chain(FAST, SLOW, FAST))
    world.send("frame", "a", "d", 1_000_000)
    assert world.run()["frame"] == pytest.approx(1 + 0.012, rel=1e-12)


def test_two_frames_share_a_link() -> None:
    """Half the rate while both are there: 1 MB alone for 0.5 s, then shared."""
    world = World(cable(SLOW))
    world.send("first", "a", "b", 1_000_000)
    world.send("second", "a", "b", 1_000_000, at_s=0.5)
    world.run()
    assert world.arrived_s["first"] == pytest.approx(1.5 + 0.010)
    assert world.arrived_s["second"] == pytest.approx(2.0 + 0.010)


def test_directions_do_not_interfere() -> None:
    """Full duplex: there and back at once, each as if alone."""
    world = World(cable(SLOW))
    world.send("there", "a", "b", 1_000_000)
    world.send("back", "b", "a", 500_000)
    world.run()
    assert world.arrived_s["there"] == pytest.approx(1 + 0.010)
    assert world.arrived_s["back"] == pytest.approx(0.5 + 0.010)


def test_what_one_frame_cannot_use_goes_to_the_others() -> None:
    """Max-min: a flow held back elsewhere leaves the rest of a shared link to its rivals."""
    graph = star(["slow", "fast"], ["worker"], FAST, Link(80e6, 0))
    graph.edges["slow", "internet"]["link"] = Link(8e6, 0)
    world = World(graph)
    world.send("slow", "slow", "worker", 10_000_000)
    world.send("fast", "fast", "worker", 10_000_000)
    world.env.run(until=0.1)
    assert world.network.rates_bps() == [
        ("slow", "worker", pytest.approx(8e6)),
        ("fast", "worker", pytest.approx(72e6)),
    ]


def test_256_flows_on_one_link() -> None:
    """As many owners at one site: each gets its share, whether or not their sizes are equal."""
    owners = [f"owner{i}" for i in range(256)]
    world = World(star(owners, ["worker"], FAST, Link(256e6, 0)))
    for owner in owners:
        world.send(owner, owner, "worker", 125_000)
    assert list(world.run().values()) == [pytest.approx(1 + FAST.delay_s)] * 256

    world = World(star(owners, ["worker"], FAST, Link(256e6, 0)))
    for i, owner in enumerate(owners):
        world.send(owner, owner, "worker", 1000 * (i + 1))
    world.run()
    assert list(world.arrived_s) == owners
    # The link was never idle, so the last one leaves when all bytes are through.
    whole_s = 8 * 1000 * 256 * 257 / 2 / 256e6
    assert world.arrived_s["owner255"] == pytest.approx(whole_s + FAST.delay_s)


def test_a_frame_costs_few_events() -> None:
    """One to arrive, and hardly more than two to watch it: none breeds others."""
    rng = random.Random(1)
    owners = [f"owner{i}" for i in range(8)]
    world = World(star(owners, ["worker"], Link(16e6, 0), Link(32e6, 0)))
    for i in range(400):
        world.send(str(i), owners[i % 8], "worker", rng.randrange(1, 40_000), at_s=i * 0.005)
    steps = 0
    while world.env.peek() < math.inf:
        world.env.step()
        steps += 1
    assert len(world.arrived_s) == 400
    assert steps <= 400 * (1 + 1 + 2.5)


CROWDS = st.sampled_from([2, network.CROWD])


def crowds_of(routes: int) -> Any:
    """Routes share one rate from so few on, where nothing else holds them back."""
    return patch.object(network, "CROWD", routes)


def test_a_site_with_many_owners_is_shared_in_a_crowd() -> None:
    """As one by one: 60 owners, frames of all sizes that come and go, on one full line."""

    def arrivals(crowd: int) -> tuple[dict[str, float], int]:
        rng, most = random.Random(5), 0
        owners = [f"owner{i}" for i in range(60)]
        world = World(star(owners, ["worker"], Link(16e6, 0.001), Link(32e6, 0)))
        for i in range(300):
            size = rng.randrange(1, 40_000)
            world.send(str(i), owners[rng.randrange(60)], "worker", size, at_s=rng.random())
        with crowds_of(crowd):
            while world.env.peek() < math.inf:
                world.env.step()
                most = max([most, *(len(c.pipe.routes) for c in world.network._crowds)])
        return world.arrived_s, most

    one_by_one, none = arrivals(1000)
    crowded, most = arrivals(network.CROWD)
    assert none == 0
    assert most > network.CROWD
    assert crowded == pytest.approx(one_by_one, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rates_are_max_min_fair(data: st.DataObject) -> None:
    """The exact reference's rates; no link over capacity; nobody could have more for free."""
    graph = data.draw(graphs())
    frames = data.draw(frames_on(graph, together=True))
    world = World(graph)
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, 10**9)
    with crowds_of(data.draw(CROWDS)):
        world.env.run(until=0.01)
    got = sorted(world.network.rates_bps())
    pairs = sorted((frame.source, frame.target) for frame in frames)
    assert [(source, target) for source, target, _ in got] == pairs

    capacity = {}
    for a, b, link in graph.edges(data="link"):
        capacity[a, b] = capacity[b, a] = link.bandwidth_bps
    flows = [(hops_of(graph, *pair), cap_bps(graph, hops_of(graph, *pair))) for pair in pairs]
    rates = [rate for *_, rate in got]
    assert rates == pytest.approx(fair_rates(flows, capacity), rel=1e-9)

    on = {e: [r for r, (way, _) in zip(rates, flows, strict=True) if e in way] for e in capacity}
    assert all(sum(on[edge]) <= capacity[edge] * (1 + 1e-9) for edge in capacity)
    for rate, (way, cap) in zip(rates, flows, strict=True):
        full = [e for e in way if sum(on[e]) >= capacity[e] * (1 - 1e-9)]
        assert rate >= cap * (1 - 1e-9) or any(rate >= max(on[e]) * (1 - 1e-9) for e in full)


@settings(max_examples=150, deadline=None)
@given(cases(), CROWDS)
def test_arrivals_are_those_of_the_reference(
    case: tuple[networkx.Graph, list[Frame], list[Change]], crowd: int
) -> None:
    """Also while links change, are cut and healed; every byte sent is a byte delivered, once."""
    graph, frames, changes = case
    world = World(graph)
    for change in changes:
        world.at(change.at_s, lambda change=change: apply(world, change))
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, frame.size_bytes, frame.at_s)
    with crowds_of(crowd):
        world.run()
    expected = reference(graph, frames, changes)
    got = [world.arrived_s.get(str(i), math.inf) for i in range(len(frames))]
    assert got == pytest.approx(expected, rel=1e-6)

    assert world.network.bytes_sent == sum(frame.size_bytes for frame in frames)
    if math.inf not in expected:
        carried = dict.fromkeys(world.network.moved_bytes, 0)
        for frame in frames:
            for hop in hops_of(graph, frame.source, frame.target):
                carried[hop] += frame.size_bytes
        assert world.network.moved_bytes == carried
        assert world.network.rates_bps() == []


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.01, 1.5), CROWDS)
def test_bytes_under_way_are_counted(
    case: tuple[networkx.Graph, list[Frame], list[Change]], until_s: float, crowd: int
) -> None:
    """At any moment no link has carried more than it could, and a path's links carry alike."""
    graph, frames, _ = case
    world = World(graph)
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, frame.size_bytes, frame.at_s)
    with crowds_of(crowd):
        world.env.run(until=until_s)
        moved = world.network.moved_bytes
        for (a, b), size_bytes in moved.items():
            most = graph.edges[a, b]["link"].bandwidth_bps / 8 * until_s
            assert 0 <= size_bytes <= most * (1 + 1e-9) + 1e-6
        world.env.run(until=until_s + 0.001)
        after = world.network.moved_bytes
        assert all(after[edge] >= moved[edge] for edge in moved)
        for rate in world.network.rates_bps():
            assert rate[2] > 0


def test_progress_of_one_frame() -> None:
    """A quarter of the time, a quarter of the bytes, on every link of the way and no other."""
    world = World(chain(SLOW, FAST, FAST))
    world.send("frame", "a", "c", 1_000_000)
    world.env.run(until=0.25)
    moved = world.network.moved_bytes
    assert moved.pop(("a", "b")) == pytest.approx(250_000)
    assert moved.pop(("b", "c")) == pytest.approx(250_000)
    assert set(moved.values()) == {0.0}


# --- routes, delay, jitter, loss ------------------------------------------------------------


def test_the_route_is_the_one_of_least_delay() -> None:
    """Not the one of fewest hops; round trips are there and back over it."""
    graph = chain(Link(8e6, 0.001), Link(8e6, 0.002))
    graph.add_edge("a", "c", link=Link(8e9, 0.5))
    world = World(graph)
    world.send("frame", "a", "c", 1_000_000)
    assert world.run()["frame"] == pytest.approx(1.003)
    assert world.network.round_trip_s("a", "c") == pytest.approx(0.006)
    assert world.network.round_trip_s("c", "a") == pytest.approx(0.006)
    assert world.network.round_trip_s("b", "b") == 0


def test_a_frame_to_oneself_takes_no_time_but_comes_later() -> None:
    """Through an event, so a sender is never called back inside `send`; no link carries it."""
    world = World(cable(SLOW))
    seen: list[str] = []
    world.network.send("a", "a", 10**9, lambda: seen.append("arrived"))
    assert seen == []
    world.env.run()
    assert (seen, world.env.now) == (["arrived"], 0)
    assert world.network.bytes_sent == 0
    assert set(world.network.moved_bytes.values()) == {0.0}


def test_jitter_delays_every_frame_by_itself() -> None:
    """Never early; late by the links' mean on average; small frames overtake each other."""
    jittery = Link(8e9, 0.010, jitter_s=0.004)
    world = World(chain(jittery, jittery), seed=5)
    for i in range(2000):
        world.send(str(i), "a", "c", 0, at_s=i * 0.001)
    arrived = world.run()
    late = [arrived[str(i)] - i * 0.001 - 0.020 for i in range(2000)]
    assert min(late) >= -1e-12
    assert sum(late) / 2000 == pytest.approx(0.008, rel=0.1)
    assert list(arrived) != sorted(arrived, key=int)


def test_loss_caps_one_flow_and_not_the_link() -> None:
    """Mathis et al.: MSS * 8 * 1.22 / (RTT * sqrt(loss)) each; ten flows get ten times as much."""
    lossy = Link(1e9, 0.050, loss=0.0001)
    world = World(cable(lossy))
    size = 1_000_000
    for i in range(10):
        world.send(str(i), "a", "b", size)
    rate = MATHIS * MSS_BYTES * 8 / (0.1 * 0.01)
    assert rate == pytest.approx(14.2e6, rel=0.01)
    assert list(world.run().values()) == [pytest.approx(size * 8 / rate + 0.050)] * 10
