"""What computing costs in the simulated world: work, device profiles, queues, shared cores.

Theory. A task's work is counted in operations and bytes, whatever the device. Alone on a device
it takes

    seconds = max(sum over kinds of count / rate, bytes / bandwidth) + launches * overhead

(the roofline model). Tasks on one processor share its cores as a fluid: a task keeps its `width`
of cores from others; while all running tasks together want more cores than there are, each of
them slows down by the same factor. All tasks being slowed alike, one clock of *virtual* seconds
that runs at this factor tells when each of them ends: when that clock has advanced by what the
task takes alone. A heap of virtual end times and one SimPy event are all it takes.

Kinds of operations (the keys of `Work.operations` and `DeviceProfile.rates`):

    int8       multiply-adds of an int8 matrix product; three limbs count three times
    int8_pair  the same of a product of two limbs, for processors that take both as one digit of 16
               bits; a profile without such a rate has the one of int8
    float      multiply-adds of the owner's own layers, in the run's float type
    ring_row   one output row of one block's ring arithmetic: rank products and one inverse NTT
    value      one element of a ciphertext that is made, opened or checked
    wire       one byte of a frame that is sent or received over TLS, on one core; a profile without
               such a rate takes it for free. Its overhead, "frame", is of a frame of any size:
               a profile need not have it
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from backends.files import write_json
from sim.reading import read_profile

if TYPE_CHECKING:
    import simpy

PROFILES = Path(__file__).with_name("profiles")
_LIKE = {"int8_pair": "int8"}
"""Whose rate a kind has that has none of its own."""


class ProfileError(ValueError):
    """A device profile is missing, damaged, or lacks a figure that was needed."""


@dataclass(frozen=True)
class Work:
    """What one task does, whatever device does it.

    operations   count by kind
    bytes_moved  between the processor and its memory
    launches     calls into the device or its library, each with the overhead of its task kind
    """

    operations: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: float = 0.0
    launches: float = 1.0

    def __post_init__(self) -> None:
        counts = (*self.operations.values(), self.bytes_moved, self.launches)
        if not all(0 <= count < math.inf for count in counts):
            raise ValueError(f"counts of work are finite and not negative: {self}")
        object.__setattr__(self, "operations", MappingProxyType(dict(self.operations)))

    def __add__(self, other: Work) -> Work:
        operations = dict(self.operations)
        for kind, count in other.operations.items():
            operations[kind] = operations.get(kind, 0.0) + count
        return Work(
            operations, self.bytes_moved + other.bytes_moved, self.launches + other.launches
        )

    def __mul__(self, times: float) -> Work:
        operations = {kind: count * times for kind, count in self.operations.items()}
        return Work(operations, self.bytes_moved * times, self.launches * times)

    __rmul__ = __mul__


NO_WORK = Work(launches=0.0)
"""The neutral element of +."""


@dataclass(frozen=True)
class Origin:
    """Where a profile's figures come from.

    kind       measured on the device, or taken from its data sheet
    where      the machine measured, or the data sheet
    when       ISO date
    commit     of the code that measured; empty for a data sheet
    published  every figure that its maker states, and in which document, in plain words
    assumed    everything that is neither measured nor published: derived, or an assumption
    """

    kind: Literal["measured", "datasheet"]
    where: str
    when: str
    commit: str = ""
    assumed: tuple[str, ...] = ()
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("measured", "datasheet"):
            raise ProfileError(f"an origin is 'measured' or 'datasheet', not {self.kind!r}")
        for what in ("published", "assumed"):
            object.__setattr__(self, what, tuple(getattr(self, what)))


@dataclass(frozen=True)
class DeviceProfile:
    """A device's speed, and how it is known.

    cores        processors that tasks share; 1.0 for a GPU, where a task takes all of it
    rates        operations per second of a task alone on the device, by kind of operation
    bytes_per_s  memory bandwidth
    overhead_s   seconds per launch, by kind of task
    width        cores that a task of a kind keeps from others (default: all), and those that
                 any overhead does, under "overhead" (default: one)
    """

    name: str
    origin: Origin
    cores: float
    rates: Mapping[str, float]
    bytes_per_s: float
    overhead_s: Mapping[str, float]
    width: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("rates", "overhead_s", "width"):
            object.__setattr__(self, what, MappingProxyType(dict(getattr(self, what))))
        positive = (self.cores, self.bytes_per_s, *self.rates.values(), *self.width.values())
        if not all(0 < value < math.inf for value in positive):
            raise ProfileError(f"profile {self.name!r}: cores, rates and widths are positive")
        if not all(0 <= value < math.inf for value in self.overhead_s.values()):
            raise ProfileError(f"profile {self.name!r}: overheads are finite and not negative")
        if any(value > self.cores for value in self.width.values()):
            raise ProfileError(f"profile {self.name!r}: a width is more than all cores")

    def seconds(self, work: Work, task: str) -> float:
        """How long `work` takes alone on the device, as a task of kind `task`.

        Raises ProfileError when the profile has no rate or overhead for it.
        """
        return self.cost(work, task)[0]

    def cost(self, work: Work, task: str) -> tuple[float, float]:
        """(seconds alone on the device, cores it keeps busy, averaged over that time)."""
        busy, overhead = self._busy(work), self._overhead(work, task)
        wide = self.width.get(task, self.cores)
        narrow = self.width.get("overhead", min(1.0, self.cores))
        total = busy + overhead
        demand = (busy * wide + overhead * narrow) / total if total > 0 else narrow
        return total, min(demand, self.cores)

    def _busy(self, work: Work) -> float:
        total = 0.0
        for kind, count in work.operations.items():
            same = kind if kind in self.rates else _LIKE.get(kind, kind)
            try:
                total += count / self.rates[same]
            except KeyError:
                raise ProfileError(
                    f"profile {self.name!r} has no rate for {kind!r}, only for "
                    f"{', '.join(self.rates)}; calibrate again or add it to the file"
                ) from None
        return max(total, work.bytes_moved / self.bytes_per_s)

    def _overhead(self, work: Work, task: str) -> float:
        try:
            return work.launches * self.overhead_s[task]
        except KeyError:
            raise ProfileError(
                f"profile {self.name!r} has no overhead for tasks of kind {task!r}, only for "
                f"{', '.join(self.overhead_s)}; calibrate again or add it to the file"
            ) from None

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, as they are in its file."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        maps = {name: dict(facts[name]) for name in ("rates", "overhead_s", "width")}
        return facts | maps | {"origin": asdict(self.origin)}

    def save(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_json(path, self.facts())

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """The profile in a JSON file. Raises ProfileError, naming the file, for a bad one."""
        try:
            facts = read_profile(path)
            return cls(**{**facts, "origin": Origin(**facts["origin"])})
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ProfileError(f"{path} holds no device profile: {why}") from error

    @classmethod
    def builtin(cls, name: str) -> DeviceProfile:
        """A profile that comes with the project. Raises ProfileError, naming the choices."""
        if name not in builtin_names():
            raise ProfileError(
                f"no device profile {name!r}; there are {', '.join(builtin_names())}, and "
                "`python -m sim.calibrate --out FILE` makes one of this machine"
            )
        return cls.load(PROFILES / f"{name}.json")


def builtin_names() -> list[str]:
    """Names of the profiles that come with the project, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


