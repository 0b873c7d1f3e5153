"""Flows on shared links: what a link is, and the max-min fair rates of everything on it.

Rates and capacities are bytes/s in here; only `Link` speaks of bits. See `sim.network` for the
model and for how it is kept fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeAlias

MSS_BYTES = 1460
MATHIS = 1.22
TIED = 1 + 1e-12  # shares this close count as equal: one round of filling instead of many

# Level at which it ends, order of starting, size_bytes, lateness by jitter (s), what to call when
# it has arrived, and when it has left.
_Told: TypeAlias = Callable[[], None] | None
Flow: TypeAlias = tuple[float, int, int, float, _Told, _Told]


@dataclass(frozen=True)
class Link:
    """One cable, full duplex: each direction has `bandwidth_bps` (bits/s) of its own.

    delay_s: propagation, one way. jitter_s: every frame is late by a draw from an exponential
    distribution of this mean. loss: the fraction of packets lost; it delays nothing by itself but
    bounds the rate of a flow.
    """

    bandwidth_bps: float
    delay_s: float
    jitter_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_bps < math.inf:
            raise ValueError(
                f"a link's bandwidth_bps is positive and finite, got {self.bandwidth_bps} "
                "(to stop a link, cut it)"
            )
        for name in ("delay_s", "jitter_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"a link's {name} is finite and not negative, got {getattr(self, name)}"
                )
        if not 0 <= self.loss < 1:
            raise ValueError(
                f"a link's loss is a fraction of its packets, 0 <= loss < 1, got {self.loss}"
            )


class Pipe:
    """One direction of a link. Rates and capacities in here are bytes/s."""

    __slots__ = (
        "capacity", "carried", "crowded", "ends", "flows", "link", "load", "mark", "routes",
        "spare", "up", "weight"
    )  # fmt: skip

    def __init__(self, ends: tuple[str, str], link: Link) -> None:
        self.ends = ends
        self.link = link
        self.up = True
        self.capacity = link.bandwidth_bps / 8
        # Busy routes; a dict, because a set would be walked in another order in every process.
        self.routes: dict[Route, None] = {}
        self.flows = 0  # on all its routes
        self.crowded = 0  # of its busy routes, those in a crowd
        self.load = 0.0  # what its busy routes could ask of it at most
        self.carried = 0  # bytes of frames that were sent whole
        self.mark = 0
        self.spare = 0.0  # these two are of use only inside `fill`
        self.weight = 0


class Route:
    """The way from one host to another, and the flows on it, which all have the same rate."""

    __slots__ = (
        "cap", "crowd", "delay_s", "ends_at", "flows", "jitters_s", "level", "limit", "mark",
        "narrowest", "offset", "pair", "pipes", "rate", "since"
    )  # fmt: skip

    def __init__(self, pair: tuple[str, str], pipes: tuple[Pipe, ...]) -> None:
        self.pair = pair
        self.pipes = pipes
        self.flows: list[Flow] = []  # a heap
        self.level = 0.0  # bytes each flow has been given since the route became busy
        self.rate = 0.0  # of one flow, since `since`
        self.since = 0.0
        self.ends_at = math.inf
        self.limit = 0.0
        self.mark = 0
        self.crowd: Crowd | None = None
        self.offset = 0.0  # its level less the crowd's
        self.measure()

    def measure(self) -> None:
        """Read again what its links say."""
        links = [pipe.link for pipe in self.pipes]
        self.delay_s = sum(link.delay_s for link in links)
        self.jitters_s = [link.jitter_s for link in links if link.jitter_s]
        self.narrowest = min(pipe.capacity for pipe in self.pipes)
        lost = 1 - math.prod(1 - link.loss for link in links)
        turn_s = 2 * self.delay_s * math.sqrt(lost)
        self.cap = MATHIS * MSS_BYTES / turn_s if turn_s else math.inf

    def advance(self, now: float) -> None:
        """Give its flows what they were due since the last change."""
        self.level += self.rate * (now - self.since)
        self.since = now


class Crowd:
    """Many routes that meet in one full link, and that nothing else holds back.

    All their flows have the same rate, so one level serves them all: a route's is this one and the
    route's offset. A flow that starts or ends changes the rate of all others, and costs no more
    than a step in a heap.

    bound  a rate that nothing else holds a flow back from; the true one may have become larger
    """

    __slots__ = ("_count", "bound", "ends", "level", "pipe", "rate", "since")

    def __init__(self, pipe: Pipe, now: float) -> None:
        self.pipe = pipe
        self.level = 0.0
        self.rate = 0.0
        self.since = now
        self.bound = math.inf
        self.ends: list[tuple[float, int, Route]] = []  # a heap: level, order, route
        self._count = 0

    def advance(self, now: float) -> None:
        """Give all flows what they were due since the last change."""
        self.level += self.rate * (now - self.since)
        self.since = now

    def add(self, route: Route) -> None:
        """A route with flows and a level of its own joins."""
        route.crowd = self
        route.offset = route.level - self.level
        for pipe in route.pipes:
            pipe.crowded += 1
        self.renew(route)

    def remove(self, route: Route) -> None:
        """A route leaves, with the level it has now; when its flow ends is not known yet."""
        self.read(route)
        route.crowd, route.ends_at = None, math.inf
        for pipe in route.pipes:
            pipe.crowded -= 1

    def read(self, route: Route) -> None:
        """Write what a route has by now into it."""
        route.level = self.level + route.offset
        route.rate, route.since = self.rate, self.since

    def renew(self, route: Route) -> None:
        """A route's flows have changed: note when its first ends, and what may hold it back."""
        self._count += 1
        heappush(self.ends, (route.flows[0][0] - route.offset, self._count, route))
        held = [pipe.capacity / pipe.flows for pipe in route.pipes if pipe is not self.pipe]
        self.bound = min([self.bound, route.cap, *held])

    def share(self) -> bool:
        """Renew the rate; False where something else holds a flow back by now."""
        self.rate = self.pipe.capacity / self.pipe.flows
        if self.rate <= self.bound:
            return True
        self.bound = min(
            min([route.cap, *(p.capacity / p.flows for p in route.pipes if p is not self.pipe)])
            for route in self.pipe.routes
        )
        return self.rate <= self.bound

    def closed(self, route: Route) -> bool:
        """Whether all that a route competes with is in this crowd."""
        return all(
            pipe.load <= pipe.capacity or pipe.crowded == len(pipe.routes) for pipe in route.pipes
        )

    def first(self) -> Route | None:
        """The route whose flow ends first."""
        while self.ends:
            level, _, route = self.ends[0]
            if route.crowd is self and route.flows and route.flows[0][0] - route.offset == level:
                return route
            heappop(self.ends)
        return None

    @property
    def ends_at(self) -> float:
        """When the next flow ends, if nothing changes until then."""
        route = self.first()
        if route is None or not self.rate:
            return math.inf
        return self.since + max(0.0, self.ends[0][0] - self.level) / self.rate


