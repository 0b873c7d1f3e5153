"""A whole simulated world: owners who fine-tune, workers who multiply, and the network between.

The machines are the real ones, `protocol.owner.Owner` and `protocol.worker.Worker`; only time is
modelled. `sim.hosts` says what each side does; here is what they share: the clock, the network,
the costs, the record.

Nothing is computed, so payloads are *phantoms*: eight bytes a token that repeat the number of
bytes the real payload would have. The machines check and carry them like any payload; the network
reads the number and takes the time that many bytes would take.

In one process (`WorldConfig.in_process`) owner and worker share one processor and hand frames
over without a network, which is how `backends.net.inprocess` runs them.

Measuring. The first `warmup` steps of an owner are taken and not counted. Where several owners
share a world, each goes on stepping after its last counted step until all have taken theirs, so
that nobody is measured in a world that is emptying. `WorldResult.window_s` is the time from the
end of the last owner's warm-up to the end of the last owner's steps.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import networkx as nx

from protocol.catalogue import Catalogue, MatrixShape
from protocol.owner_memory import OwnerConfig
from protocol.placement import Placement
from sim.device import DeviceProfile, Processor
from sim.flows import Link
from sim.hosts import (
    PHANTOM_BYTES_PER_TOKEN,
    Costs,
    OwnerHost,
    Step,
    WorkerHost,
    WorldError,
    wire_bytes,
)
from sim.network import Network
from sim.stream import Stream, Tcp
from sim.topologies import star
from sim.trace import Recorder, Span
from sim.workload import Workload

__all__ = ["Step", "World", "WorldConfig", "WorldError", "WorldResult", "simulate"]

_TOLD_EVERY = 1 << 14
"""Events; a fraction of a second."""
_COLLECT_AFTER = 50_000
LOOPBACK = Link(bandwidth_bps=1e15, delay_s=0.0)


@dataclass(frozen=True)
class WorldConfig:
    """One world.

    lanes      micro-batches of an owner's step, all in flight
    access     each owner's own link to the internet
    down_bps   what that link carries to the owner, in bits/s; None: as much as the other way
    site       the link of the workers' site
    graph      a topology of one's own, with hosts owner0.. and worker0..; else a star
    placement  which worker holds which matrix; without one every worker holds all, and each
               owner prefers another one
    together   all owners are on one machine, and share its cores
    steps      steps every owner takes and that count, after `warmup` that do not
    stagger    start owners at drawn moments of their first step instead of all at once
    streams    one connection from each side to each of the others, on which frames follow each
               other; else every frame is a flow of its own, and they share the line
    tcp        what TCP makes of such a connection (of frames that are flows of their own, its
               overhead only); None: bytes and nothing else
    record     keep spans: of all owners, or of the first `record_owners`
    """

    workload: Workload
    owner: DeviceProfile
    worker: DeviceProfile
    lanes: int = 1
    owners: int = 1
    workers: int = 1
    access: Link = LOOPBACK
    down_bps: float | None = None
    site: Link = LOOPBACK
    graph: nx.Graph | None = None
    placement: Placement | None = None
    in_process: bool = False
    together: bool = False
    steps: int = 3
    warmup: int = 0
    seed: int = 0
    stagger: bool = True
    protocol: OwnerConfig = field(default_factory=OwnerConfig)
    streams: bool = True
    tcp: Tcp | None = field(default_factory=Tcp)
    record: bool = True
    record_owners: int | None = None

    def __post_init__(self) -> None:
        for name in ("lanes", "owners", "workers", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup is at least 0, got {self.warmup}")
        if self.in_process and (self.owners, self.workers) != (1, 1):
            raise ValueError("in one process there is one owner and one worker")
        if self.down_bps is not None and self.graph is not None:
            raise ValueError("down_bps is of the star; a graph of one's own has its own links")


@dataclass
class Crossing:
    """A frame's way from one side to the other, in seconds of the world's clock.

    stalled_s  between sent_s and left_s in which it was not the line's rate that it waited for: the
               connection's window was used up, or losses kept it from growing
    left_s     its last byte was on the line
    there_s    and had come out at the other end
    """

    sent_s: float
    stalled_s: float = 0.0
    left_s: float = 0.0
    there_s: float = 0.0

    def leave(self, now_s: float, stalled_s: float, fillable: float) -> None:
        """Its last byte leaves; the connection has waited `stalled_s` since it was sent, and could
        fill so much of the line."""
        self.left_s = now_s
        sending_s = max(0.0, now_s - self.sent_s - stalled_s)
        self.stalled_s = min(stalled_s + (1 - fillable) * sending_s, now_s - self.sent_s)


@dataclass
class WorldResult:
    """What happened, in simulated time.

    steps             that counted, owner by owner
    tokens_per_step   of one owner
    window_s          (start, end) of what is measured
    worker_busy_s     seconds each worker's device computed, within the window
    bytes_up, _down   over all owners and all time; retransmissions included
    resent            requests that were sent more than once
    events            SimPy events it took to simulate
    """

    steps: list[Step]
    tokens_per_step: int
    elapsed_s: float
    window_s: tuple[float, float]
    worker_busy_s: dict[str, float]
    owner_busy_s: dict[str, float]
    bytes_up: int
    bytes_down: int
    resent: int
    events: int
    trace: Recorder

    @property
    def utilisation(self) -> float:
        """Part of the window that the workers' devices computed, 0 to 1, their average."""
        length_s = self.window_s[1] - self.window_s[0]
        return sum(self.worker_busy_s.values()) / (length_s * len(self.worker_busy_s))


