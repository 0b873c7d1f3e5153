"""Everything that can go wrong, drawn from one seed: a plan of faults, and the wire they happen on.

Theory. A plan is drawn whole before the run, so a seed stands for one set of circumstances. Every
kind of fault is switched on or off by a draw of its own ("swarm testing"): runs with few kinds
reach states that runs with all kinds at once never live to see. All faults stop at `stop_s`; what
they left behind (frames in the air, work in progress) may still come.

Corruption is of what a receiver can see is wrong: a changed header or length, a frame cut short
or made longer, plain garbage. A change inside a payload never arrives as such: the authenticated
transport (mutual TLS) turns it into a drop. What a *worker* does to a payload is a lie.

No fault takes the last honest worker for good: liars are drawn so that one is left, and crashed
workers come back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import simpy


HEADER_BYTES = 28
_LENGTH_AT = 24
CRAFTED = ("one value", "top bits", "constant bias")
"""Lies that take knowing how a product is written: who runs the world makes them."""
LIES = ("zeros", "random bytes", "another request's product", "stale product", *CRAFTED)


def after(env: simpy.Environment, seconds: float, action: Callable[[], None]) -> None:
    """Do something later, in simulated time."""
    event = env.timeout(seconds)
    event.callbacks.append(lambda _: action())


@dataclass(frozen=True)
class Window:
    """Something that holds for one worker between two times; `factor` is the slow-down."""

    worker: str
    start_s: float
    end_s: float
    factor: float = 1.0

    def covers(self, worker: str, now: float) -> bool:
        """Whether it holds for this worker now."""
        return worker == self.worker and self.start_s <= now < self.end_s


@dataclass(frozen=True)
class Moment:
    """Something that happens once: to whom, when, and by how much (`delta_s`)."""

    worker: str
    at_s: float
    delta_s: float = 0.0


@dataclass(frozen=True)
class Liar:
    """A worker that answers with something else, at a rate, in one of the ways of LIES."""

    worker: str
    way: str
    rate: float


@dataclass(frozen=True)
class FaultPlan:
    """What will go wrong in one run. Rates are probabilities per frame or per task.

    latency_s       (least, most) one-way delay of a frame when all is well
    delay_s         (least, most) of a delayed frame, and of the second copy of a doubled one
    one_way         partitions that stop frames to the worker only
    connections_lost  told to the owner alone (delta_s > 1/3), the worker alone (< -1/3), or both;
                      above 0.9 the owner hears that there will be no other
    crashes_s       times at which the owner's process dies
    crash_steps     steps after whose application, before any checkpoint, it dies
    restart_s       how long the owner is down
    """

    stop_s: float
    latency_s: tuple[float, float]
    delay_s: tuple[float, float] = (0.0, 0.0)
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0
    twice: float = 0.0
    failed: float = 0.0
    busy: float = 0.0
    partitions: tuple[Window, ...] = ()
    one_way: tuple[Window, ...] = ()
    slow: tuple[Window, ...] = ()
    worker_crashes: tuple[Moment, ...] = ()
    connections_lost: tuple[Moment, ...] = ()
    jumps: tuple[Moment, ...] = ()
    liars: tuple[Liar, ...] = ()
    crashes_s: tuple[float, ...] = ()
    crash_steps: tuple[int, ...] = ()
    torn_checkpoint: bool = False
    restart_s: float = 0.1

    @property
    def jumped_s(self) -> float:
        """By how much the owner's clock may be late once the faults have stopped."""
        return sum(abs(moment.delta_s) for moment in self.jumps)

    def __str__(self) -> str:
        """One line: the faults that are on."""
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value not in (0.0, ()):
                parts.append(f"{item.name}={_short(value)}")
        return " ".join(parts)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return "[" + ",".join(_short(part) for part in value) + "]"
    if isinstance(value, Window | Moment | Liar):
        parts = [_short(getattr(value, item.name)) for item in fields(value)]
        return "/".join(part.replace(" ", "-") for part in parts)
    return str(value)


class _Draw:
    """Draws of one plan, each from `rng` in a fixed order."""

    def __init__(self, rng: random.Random, workers: Sequence[str], stop_s: float) -> None:
        self.rng = rng
        self._workers = workers
        self._stop_s = stop_s

    def rate(self, chance: float, most: float) -> float:
        """0, or with probability `chance` a rate up to `most`."""
        on, value = self.rng.random() < chance, self.rng.uniform(most / 10, most)
        return value if on else 0.0

    def count(self, chance: float, most: int) -> int:
        """0, or with probability `chance` 1..most."""
        on, value = self.rng.random() < chance, self.rng.randint(1, most)
        return value if on else 0

    def time(self) -> float:
        """A time before the faults stop."""
        return self.rng.uniform(0.0, self._stop_s)

    def windows(self, chance: float, most: int, factor: float = 1.0) -> tuple[Window, ...]:
        """Some windows; each ends before the faults stop."""
        found = []
        for _ in range(self.count(chance, most)):
            start, end = sorted((self.time(), self.time()))
            found.append(Window(self.rng.choice(self._workers), start, end, factor))
        return tuple(found)

    def moments(self, chance: float, most: int, spread_s: float = 0.0) -> tuple[Moment, ...]:
        """Some moments, by time."""
        found = [
            Moment(
                self.rng.choice(self._workers), self.time(), self.rng.uniform(-spread_s, spread_s)
            )
            for _ in range(self.count(chance, most))
        ]
        return tuple(sorted(found, key=lambda moment: moment.at_s))


