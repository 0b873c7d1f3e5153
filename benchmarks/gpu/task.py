"""What a part of the benchmark is given.

Imports nothing that takes long or may be missing: a part that needs no more starts at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.scale import FULL, QUICK, Scale

if TYPE_CHECKING:
    from backends.he.cuda.device import Gpu
    from backends.he.params import Parameters

Figures = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A part takes one of these and returns its figures, which JSON can hold.

    preset      name of the cipher's parameters
    quick       the smaller scale
    deadline_s  from its start, after which its process is killed
    known       figures of the parts before it
    keep        saves figures: of a part that is cut short, those that it kept last are reported
    """

    preset: str
    quick: bool
    deadline_s: float
    known: Figures
    keep: Callable[[Any], None]

    @cached_property
    def gpu(self) -> Gpu:
        """The GPU of this machine. Raises GpuError."""
        from backends.he.cuda.device import find_gpu

        return find_gpu()

    @cached_property
    def parameters(self) -> Parameters:
        """Of the cipher."""
        from backends.he.params import preset

        return preset(self.preset)

    @property
    def scale(self) -> Scale:
        """How large everything is."""
        return QUICK if self.quick else FULL