class Processor:
    """Cores shared by the tasks that run on them, in simulated time."""

    def __init__(self, env: simpy.Environment, cores: float) -> None:
        if not 0 < cores < math.inf:
            raise ValueError(f"a processor has a positive number of cores, got {cores}")
        self._env = env
        self._cores = cores
        self._demand = 0.0
        self._pace = 1.0
        self._virtual = 0.0
        """Seconds of undisturbed work that every task of this busy period got so far."""
        self._clock = 0.0
        """When `_virtual` was last brought up to date."""
        self._ends: list[tuple[float, int, float, Callable[[], None]]] = []
        self._count = 0
        self._wake_at = math.inf
        self._generation = 0

    @property
    def running(self) -> int:
        """Tasks on the cores now."""
        return len(self._ends)

    @property
    def pace(self) -> float:
        """How fast every task runs now, 1 meaning undisturbed."""
        return self._pace

    def run(self, seconds: float, demand: float, done: Callable[[], None]) -> None:
        """Start a task that keeps `demand` cores busy for `seconds` when alone; then `done()`.

        `done` is called from a SimPy callback, never before this returns.
        """
        if not (0 <= seconds < math.inf and 0 < demand <= self._cores):
            raise ValueError(
                f"a task takes 0 or more seconds and up to {self._cores} cores, got {seconds} s "
                f"on {demand} cores"
            )
        self._advance()
        self._count += 1
        heapq.heappush(self._ends, (self._virtual + seconds, self._count, demand, done))
        self._want(demand)
        self._arm()

    def _want(self, more: float) -> None:
        self._demand += more
        self._pace = self._cores / self._demand if self._demand > self._cores else 1.0

    def _advance(self) -> None:
        now = self._env.now
        if self._ends:
            self._virtual += (now - self._clock) * self._pace
        else:
            self._virtual = self._demand = 0.0  # a new busy period: rounding does not pile up
        self._clock = now

    def _arm(self) -> None:
        """See to it that an event comes no later than the next end."""
        if not self._ends:
            return
        wait_s = max(0.0, (self._ends[0][0] - self._virtual) / self._pace)
        if self._clock + wait_s >= self._wake_at:
            return  # an event comes earlier; it looks again
        self._generation += 1
        generation = self._generation
        self._wake_at = self._clock + wait_s
        event = self._env.timeout(wait_s)
        event.callbacks.append(lambda _: self._wake(generation))

    def _wake(self, generation: int) -> None:
        if generation != self._generation:
            return  # an earlier event has taken this one's place
        self._wake_at = math.inf
        self._advance()
        # What the clock cannot tell from now is due now.
        due = self._virtual + 4 * math.ulp(max(self._clock, self._virtual))
        ended = []
        while self._ends and self._ends[0][0] <= due:
            _, _, demand, done = heapq.heappop(self._ends)
            self._want(-demand)
            ended.append(done)
        for done in ended:
            done()
        self._arm()  # last: what `done` started may end first