def draw_plan(rng: random.Random, workers: Sequence[str], steps: int) -> FaultPlan:
    """A plan for a run of so many steps. The same generator state gives the same plan."""
    stop_s = rng.uniform(0.1, 2.0)
    draw = _Draw(rng, workers, stop_s)
    fastest = rng.uniform(0.0005, 0.004)
    slowest = fastest * rng.uniform(1.0, 4.0)
    liars = []
    # The first worker of a shuffled list stays honest.
    suspects = rng.sample(list(workers), len(workers))[1:]
    for _ in range(draw.count(0.4, max(1, len(suspects)))):
        if suspects:
            liars.append(Liar(suspects.pop(), rng.choice(LIES), rng.uniform(0.05, 0.7)))
    return FaultPlan(
        stop_s=stop_s,
        latency_s=(fastest, slowest),
        delay_s=(10 * slowest, rng.uniform(20 * slowest, 1.0)),
        drop=draw.rate(0.5, 0.3),
        duplicate=draw.rate(0.5, 0.3),
        reorder=draw.rate(0.5, 0.5),
        corrupt=draw.rate(0.4, 0.2),
        delay=draw.rate(0.4, 0.1),
        twice=draw.rate(0.3, 0.5),
        failed=draw.rate(0.3, 0.2),
        busy=draw.rate(0.3, 0.2),
        partitions=draw.windows(0.3, 2),
        one_way=draw.windows(0.2, 2),
        slow=draw.windows(0.3, 2, factor=rng.uniform(5.0, 60.0)),
        worker_crashes=draw.moments(0.5, 3),
        connections_lost=draw.moments(0.5, 4, spread_s=1.0),
        jumps=draw.moments(0.3, 3, spread_s=0.5),
        liars=tuple(liars),
        crashes_s=tuple(sorted(draw.time() for _ in range(draw.count(0.4, 2)))),
        crash_steps=tuple(sorted({rng.randint(1, steps) for _ in range(draw.count(0.3, 2))})),
        torn_checkpoint=rng.random() < 0.3,
        restart_s=rng.uniform(0.01, 0.3),
    )


@dataclass
class FaultyWire:
    """The network between one owner and its workers, with the plan's faults.

    deliver   hands (source, target, frame) to the receiver, from a SimPy callback
    injected  how often each kind of fault has happened
    """

    env: simpy.Environment
    plan: FaultPlan
    rng: random.Random
    owner: str
    deliver: Callable[[str, str, bytes], None]
    injected: Counter[str] = field(default_factory=Counter)

    @property
    def faulty(self) -> bool:
        """Whether faults have not stopped yet."""
        return bool(self.env.now < self.plan.stop_s)

    def chance(self, kind: str, rate: float) -> bool:
        """Whether a fault of this kind happens now; counts it when it does."""
        if rate == 0.0 or not self.faulty or self.rng.random() >= rate:
            return False
        self.injected[kind] += 1
        return True

    def send(self, source: str, target: str, frame: bytes) -> None:
        """Carry a frame, as well as the plan allows."""
        plan, now = self.plan, float(self.env.now)
        worker = target if source == self.owner else source
        if any(w.covers(worker, now) for w in plan.partitions):
            self.injected["partition"] += 1
            return
        if target == worker and any(w.covers(worker, now) for w in plan.one_way):
            self.injected["one-way partition"] += 1
            return
        if self.chance("drop", plan.drop):
            return
        wait_s = self.rng.uniform(*plan.latency_s)
        if self.chance("delay", plan.delay):
            wait_s += self.rng.uniform(*plan.delay_s)
        if self.chance("reorder", plan.reorder):
            wait_s += self.rng.uniform(0.0, 6 * plan.latency_s[1])
        if self.chance("duplicate", plan.duplicate):
            self._later(wait_s + self.rng.uniform(0.0, plan.delay_s[1]), source, target, frame)
        if self.chance("corrupt", plan.corrupt):
            frame = corrupted(self.rng, frame)
        self._later(wait_s, source, target, frame)

    def _later(self, wait_s: float, source: str, target: str, frame: bytes) -> None:
        after(self.env, wait_s, lambda: self.deliver(source, target, frame))


def corrupted(rng: random.Random, frame: bytes) -> bytes:
    """A frame with a damage its receiver can see; never the same bytes."""
    way = rng.randrange(5)
    spoilt = bytearray(frame)
    if way == 0:
        spoilt[rng.randrange(min(HEADER_BYTES, len(spoilt)))] ^= rng.randint(1, 255)
    elif way == 1:
        spoilt[_LENGTH_AT : _LENGTH_AT + 4] = rng.randbytes(4)
    elif way == 2:
        del spoilt[rng.randrange(len(spoilt)) :]
    elif way == 3:
        spoilt += rng.randbytes(rng.randint(1, 64))
    else:
        spoilt = bytearray(rng.randbytes(rng.randint(0, 2 * len(frame))))
    return bytes(spoilt) if spoilt != frame else b""


class Lies:
    """What one lying worker makes of its honest products.

    craft   changes (one of CRAFTED, matrix, product) by more than any rounding
    """

    def __init__(
        self, liar: Liar, rng: random.Random, craft: Callable[[str, int, bytes], bytes]
    ) -> None:
        self._liar = liar
        self._rng = rng
        self._craft = craft
        self._last: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}

    def tell(self, matrix: int, product: bytes) -> bytes:
        """A wrong product of the same size; the right one where the liar has no other yet."""
        size = len(product)
        other = self._last.get(size, product)
        stale = self._first.get(matrix, product)
        self._last[size] = product
        self._first.setdefault(matrix, product)
        match self._liar.way:
            case "zeros":
                return bytes(size)
            case "random bytes":
                return self._rng.randbytes(size)
            case "another request's product":
                return other
            case "stale product":
                return stale if len(stale) == size else product
            case way:
                return self._craft(way, matrix, product)
