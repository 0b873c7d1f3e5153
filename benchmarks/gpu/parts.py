"""The parts of the benchmark, in order: what tells most comes first, in case time runs out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part; each runs in a process of its own.

    call        module:function, which takes a `Task` and returns figures
    deadline_s  seconds from its start after which its process is killed
    quick_s     the same with --quick; None: not one of the essentials
    """

    name: str
    call: str
    deadline_s: float
    quick_s: float | None = None


DEVICE = Part("device", "benchmarks.gpu.device:device", 60, 60)
"""Asked first: nothing can be measured without one."""

PARTS = (
    Part("ceiling", "benchmarks.gpu.ceiling:ceiling", 60, 25),
    Part("identical", "benchmarks.gpu.worker:identical", 180, 60),
    Part("layers", "benchmarks.gpu.worker:layers", 120, 35),
    Part("step", "benchmarks.gpu.whole:step", 300, 110),
    Part("throughput", "benchmarks.gpu.worker:throughput", 120, 45),
    Part("owner", "benchmarks.gpu.owner:owner", 180, 45),
    Part("launch", "benchmarks.gpu.worker:launch", 60),
    Part("library", "benchmarks.gpu.worker:library", 90),
    Part("preparing", "benchmarks.gpu.whole:preparing", 120),
    Part("peer", "benchmarks.gpu.whole:peer", 120),
    Part("suite", "benchmarks.gpu.whole:suite", 300),
)
ESSENTIALS = tuple(part for part in PARTS if part.quick_s is not None)
QUICK_LIMIT_S = 235.0
"""A whole --quick run, from its start; the last parts get what the others left of it."""