class Device:
    """Tasks of one side: a first-come-first-served queue with `servers` places on a processor.

    speed   a device at 0.5 takes twice as long for every task it starts from then on
    """

    def __init__(
        self,
        env: simpy.Environment,
        name: str,
        profile: DeviceProfile,
        processor: Processor | None = None,
        servers: int = 1,
    ) -> None:
        if servers < 1:
            raise ValueError(f"device {name!r}: at least one server, got {servers}")
        self.name = name
        self.profile = profile
        self.speed = 1.0
        self._env = env
        self._processor = processor or Processor(env, profile.cores)
        self._servers = servers
        self._waiting: deque[tuple[float, float, float, Callable[[float, float, float], None]]] = (
            deque()
        )
        self._running = 0
        self._busy_s = 0.0
        self._counted_at = env.now

    @property
    def queued(self) -> int:
        """Tasks that wait for a place."""
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """Seconds its places have been occupied so far, summed over places."""
        return self._busy_s + self._running * (self._env.now - self._counted_at)

    def submit(self, task: str, work: Work, done: Callable[[float, float, float], None]) -> None:
        """Queue a task of kind `task`; `done(queued_at, started_at, ended_at)` in simulated s."""
        self.submit_cost(*self.profile.cost(work, task), done)

    def submit_cost(
        self, seconds: float, demand: float, done: Callable[[float, float, float], None]
    ) -> None:
        """Queue a task that takes `seconds` alone and keeps `demand` cores busy."""
        self._waiting.append((seconds, demand, self._env.now, done))
        self._start_next()

    def _start_next(self) -> None:
        while self._waiting and self._running < self._servers:
            seconds, demand, queued_at, done = self._waiting.popleft()
            self._count(+1)
            started_at = self._env.now

            def ended(
                queued_at: float = queued_at,
                started_at: float = started_at,
                done: Callable[[float, float, float], None] = done,
            ) -> None:
                self._count(-1)
                self._start_next()
                done(queued_at, started_at, self._env.now)

            self._processor.run(seconds / self.speed, demand, ended)

    def _count(self, change: int) -> None:
        self._busy_s = self.busy_s
        self._counted_at = self._env.now
        self._running += change
