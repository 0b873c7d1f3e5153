"""Hosts, links and the bytes between them: a fluid model of a network.

A frame is one flow. While it is transmitted it has a rate on every link direction of its route at
once, and all flows share each direction max-min fairly (progressive filling, Bertsekas and
Gallager, Data Networks, 6.5): no flow can get more without taking from one that has no more. Packet
loss bounds what one flow can reach (Mathis et al. 1997). After its last byte is sent a frame needs
the propagation delay of its route, and is late by a random jitter of its own.

Not modelled: packets, queues in routers, routes that change when a link is cut. What TCP makes of a
line is in `sim.stream`.

How it is kept fast:

- Flows with the same route have the same rate, so rates belong to routes. A route counts the bytes
  each of its flows has been given since it became busy (its `level`); a flow ends when the level
  reaches what it was at the flow's start plus the flow's size. Starting or ending one is a step in
  a heap, however many are under way.
- A link direction whose busy routes cannot fill it together, each limited by its own narrowest
  link, holds nobody back. Only routes that meet in an overloaded direction are worked out together.
- Where many routes meet in one full link and nothing else holds them back, as at a site with many
  owners, all have the same rate: they are a `Crowd`, in which a change costs a step in a heap.
- One SimPy event waits for the next flow to end. When that flow is slowed down the event stays,
  finds nothing to do and waits again; when another will end earlier, a new event takes over. Such
  events that came to nothing may move the clock past the last arrival of a run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx

from sim.flows import Crowd, Link, Pipe, Route, fill

if TYPE_CHECKING:
    import simpy


CROWD = 24
"""Routes that are worth a crowd."""


class Network:
    """Carries frames between the hosts of a graph.

    graph: nodes are host names, every edge has an attribute `link`, a `Link`. It is copied. Frames
    take the path of the least delay, the same there and back; those under way keep the path they
    started on. `rng` draws the jitter, in the order of sending.

    Raises ValueError for a directed graph or an edge without a `Link`.
    """

    def __init__(self, env: simpy.Environment, graph: networkx.Graph, rng: random.Random) -> None:
        if graph.is_directed() or graph.is_multigraph():
            raise ValueError("a network is a plain undirected graph: one edge for one cable")
        self.graph = graph.copy()
        self.bytes_sent = 0  # handed to `send`, for other hosts
        self._env = env
        self._rng = rng
        self._pipes: dict[tuple[str, str], Pipe] = {}
        for a, b, link in self.graph.edges(data="link"):
            if not isinstance(link, Link):
                raise ValueError(
                    f"the edge {a!r} - {b!r} has link={link!r}; "
                    "give it one: graph.add_edge(a, b, link=Link(...))"
                )
            self._pipes[a, b] = Pipe((a, b), link)
            self._pipes[b, a] = Pipe((b, a), link)
        self._routes: dict[tuple[str, str], Route] = {}
        self._inner: dict[tuple[str, str], list[str]] = {}  # ways without the hosts at their ends
        self._busy: dict[Route, None] = {}
        self._loose: dict[Route, None] = {}  # of these, those in no crowd
        # When each of those ends next, and ends that it no longer has: told by `Route.ends_at`.
        self._ends: list[tuple[float, int, Route]] = []
        self._ends_seen = 0
        self._crowds: dict[Crowd, None] = {}
        self._started = 0
        self._sharings = 0
        self._generation = 0
        self._wake_at = math.inf

    def send(
        self,
        source: str,
        target: str,
        size_bytes: int,
        arrived: Callable[[], None] | None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """Send a frame; `arrived()` is called from a SimPy callback once its last byte is there.

        `left()`, likewise, once its last byte is on the way. To the same host it takes no time.
        Nobody is told where either is None.
        Raises ValueError for hosts that are unknown or not
        connected and for a negative size.
        """
        if not size_bytes >= 0:
            raise ValueError(
                f"{source} -> {target}: a frame has at least 0 bytes, got {size_bytes}"
            )
        if source == target:
            self._check_host(source)
            if arrived is not None:
                self._env.timeout(0, arrived).callbacks.append(_deliver)
            if left is not None:
                self._env.timeout(0, left).callbacks.append(_deliver)
            return
        route = self._routes.get((source, target)) or self._find(source, target)
        now = self._env.now
        late_s = 0.0
        for mean_s in route.jitters_s:
            late_s += self._rng.expovariate(1 / mean_s)
        if route.crowd is not None:
            route.crowd.advance(now)
            route.crowd.read(route)
        elif route.flows:
            route.advance(now)
        else:
            self._busy[route] = self._loose[route] = None
            route.level = route.rate = 0.0
            route.since = now
            for pipe in route.pipes:
                pipe.routes[route] = None
                pipe.load += route.narrowest
        self.bytes_sent += size_bytes
        self._started += 1
        ends = route.level + size_bytes
        heappush(route.flows, (ends, self._started, size_bytes, late_s, arrived, left))
        for pipe in route.pipes:
            pipe.flows += 1
        self._share(self._crowded(route, now))
        self._watch()

    def fillable(self, source: str, target: str) -> float:
        """The part of its narrowest link that one flow could take; less than 1 where losses and
        the round trip bound its rate."""
        route = self._routes.get((source, target)) or self._find(source, target)
        return min(1.0, route.cap / route.narrowest) if route.narrowest else 1.0

    def round_trip_s(self, a: str, b: str) -> float:
        """Propagation there and back, without transmission and jitter."""
        if a == b:
            self._check_host(a)
            return 0.0
        return 2 * self._find(a, b).delay_s

    def set_link(self, a: str, b: str, link: Link) -> None:
        """Replace a link; if it is cut, it stays cut.

        Frames under way keep their path, new ones take the best there is now.
        """
        for pipe in self._directions(a, b):
            pipe.link = link
        self.graph.edges[a, b]["link"] = link
        self._routes.clear()
        self._inner.clear()
        self._relink(a, b)

    def set_direction(self, source: str, target: str, link: Link) -> None:
        """Replace one direction of a link: one that carries less down than up, or more.

        Routes, and round trips, still go by the link that the graph has.
        """
        self._directions(source, target)[0].link = link
        self._relink(source, target)

    def cut(self, a: str, b: str) -> None:
        """Stop a link in both directions: what is or comes on it waits until it is healed.

        What has left it already still arrives. No other way is looked for. Harmless if it is cut
        already.
        """
        for pipe in self._directions(a, b):
            pipe.up = False
        self._relink(a, b)

    def heal(self, a: str, b: str) -> None:
        """End a cut. Harmless if there is none."""
        for pipe in self._directions(a, b):
            pipe.up = True
        self._relink(a, b)

    @property
    def moved_bytes(self) -> dict[tuple[str, str], float]:
        """Bytes each link direction (from, to) has carried until now."""
        now = self._env.now
        self._read_crowds()
        moved = {pipe.ends: float(pipe.carried) for pipe in self._pipes.values()}
        for route in self._busy:
            level = route.level + route.rate * (now - route.since)
            part = sum(max(0.0, size - max(0.0, end - level)) for end, _, size, *_ in route.flows)
            for pipe in route.pipes:
                moved[pipe.ends] += part
        return moved

    def rates_bps(self) -> list[tuple[str, str, float]]:
        """(source, target, bits/s) of every frame under way, those of one route together."""
        self._read_crowds()
        return [(*route.pair, 8 * route.rate) for route in self._busy for _ in route.flows]

    def _check_host(self, name: str) -> None:
        if name not in self.graph:
            raise ValueError(
                f"no host {name!r} in this network; it has {listed([str(n) for n in self.graph])}"
            )

    def _directions(self, a: str, b: str) -> tuple[Pipe, Pipe]:
        if (a, b) not in self._pipes:
            for name in (a, b):
                self._check_host(name)
            ends = [str(n) for n in self.graph[a]]
            raise ValueError(f"no link {a} - {b}; {a} has links to {listed(ends) or 'nothing'}")
        return self._pipes[a, b], self._pipes[b, a]

    def _find(self, source: str, target: str) -> Route:
        pair = (source, target)
        if pair not in self._routes:
            for name in pair:
                self._check_host(name)
            path = self._path(source, target)
            # The way back is the same way, also where another has the same delay.
            for hops in (path, path[::-1]):
                ends = (hops[0], hops[-1])
                self._routes[ends] = Route(ends, tuple(self._pipes[hop] for hop in pairwise(hops)))
        return self._routes[pair]

    def _path(self, source: str, target: str) -> list[str]:
        """The hosts and nodes of the way with the least delay."""
        # Whoever has one link goes by it: so all of a star's ways are found by looking for one.
        ends = [next(iter(self.graph[name]), name) if self.graph.degree[name] == 1 else name
                for name in (source, target)]  # fmt: skip
        if ends == [target, source]:
            return [source, target]
        inner = (ends[0], ends[1])
        if inner not in self._inner:
            try:
                self._inner[inner] = networkx.shortest_path(
                    self.graph, *inner, weight=lambda a, b, edge: edge["link"].delay_s
                )
            except networkx.NetworkXNoPath:
                raise ValueError(
                    f"no route from {source} to {target}: join them with a link"
                ) from None
        path = self._inner[inner]
        begin = [source] if ends[0] != source else []
        return begin + path + ([target] if ends[1] != target else [])

    def _relink(self, a: str, b: str) -> None:
        """A link has changed: measure all routes again, share all links again."""
        for crowd in list(self._crowds):
            self._dissolve(crowd)
        for pipe in self._directions(a, b):
            pipe.capacity = pipe.link.bandwidth_bps / 8 if pipe.up else 0.0
        for route in {**self._busy, **dict.fromkeys(self._routes.values())}:
            route.measure()
        for pipe in self._pipes.values():
            pipe.load = sum((route.narrowest for route in pipe.routes), 0.0)
        self._share(self._busy)
        self._watch()

    def _crowded(self, route: Route, now: float) -> list[Route]:
        """Renew the rates of a crowd that a route with one flow more is in, or comes into.

        The routes that are to be shared one by one: none, or it, or all that were a crowd.
        """
        crowds = [crowd for crowd in self._crowds if crowd.pipe in route.pipes]
        if not crowds:
            return [route]
        crowd = crowds[0]
        if route.crowd is None:
            crowd.advance(now)
            del self._loose[route]
            crowd.add(route)
        else:
            crowd.renew(route)
        if len(crowds) == 1 and crowd.closed(route) and crowd.share():
            return []
        return [route for crowd in crowds for route in self._dissolve(crowd)]

    def _dissolve(self, crowd: Crowd) -> list[Route]:
        """Its routes, which are to be shared one by one again."""
        crowd.advance(self._env.now)
        del self._crowds[crowd]
        routes = [route for route in crowd.pipe.routes if route.crowd is crowd]
        for route in routes:
            crowd.remove(route)
            self._loose[route] = None
        return routes

    def _read_crowds(self) -> None:
        """Write into the routes of crowds what they have by now."""
        for crowd in self._crowds:
            crowd.advance(self._env.now)
            for route in crowd.pipe.routes:
                crowd.read(route)

    def _gather(self, routes: Sequence[Route], tight: Sequence[Pipe]) -> bool:
        """Make these routes, which compete for the tight pipes, a crowd, if they are one."""
        for pipe in tight:
            if len(pipe.routes) < len(routes):
                continue
            rate = pipe.capacity / pipe.flows
            if any(other.flows * rate > other.capacity for other in tight):
                continue
            if any(route.limit < rate for route in routes):
                continue
            crowd = Crowd(pipe, self._env.now)
            for route in routes:
                crowd.add(route)
                del self._loose[route]
            self._crowds[crowd] = None
            if crowd.share():
                return True
            self._dissolve(crowd)
        return False

    def _share(self, changed: Iterable[Route]) -> None:
        """Renew the rates of these routes, and of all they compete with, directly or not."""
        now = self._env.now
        self._sharings = turn = self._sharings + 1
        for first in changed:
            if first.mark == turn or not first.flows or first.crowd is not None:
                continue
            first.mark = turn
            routes, tight = [first], []
            for route in routes:  # grows on the way
                for pipe in route.pipes:
                    if pipe.load > pipe.capacity and pipe.mark != turn:
                        pipe.mark = turn
                        tight.append(pipe)
                        for other in pipe.routes:
                            crowd = other.crowd
                            for one in [other] if crowd is None else self._dissolve(crowd):
                                if one.mark != turn:
                                    one.mark = turn
                                    routes.append(one)
            for route in routes:
                route.advance(now)
                limit = route.narrowest / len(route.flows)
                route.limit = limit if limit < route.cap else route.cap
            if len(routes) >= CROWD and self._gather(routes, tight):
                continue
            if tight:
                fill(routes, tight)
            else:
                first.rate = first.limit
            for route in routes:
                rate = route.rate
                left = route.flows[0][0] - route.level
                ends_at = now + left / rate if rate else math.inf
                if ends_at != route.ends_at:
                    route.ends_at = ends_at
                    self._ends_seen += 1
                    heappush(self._ends, (ends_at, self._ends_seen, route))

    def _next_end(self) -> float:
        """When the next flow of a route in no crowd ends."""
        ends = self._ends
        while ends and not (ends[0][0] == ends[0][2].ends_at and ends[0][2] in self._loose):
            heappop(ends)
        return ends[0][0] if ends else math.inf

    def _watch(self) -> None:
        """Have an event by the time the next flow ends."""
        ends_at = self._next_end()
        for crowd in self._crowds:
            ends_at = min(ends_at, crowd.ends_at)
        if ends_at < self._wake_at:
            self._generation += 1
            self._wake_at = ends_at
            timeout = self._env.timeout(max(0.0, ends_at - self._env.now), self._generation)
            timeout.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event.value != self._generation:
            return
        now = self._env.now
        self._wake_at = math.inf
        changed: list[Route] = []
        departed: list[Callable[[], None]] = []
        for crowd in list(self._crowds):
            changed += self._end_in(crowd, departed)
        due: dict[Route, None] = {}
        while self._next_end() <= now:
            due[heappop(self._ends)[2]] = None
        for route in due:
            # `ends_at` decides, not the level: rounding may have left a sliver of a byte.
            route.level, route.ends_at = route.flows[0][0], math.inf
            route.since = now
            self._end_flows(route, departed)
            changed.append(route)
            if not route.flows:
                changed += self._retire(route)
        self._share(changed)
        self._watch()
        for left in departed:
            left()

    def _end_in(self, crowd: Crowd, departed: list[Callable[[], None]]) -> list[Route]:
        """End what is due in a crowd; the routes to share anew, where it is none any more."""
        now, ended = self._env.now, False
        while crowd.ends_at <= now:
            route = crowd.first()
            assert route is not None
            # When it ends decides, not the level, as above.
            crowd.level, crowd.since = max(crowd.level, crowd.ends[0][0]), now
            crowd.read(route)
            route.level = route.flows[0][0]
            self._end_flows(route, departed)
            ended = True
            if route.flows:
                crowd.renew(route)
            else:
                crowd.remove(route)
                self._loose[route] = None
                self._retire(route)
            if not crowd.pipe.routes:
                del self._crowds[crowd]
                return []
            crowd.share()
        if not ended:
            return []
        if len(crowd.pipe.routes) >= CROWD // 2 and crowd.share():
            return []
        return self._dissolve(crowd)

    def _end_flows(self, route: Route, departed: list[Callable[[], None]]) -> None:
        """Take off a route the flows that have got all they were due."""
        while route.flows and route.flows[0][0] <= route.level:
            _, _, size_bytes, late_s, arrived, left = heappop(route.flows)
            if left is not None:
                departed.append(left)
            for pipe in route.pipes:
                pipe.carried += size_bytes
                pipe.flows -= 1
            if arrived is not None:
                timeout = self._env.timeout(route.delay_s + late_s, arrived)
                timeout.callbacks.append(_deliver)

    def _retire(self, route: Route) -> list[Route]:
        """Take a route without flows off its links; returns who may go faster now."""
        faster: list[Route] = []
        del self._busy[route], self._loose[route]
        for pipe in route.pipes:
            del pipe.routes[route]
            if pipe.load > pipe.capacity:
                faster += pipe.routes
            # Back to exactly zero when idle, lest rounding add up over a long run.
            pipe.load = pipe.load - route.narrowest if pipe.routes else 0.0
        return faster


def _deliver(event: simpy.Event) -> None:
    event.value()


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names as a list that stays readable."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, ..., {names[-1]} ({len(names)} in all)"
