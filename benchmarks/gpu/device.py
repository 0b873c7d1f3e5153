"""Which GPU this machine has, found out in a process that may hang."""

from __future__ import annotations

from backends.machine import machine
from benchmarks.gpu.task import Figures, Task


def device(task: Task) -> Figures:
    """The GPU's name and the machine around it. Raises GpuError when it will not do."""
    return {"gpu": task.gpu.name, "machine": machine()}
