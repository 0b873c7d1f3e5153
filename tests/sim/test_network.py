"""The network against a slow reference: every flow by itself, every rate by exact fractions."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import networkx
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.flows import MATHIS, MSS_BYTES
from sim.network import Link, Network, describe, star, two_sites

SLOW = Link(8e6, 0.010)  # a megabyte a second
FAST = Link(8e9, 0.001)
Edge = tuple[str, str]


@dataclass
class World:
    """A network, and when what was sent over it arrived."""

    graph: networkx.Graph
    seed: int = 0
    env: simpy.Environment = field(default_factory=simpy.Environment)
    arrived_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = Network(self.env, self.graph, random.Random(self.seed))

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        self.env.timeout(time_s).callbacks.append(lambda _: action())

    def send(self, name: str, source: str, target: str, size_bytes: int, at_s: float = 0) -> None:
        """Send a frame at a time and note when it arrives."""

        def arrived() -> None:
            assert name not in self.arrived_s
            self.arrived_s[name] = self.env.now

        self.at(at_s, lambda: self.network.send(source, target, size_bytes, arrived))

    def run(self) -> dict[str, float]:
        """When each frame arrived."""
        self.env.run()
        return self.arrived_s


def cable(link: Link) -> networkx.Graph:
    """Two hosts, one cable."""
    graph = networkx.Graph()
    graph.add_edge("a", "b", link=link)
    return graph


def chain(*links: Link) -> networkx.Graph:
    """Hosts a, b, c, ... in a row."""
    graph = networkx.Graph()
    for i, link in enumerate(links):
        graph.add_edge("abcdefgh"[i], "abcdefgh"[i + 1], link=link)
    return graph


# --- the reference --------------------------------------------------------------------------


def hops_of(graph: networkx.Graph, source: str, target: str) -> list[Edge]:
    """The path of least delay, by trying all."""
    paths = networkx.all_simple_paths(graph, source, target)
    return list(pairwise(min(paths, key=lambda p: sum(delays_of(graph, list(pairwise(p)))))))


def delays_of(graph: networkx.Graph, hops: list[Edge]) -> list[float]:
    """Delay of every hop, seconds."""
    return [graph.edges[hop]["link"].delay_s for hop in hops]


def cap_bps(graph: networkx.Graph, hops: list[Edge]) -> float:
    """What packet loss lets one flow have, bits/s."""
    lost = 1 - math.prod(1 - graph.edges[hop]["link"].loss for hop in hops)
    return 1.22 * 1460 * 8 / (2 * sum(delays_of(graph, hops)) * lost**0.5) if lost else math.inf


def fair_rates(
    flows: list[tuple[list[Edge], float]], capacity_bps: dict[Edge, float]
) -> list[float]:
    """Max-min fair bits/s of flows (hops, cap): all grow until a link is full or a cap reached."""
    rates = [Fraction(0)] * len(flows)
    growing = set(range(len(flows)))
    while growing:
        steps = [Fraction(flows[f][1]) - rates[f] for f in growing if flows[f][1] < math.inf]
        spare = {}
        for edge, capacity in capacity_bps.items():
            on_it = [f for f in range(len(flows)) if edge in flows[f][0]]
            spare[edge] = Fraction(capacity) - sum(rates[f] for f in on_it)
            if growing & set(on_it):
                steps.append(spare[edge] / len(growing & set(on_it)))
        step = min(steps)
        before = set(growing)
        for f in growing:
            rates[f] += step
        for edge in spare:
            on_it = [f for f in range(len(flows)) if edge in flows[f][0]]
            if sum(rates[f] for f in on_it) == Fraction(capacity_bps[edge]):
                growing = growing - set(on_it)
        growing = {f for f in growing if rates[f] != flows[f][1]}
        assert growing < before
    return [float(rate) for rate in rates]


@dataclass(frozen=True)
class Frame:
    """One frame of a drawn case."""

    source: str
    target: str
    size_bytes: int
    at_s: float


@dataclass(frozen=True)
class Change:
    """A link changes: to another bandwidth (bits/s), or it is cut (0)."""

    edge: Edge
    bandwidth_bps: float
    at_s: float


def reference(graph: networkx.Graph, frames: list[Frame], changes: list[Change]) -> list[float]:
    """When each frame arrives (infinity: never), one flow and one moment at a time."""
    hops = [hops_of(graph, frame.source, frame.target) for frame in frames]
    caps = [cap_bps(graph, way) for way in hops]
    capacity: dict[Edge, float] = {}
    for a, b, link in graph.edges(data="link"):
        capacity[a, b] = capacity[b, a] = link.bandwidth_bps
    left = [8.0 * frame.size_bytes for frame in frames]
    ends = [math.inf] * len(frames)
    moments = [*sorted({f.at_s for f in frames} | {c.at_s for c in changes}), math.inf]
    for now, until in pairwise(moments):
        for change in (c for c in changes if c.at_s == now):
            for edge in (change.edge, change.edge[::-1]):
                capacity[edge] = change.bandwidth_bps
        while now < until:
            running = [i for i, f in enumerate(frames) if f.at_s <= now and ends[i] == math.inf]
            rates = fair_rates([(hops[i], caps[i]) for i in running], capacity)
            spans = [left[i] / r if r else math.inf for i, r in zip(running, rates, strict=True)]
            span = min([until - now, *spans])
            if span == math.inf:
                break
            now += span
            for i, rate, own in zip(running, rates, spans, strict=True):
                left[i] = max(0.0, left[i] - rate * span)
                if own <= span * (1 + 1e-9):
                    ends[i] = now
    return [end + sum(delays_of(graph, way)) for end, way in zip(ends, hops, strict=True)]


@st.composite
def graphs(draw: st.DrawFn) -> networkx.Graph:
    """Up to six hosts, joined; delays differ by powers of two, so that no two paths are equal."""
    count = draw(st.integers(2, 6))
    edges = [(draw(st.integers(0, i - 1)), i) for i in range(1, count)]
    every = [(a, b) for b in range(count) for a in range(b)]
    edges += draw(st.lists(st.sampled_from(every), max_size=3))
    graph = networkx.Graph()
    for i, (a, b) in enumerate(dict.fromkeys(edges)):
        bandwidth = draw(st.sampled_from([1e6, 2e6, 3e6, 8e6, 100e6]))
        loss = draw(st.sampled_from([0.0, 0.0, 0.01, 0.2]))
        graph.add_edge(f"h{a}", f"h{b}", link=Link(bandwidth, 0.001 * 2**i, loss=loss))
    return graph


@st.composite
def frames_on(draw: st.DrawFn, graph: networkx.Graph, together: bool = False) -> list[Frame]:
    """Frames between its hosts, starting within a second or all at once."""
    pairs = [(a, b) for a in graph for b in graph if a != b]
    times = [0.0] if together else [0.0, 0.1, 0.25, 0.3, 0.7, 1.0]
    return [
        Frame(*draw(st.sampled_from(pairs)), draw(st.integers(0, 300_000)), at_s)
        for at_s in sorted(draw(st.lists(st.sampled_from(times), min_size=1, max_size=9)))
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[networkx.Graph, list[Frame], list[Change]]:
    """A network, frames on it, and links that change meanwhile."""
    graph = draw(graphs())
    edges = st.sampled_from(list(graph.edges))
    bandwidths = st.sampled_from([0.0, 1e6, 5e6])
    times = draw(st.lists(st.sampled_from([0.15, 0.4, 0.9]), unique=True, max_size=3))
    changes = [Change(draw(edges), draw(bandwidths), time) for time in sorted(times)]
    return graph, draw(frames_on(graph)), changes


def apply(world: World, change: Change) -> None:
    """Do to the network what a change says."""
    if not change.bandwidth_bps:
        world.network.cut(*change.edge)
        return
    old = world.network.graph.edges[change.edge]["link"]
    world.network.set_link(
        *change.edge, Link(change.bandwidth_bps, old.delay_s, old.jitter_s, old.loss)
    )
    world.network.heal(*change.edge)


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


def test_a_long_history_costs_no_precision() -> None:
    """One byte takes its time also after so many that one more is lost in a float."""
    world = World(cable(Link(8e16, 0)))
    world.send("huge", "a", "b", 10**17)
    world.at(100, lambda: world.network.set_link("a", "b", Link(8, 0)))
    world.send("tiny", "a", "b", 1, at_s=100)
    assert world.run() == {"huge": pytest.approx(10), "tiny": pytest.approx(101)}


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


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rates_are_max_min_fair(data: st.DataObject) -> None:
    """The exact reference's rates; no link over capacity; nobody could have more for free."""
    graph = data.draw(graphs())
    frames = data.draw(frames_on(graph, together=True))
    world = World(graph)
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, 10**9)
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
@given(cases())
def test_arrivals_are_those_of_the_reference(
    case: tuple[networkx.Graph, list[Frame], list[Change]],
) -> None:
    """Also while links change, are cut and healed; every byte sent is a byte delivered, once."""
    graph, frames, changes = case
    world = World(graph)
    for change in changes:
        world.at(change.at_s, lambda change=change: apply(world, change))
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, frame.size_bytes, frame.at_s)
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
@given(cases(), st.floats(0.01, 1.5))
def test_bytes_under_way_are_counted(
    case: tuple[networkx.Graph, list[Frame], list[Change]], until_s: float
) -> None:
    """At any moment no link has carried more than it could, and a path's links carry alike."""
    graph, frames, _ = case
    world = World(graph)
    for i, frame in enumerate(frames):
        world.send(str(i), frame.source, frame.target, frame.size_bytes, frame.at_s)
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


