"""What will go wrong, when and for how long: drawn from a seed, the same for the same seed.

A fault that comes due after its training has ended waits for the next training, so the order of
faults does not depend on how fast the machine is. What the processes are doing at that moment does,
and is the campaign's business.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass

KILLS = ("owner", "owner saving", "worker")
CUTS = ("reset", "stall")
FULL = "disk full"
_WEIGHTS = {"owner": 30, "owner saving": 20, "worker": 36, "reset": 8, "stall": 6, FULL: 6}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    kind     `owner`, `worker`: kill -9. `owner saving`: kill -9 while a checkpoint is written.
             `reset`, `stall`: the line is cut. `disk full`: a checkpoint cannot be written
    after    when it is due after the fault before it was dealt with, as a share of the time that an
             undisturbed training takes on this machine, whatever that is
    saves    of `owner saving`: due in so many checkpoints from then
    saving_s of `owner saving`: seconds since that checkpoint was begun
    down_s   seconds until the process is started again, or the line healed
    fits     of `disk full`: how much of a file still fits, 0 to 1
    """

    kind: str
    after: float
    saves: int
    saving_s: float
    down_s: float
    fits: float


def faults(seed: int) -> Iterator[Fault]:
    """Without end."""
    draw = random.Random(f"faults {seed}")
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    while True:
        (kind,) = draw.choices(kinds, weights)
        longest = {"owner": 0.5, "owner saving": 0.0}.get(kind, 0.2)
        yield Fault(
            kind, draw.uniform(0.0, longest), draw.randint(1, 4), draw.uniform(0.0, 0.03),
            draw.choice((0.0, draw.uniform(0.0, 0.6))), draw.random(),
        )  # fmt: skip


def transports(seed: int) -> Iterator[str]:
    """`plain` or `tls` for each training, without end; one of each in every two."""
    draw = random.Random(f"transports {seed}")
    while True:
        pair = ["plain", "tls"]
        draw.shuffle(pair)
        yield from pair


def moments(seed: int, count: int) -> list[float]:
    """So many moments of a run, as sorted shares of it: 0.05 to 0.9, no two within 0.05."""
    draw = random.Random(f"moments {seed}")
    while True:
        drawn = sorted(draw.uniform(0.05, 0.9) for _ in range(count))
        if all(b - a >= 0.05 for a, b in itertools.pairwise(drawn)):
            return drawn


def digest(seed: int, count: int) -> str:
    """16 hex digits of the first faults and transports of a seed: the plan, told in short."""
    drawn = [astuple(fault) for fault in itertools.islice(faults(seed), count)]
    ways = list(itertools.islice(transports(seed), count))
    return hashlib.sha256(repr((drawn, ways)).encode()).hexdigest()[:16]