class World:
    """Builds the hosts of a `WorldConfig` and runs them; use `simulate`."""

    def __init__(self, config: WorldConfig) -> None:
        import simpy  # only to simulate: profiles and workloads are read without it

        self.config = config
        self.env = simpy.Environment()
        self.trace = Recorder()
        self.costs = Costs(config.workload, config.lanes, config.owner, config.worker)
        self.rng = random.Random(f"world {config.seed}")
        self.catalogue = _phantom_catalogue(config.workload)
        graph = config.graph or star(
            [f"owner{i}" for i in range(config.owners)],
            [f"worker{i}" for i in range(config.workers)],
            config.access,
            config.site,
        )
        self.network = Network(self.env, graph, random.Random(f"network {config.seed}"))
        if config.down_bps is not None:
            down = replace(config.access, bandwidth_bps=config.down_bps)
            for i in range(config.owners):
                self.network.set_direction("internet", f"owner{i}", down)
        self._streams: dict[tuple[str, str], Stream] = {}
        shared = config.in_process or config.together
        processor = Processor(self.env, config.owner.cores) if shared else None
        self.workers = {
            host.name: host
            for host in (
                WorkerHost(self, i, processor if config.in_process else None)
                for i in range(config.workers)
            )
        }
        recorded = config.owners if config.record_owners is None else config.record_owners
        self.owners = {
            host.name: host
            for host in (
                OwnerHost(self, i, processor, config.record and i < recorded)
                for i in range(config.owners)
            )
        }
        self._warming = config.owners
        self._stepping = config.owners
        self._window_from_s = 0.0
        self._busy_before = dict.fromkeys(self.workers, 0.0)

    @property
    def over(self) -> bool:
        """Whether every owner has taken its steps."""
        return self._stepping == 0

    def send(
        self, source: str, target: str, frame: bytes, arrived: Callable[[Crossing], None]
    ) -> int:
        """Put a frame on the way; returns the bytes it really would have."""
        size, crossing = wire_bytes(frame), Crossing(self.env.now)
        if self.config.in_process:
            crossing.left_s = crossing.there_s = self.env.now
            event = self.env.event()
            event.callbacks.append(lambda _: arrived(crossing))
            event.succeed()
        else:
            done = self._carried(source, target, size, lambda: arrived(crossing))
            self._transmit(source, target, size, crossing, done)
        return size

    def _transmit(
        self, source: str, target: str, size: int, crossing: Crossing, done: Callable[[], None]
    ) -> None:
        tcp = self.config.tcp

        def arrived() -> None:
            crossing.there_s = self.env.now
            done()

        if not self.config.streams:
            size = size if tcp is None else round(size * tcp.overhead)
            free = self.network.fillable(source, target)

            def gone() -> None:
                crossing.leave(self.env.now, 0.0, free)

            self.network.send(source, target, size, arrived, gone)
            return
        stream = self._streams.get((source, target))
        if stream is None:
            stream = Stream(self.env, self.network, source, target, tcp)
            self._streams[source, target] = stream
        stalled_s, free = stream.stalled_s, self.network.fillable(source, target)

        def left() -> None:
            crossing.leave(self.env.now, stream.stalled_s - stalled_s, free)

        stream.send(size, arrived, left)

    def _carried(
        self, source: str, target: str, size: int, arrived: Callable[[], None]
    ) -> Callable[[], None]:
        """What the network is to call: `arrived` comes when both sides' cores are done, too.

        They encrypt, copy and decrypt while the frame is on its way, as far as they keep up.
        """
        costs = [
            (
                host.processor,
                size / profile.rates["wire"] + profile.overhead_s.get("frame", 0.0),
                min(1.0, profile.cores),
            )
            for host, profile in (self._host(source), self._host(target))
            if "wire" in profile.rates
        ]
        left = 1 + len(costs)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                arrived()

        for processor, seconds, demand in costs:
            processor.run(seconds, demand, done)
        return done

    def _host(self, name: str) -> tuple[OwnerHost | WorkerHost, DeviceProfile]:
        if name in self.owners:
            return self.owners[name], self.config.owner
        return self.workers[name], self.config.worker

    def span(self, track: str, name: str, start_s: float, lane: str, call: int, kind: str) -> None:
        """Record what ends now."""
        if self.env.now > start_s:
            self.trace.add(Span(track, name, start_s, self.env.now, lane, call, kind))

    def crossed(self, crossing: Crossing, track: str, name: str, lane: str, call: int) -> None:
        """Record a frame's way, which ends now: the line filled, and waited for.

        name  "request" or "answer"
        """
        kind, waiting = ("up" if name == "request" else "down"), f"{name} waits"
        from_s, filling_s = crossing.sent_s, crossing.sent_s + crossing.stalled_s
        # What is left when the line has done its part: a side's cores are behind.
        behind = "worker" if kind == "up" else "owner"
        for span in (
            (waiting, from_s, filling_s, "latency"), (name, filling_s, crossing.left_s, kind),
            (waiting, crossing.left_s, crossing.there_s, "latency"),
            (f"{name} is taken in", crossing.there_s, self.env.now, behind),
        ):  # fmt: skip
            what, start_s, end_s, part = span
            if end_s > start_s:
                self.trace.add(Span(track, what, start_s, end_s, lane, call, part))

    def step_ended(self, steps: int) -> None:
        """An owner has ended its `steps`-th step, warm-up included."""
        if steps == self.config.warmup:
            self._warming -= 1
            if self._warming == 0:
                self._window_from_s = self.env.now
                self._busy_before = {n: h.device.busy_s for n, h in self.workers.items()}
        if steps == self.config.warmup + self.config.steps:
            self._stepping -= 1

    def _requests_expected(self) -> int:
        """That all owners make until they have taken their steps, at least."""
        config = self.config
        steps = config.owners * config.lanes * (config.steps + config.warmup)
        return max(1, steps * len(config.workload.linears))

    def run(self, told: Callable[[float], None] | None = None) -> WorldResult:
        """Simulate until every owner has taken its steps. Raises WorldError."""
        for host in self.owners.values():
            host.begin()
        with _rarely_collected():
            events = self._until_all_have_stepped(told)
        owners, workers, now = self.owners.values(), self.workers, self.env.now
        return WorldResult(
            steps=[step for host in owners for step in host.steps],
            tokens_per_step=self.config.workload.tokens * self.config.lanes,
            elapsed_s=now,
            window_s=(self._window_from_s, now),
            worker_busy_s={n: h.device.busy_s - self._busy_before[n] for n, h in workers.items()},
            owner_busy_s={h.name: h.own_layers.busy_s + h.cipher.busy_s for h in owners},
            bytes_up=sum(host.sent_bytes for host in owners),
            bytes_down=sum(host.sent_bytes for host in workers.values()),
            resent=sum(host.requests_sent - host.requests for host in owners),
            events=events,
            trace=self.trace,
        )

    def _until_all_have_stepped(self, told: Callable[[float], None] | None) -> int:
        """How many events it took. Raises WorldError."""
        from simpy.core import EmptySchedule

        events, step = 0, self.env.step
        expected = self._requests_expected()
        while self._stepping:
            try:
                step()
            except EmptySchedule:
                raise WorldError("an owner waits for something that will not happen") from None
            events += 1
            if told is not None and events % _TOLD_EVERY == 0:
                asked = sum(host.requests for host in self.owners.values())
                told(min(1.0, asked / expected))
        return events


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Python looks for cycles after some hundred new objects, among all that live: with a world
    of a thousand owners that takes a fifth of the time, and finds little."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def simulate(config: WorldConfig, told: Callable[[float], None] | None = None) -> WorldResult:
    """Run one world. Raises WorldError when its training cannot go on.

    told  is called now and then with the part that is done, 0 to 1
    """
    return World(config).run(told)


def _phantom_catalogue(workload: Workload) -> Catalogue:
    """The workload's matrices, with payloads of the phantoms' size."""
    size = PHANTOM_BYTES_PER_TOKEN
    shapes = tuple(
        MatrixShape(m.name, m.in_features, m.out_features, size, size) for m in workload.matrices
    )
    digest = hashlib.sha256(workload.name.encode()).digest()
    return Catalogue(digest, digest, shapes)