# --- links that change ----------------------------------------------------------------------


def test_a_cut_stops_what_is_on_the_link_until_it_is_healed() -> None:
    """In both directions; what has left the link already still arrives; others go on."""
    graph = star(["one", "two"], ["worker"], Link(8e6, 0.2), FAST)
    world = World(graph)
    world.send("before", "one", "worker", 100_000)
    world.send("up", "one", "worker", 1_000_000, at_s=0.1)
    world.send("down", "worker", "one", 1_000_000, at_s=0.1)
    world.send("other", "two", "worker", 1_000_000, at_s=0.1)
    world.at(0.2, lambda: world.network.cut("internet", "one"))
    world.send("during", "one", "worker", 0, at_s=1.0)
    world.at(5.2, lambda: world.network.heal("one", "internet"))
    world.run()
    delay = 0.2 + FAST.delay_s
    assert world.arrived_s["before"] == pytest.approx(0.1 + delay)
    assert world.arrived_s["other"] == pytest.approx(1.1 + delay)
    assert world.arrived_s["up"] == pytest.approx(6.1 + delay)
    assert world.arrived_s["down"] == pytest.approx(6.1 + delay)
    assert world.arrived_s["during"] == pytest.approx(5.2 + delay)


def test_a_stalled_flow_leaves_its_share_to_others() -> None:
    """Two owners share the worker's link; while one is cut off the other has all of it."""
    world = World(star(["one", "two"], ["worker"], Link(8e9, 0), Link(8e6, 0)))
    world.send("one", "one", "worker", 1_000_000)
    world.send("two", "two", "worker", 1_000_000)
    world.at(0.5, lambda: world.network.cut("one", "internet"))
    world.at(9.0, lambda: world.network.heal("one", "internet"))
    world.run()
    assert world.arrived_s["two"] == pytest.approx(1.25)
    assert world.arrived_s["one"] == pytest.approx(9.75)