def fill(routes: list[Route], tight: list[Pipe]) -> None:
    """Max-min rates of routes that compete for the tight pipes, by progressive filling.

    All flows grow together; those at their limit stop, and so do those in a pipe that is full.
    `routes` must hold every busy route of every tight pipe. Spare and weight of pipes that are not
    tight are written and never read: to leave them out would cost more.
    """
    for pipe in tight:
        pipe.spare = pipe.capacity
        pipe.weight = 0
    for route in routes:
        route.rate = -1.0  # still growing
        flows = len(route.flows)
        for pipe in route.pipes:
            pipe.weight += flows
    growing = routes
    while growing:
        share = min([pipe.spare / pipe.weight for pipe in tight if pipe.weight], default=math.inf)
        stopped = [route for route in growing if route.limit <= share]
        if not stopped:
            full = [p for p in tight if p.weight and p.spare <= TIED * share * p.weight]
            stopped = list(
                dict.fromkeys(route for pipe in full for route in pipe.routes if route.rate < 0)
            )
        for route in stopped:
            route.rate = route.limit if route.limit < share else share
        if len(stopped) == len(growing):
            return
        for route in stopped:
            flows = len(route.flows)
            for pipe in route.pipes:
                pipe.spare -= flows * route.rate
                pipe.weight -= flows
        growing = [route for route in growing if route.rate < 0]
