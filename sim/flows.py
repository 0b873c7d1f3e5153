"""Flows on shared links: what a link is, and the max-min fair rates of everything on it.

Rates and capacities are bytes/s in here; only `Link` speaks of bits. See `sim.network` for the
model and for how it is kept fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MSS_BYTES = 1460
MATHIS = 1.22
TIED = 1 + 1e-12  # shares this close count as equal: one round of filling instead of many

# Level at which it ends, order of starting, size_bytes, lateness by jitter (s), what to call when
# it has arrived, and when it has left.
Flow: TypeAlias = tuple[float, int, int, float, Callable[[], None], Callable[[], None] | None]


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
        "capacity", "carried", "ends", "link", "load", "mark", "routes", "spare", "up", "weight"
    )  # fmt: skip

    def __init__(self, ends: tuple[str, str], link: Link) -> None:
        self.ends = ends
        self.link = link
        self.up = True
        self.capacity = link.bandwidth_bps / 8
        # Busy routes; a dict, because a set would be walked in another order in every process.
        self.routes: dict[Route, None] = {}
        self.load = 0.0  # what its busy routes could ask of it at most
        self.carried = 0  # bytes of frames that were sent whole
        self.mark = 0
        self.spare = 0.0  # these two are of use only inside `fill`
        self.weight = 0


class Route:
    """The way from one host to another, and the flows on it, which all have the same rate."""

    __slots__ = (
        "cap", "delay_s", "ends_at", "flows", "jitters_s", "level", "limit", "mark", "narrowest",
        "pair", "pipes", "rate", "since"
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