def test_a_link_can_be_replaced_under_a_frame() -> None:
    """Rate and delay change at once for what is under way; the caller's graph stays as it was."""
    graph = cable(SLOW)
    world = World(graph)
    world.send("frame", "a", "b", 1_000_000)
    world.at(0.5, lambda: world.network.set_link("b", "a", Link(80e6, 0.3)))
    assert world.run()["frame"] == pytest.approx(0.5 + 0.05 + 0.3)
    assert graph.edges["a", "b"]["link"] == SLOW
    assert world.network.graph.edges["a", "b"]["link"] == Link(80e6, 0.3)


def test_new_frames_take_the_better_way_and_old_ones_keep_theirs() -> None:
    """A change of delay can change the route, for those that have not started."""
    graph = chain(Link(8e6, 0.1), Link(8e6, 0.1))
    graph.add_edge("a", "c", link=Link(8e6, 1.0))
    world = World(graph)
    world.send("old", "a", "c", 1_000_000)
    world.at(0.5, lambda: world.network.set_link("a", "c", Link(8e6, 0.01)))
    world.send("new", "a", "c", 1_000_000, at_s=0.5)
    world.run()
    assert world.arrived_s["old"] == pytest.approx(1.0 + 0.2)
    assert world.arrived_s["new"] == pytest.approx(1.5 + 0.01)
    assert world.network.moved_bytes["b", "c"] == 1_000_000
    assert world.network.moved_bytes["a", "c"] == 1_000_000


