"""A slow network to hold the fast one against: every flow by itself, rates by exact fractions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import networkx
import simpy
from hypothesis import strategies as st

from sim.flows import Link
from sim.network import Network

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