def test_a_replaced_link_stays_cut() -> None:
    """And healing it twice does no harm."""
    world = World(cable(SLOW))
    world.network.cut("a", "b")
    world.network.cut("a", "b")
    world.network.set_link("a", "b", FAST)
    world.send("frame", "a", "b", 0)
    world.at(2.0, lambda: world.network.heal("a", "b"))
    world.at(3.0, lambda: world.network.heal("a", "b"))
    assert world.run()["frame"] == pytest.approx(2.0 + FAST.delay_s)


# --- determinism ----------------------------------------------------------------------------

STORY = """
import hashlib, random, simpy
from sim.network import Link, Network, star
env, rng, log = simpy.Environment(), random.Random(3), []
owners, workers = [f"owner{i}" for i in range(5)], [f"worker{i}" for i in range(4)]
graph = star(owners, workers, Link(1e7, 0.01, 0.002, 0.001), Link(2e7, 0.001, 0.001))
network = Network(env, graph, random.Random(4))
def send(i):
    a, b = rng.choice(owners), rng.choice(workers)
    network.send(a, b, rng.randrange(50_000), lambda: log.append((i, env.now)))
for i in range(300):
    env.timeout(rng.random()).callbacks.append(lambda _, i=i: send(i))
env.run()
assert len(log) == 300
print(hashlib.sha256(repr((log, network.moved_bytes)).encode()).hexdigest())
"""


def test_the_same_seed_is_the_same_story_in_every_process() -> None:
    """Order and times of all arrivals, whatever the hash seed of the interpreter."""
    told = [
        subprocess.run(
            [sys.executable, "-c", STORY],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 65


def test_equal_frames_arrive_in_the_order_they_were_sent() -> None:
    """Ties are broken by the order of sending."""
    world = World(cable(SLOW))
    for i in range(20):
        world.send(str(i), "a", "b", 1000)
    assert list(world.run()) == [str(i) for i in range(20)]


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bandwidth_bps": 0}, "bandwidth_bps is positive"),
        ({"bandwidth_bps": -1}, "bandwidth_bps is positive"),
        ({"bandwidth_bps": math.inf}, "finite"),
        ({"bandwidth_bps": math.nan}, "bandwidth_bps"),
        ({"delay_s": -0.001}, "delay_s is finite and not negative, got -0.001"),
        ({"delay_s": math.nan}, "delay_s"),
        ({"jitter_s": -1}, "jitter_s"),
        ({"loss": -0.1}, "0 <= loss < 1"),
        ({"loss": 1}, "0 <= loss < 1"),
    ],
)
def test_a_link_must_make_sense(kwargs: dict[str, float], message: str) -> None:
    """Refused on construction, by name."""
    with pytest.raises(ValueError, match=message):
        Link(**{"bandwidth_bps": 1e6, "delay_s": 0.0, **kwargs})


def test_mistakes_in_sending_are_named() -> None:
    """And leave the network as it was."""
    graph = chain(SLOW)
    graph.add_edge("island", "sea", link=SLOW)
    network = World(graph).network
    for source, target, size, message in (
        ("a", "nobody", 1, "no host 'nobody' in this network; it has a, b, island, sea"),
        ("nobody", "nobody", 1, "no host 'nobody'"),
        ("a", "island", 1, "no route from a to island"),
        ("a", "b", -1, "a -> b: a frame has at least 0 bytes, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            network.send(source, target, size, lambda: None)
    with pytest.raises(ValueError, match="no host 'nobody'"):
        network.round_trip_s("nobody", "nobody")
    assert network.bytes_sent == 0
    assert network.rates_bps() == []


def test_only_links_that_exist_can_change() -> None:
    """The message says which there are."""
    network = World(chain(SLOW, SLOW)).network
    with pytest.raises(ValueError, match="no link a - c; a has links to b"):
        network.cut("a", "c")
    with pytest.raises(ValueError, match="no host 'x'"):
        network.heal("a", "x")
    with pytest.raises(ValueError, match="no link a - c"):
        network.set_link("a", "c", SLOW)


def test_only_plain_graphs_of_links() -> None:
    """An edge without a link, or a direction, is a mistake of the caller."""
    with pytest.raises(ValueError, match=r"'a' - 'b' has link=None.*link=Link"):
        World(networkx.Graph([("a", "b")]))
    with pytest.raises(ValueError, match="undirected"):
        World(networkx.DiGraph())
    with pytest.raises(ValueError, match="undirected"):
        World(networkx.MultiGraph())


# --- ready-made networks --------------------------------------------------------------------


def test_star() -> None:
    """One access and one site link between any owner and any worker."""
    world = World(star(["o1", "o2"], ["w1", "w2"], SLOW, FAST))
    assert world.network.round_trip_s("o2", "w1") == pytest.approx(0.022)
    world.send("one", "o1", "w1", 1_000_000)
    world.send("two", "o2", "w2", 1_000_000)
    world.run()
    assert list(world.arrived_s.values()) == [pytest.approx(1 + 0.011)] * 2


def test_two_sites() -> None:
    """Workers of a site share its uplink; the other site has its own."""
    world = World(
        two_sites(["o"], ["a1", "a2"], ["b1"], access=FAST, lan=FAST, uplink_a=SLOW, uplink_b=SLOW)
    )
    for worker in ("a1", "a2", "b1"):
        world.send(worker, "o", worker, 1_000_000)
    world.run()
    assert world.arrived_s["a1"] == world.arrived_s["a2"] == pytest.approx(2 + 0.012)
    assert world.arrived_s["b1"] == pytest.approx(1 + 0.012)
    assert world.network.round_trip_s("a1", "a2") == pytest.approx(4 * FAST.delay_s)


def test_names_are_used_once() -> None:
    """Also those of the nodes between."""
    with pytest.raises(ValueError, match="two hosts are called 'x'"):
        star(["x"], ["x"], SLOW, FAST)
    with pytest.raises(ValueError, match="two hosts are called 'internet'"):
        star(["internet"], ["x"], SLOW, FAST)
    with pytest.raises(ValueError, match="two hosts are called 'site A'"):
        two_sites(["site A"], [], [], access=SLOW, lan=SLOW, uplink_a=SLOW, uplink_b=SLOW)


def test_a_network_in_words() -> None:
    """Equal links of one hub on one line, in units people use."""
    owners = [f"owner{i}" for i in range(40)]
    home = Link(100e6, 0.010, 0.0005, 0.001)
    assert describe(star(owners, ["worker0"], home, Link(10e9, 0.001))) == (
        "owner0, owner1, owner2, owner3, owner4, ..., owner39 (40 in all) - internet: "
        "100 Mb/s, 10 ms one way, jitter 0.5 ms, loss 0.001, each\n"
        "worker0 - internet: 10 Gb/s, 1 ms one way"
    )
    assert describe(cable(Link(56e3, 0))) == "a - b: 56 kb/s, 0 ms one way"
