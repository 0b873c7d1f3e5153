"""How the worker's product may be cut on each kind of GPU. Registers and shared memory of every
entry are checked by a test that compiles it; which one is fastest is for `tuner.py` to measure.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache

SKIP_VARIABLE = "PRIVATE_LORA_SKIP_TILINGS"
"""Environment variable with the tilings to leave out: names as in `Tiling.name`, kinds of kernel
(`async`) or shell patterns (`bulk-64x*`), with commas between them.
"""


class Kernel(str, Enum):
    """Which code computes the product."""

    POINTERS = "pointers"  # Triton, asynchronous copies: any GPU
    BULK = "bulk"  # Triton, the bulk copy engine: Hopper
    ASYNC = "async"  # Gluon, the bulk copy engine, tensor cores never drained: Hopper


@dataclass(frozen=True)
class Tiling:
    """One way to cut the product.

    tokens, outputs  tile of results one program owns
    inputs           depth of one step of its loop
    warps            of 32 threads, sharing the tile
    stages           steps in flight between memory and the tensor cores
    group            tiles of tokens that run side by side, so that weights are found in the L2
    programs         that share a multiprocessor; ASYNC launches as many as fit, and no more
    """

    kernel: Kernel
    tokens: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1

    @property
    def name(self) -> str:
        """Its kind, tile and stages."""
        return f"{self.kernel.value}-{self.tokens}x{self.outputs}x{self.inputs}-{self.stages}"

    def matches(self, patterns: str) -> bool:
        """Whether it is named by one of the patterns of a SKIP_VARIABLE."""
        found = [pattern.strip() for pattern in patterns.split(",")]
        return any(p == self.kernel.value or fnmatchcase(self.name, p) for p in found)


TOKEN_CLASSES = (64, 512, 4096)
"""Requests up to so many tokens share a tiling; anything larger uses the last."""

HOPPER_SMALL = (
    Tiling(Kernel.BULK, 64, 64, 128, 4, 4),
    Tiling(Kernel.BULK, 32, 64, 256, 4, 4),
    Tiling(Kernel.BULK, 16, 64, 128, 4, 4),
)
HOPPER_LARGE = (
    Tiling(Kernel.BULK, 64, 256, 128, 8, 3, group=16),
    Tiling(Kernel.BULK, 128, 128, 128, 8, 3),
    Tiling(Kernel.BULK, 64, 128, 64, 4, 5, group=16, programs=2),
    Tiling(Kernel.ASYNC, 64, 256, 128, 8, 3, group=16),
    Tiling(Kernel.ASYNC, 64, 256, 64, 8, 7, group=16),
    Tiling(Kernel.ASYNC, 128, 128, 128, 8, 3),
    Tiling(Kernel.ASYNC, 64, 128, 64, 4, 5, group=16, programs=2),
)
AMPERE_SMALL = (
    Tiling(Kernel.POINTERS, 32, 64, 128, 4, 4),
    Tiling(Kernel.POINTERS, 16, 64, 128, 4, 4),
)
AMPERE_LARGE = (
    Tiling(Kernel.POINTERS, 64, 128, 64, 8, 3),
    Tiling(Kernel.POINTERS, 64, 128, 64, 8, 4),
    Tiling(Kernel.POINTERS, 64, 128, 128, 8, 3),
    Tiling(Kernel.POINTERS, 64, 64, 128, 4, 3),
)
HOPPER = (9, 0)
TILINGS = (*HOPPER_SMALL, *HOPPER_LARGE, *AMPERE_SMALL, *AMPERE_LARGE)
"""All there are, of every kind of GPU."""


def token_class(tokens: int) -> int:
    """The size of request that stands for one of `tokens` tokens."""
    return TOKEN_CLASSES[min(bisect_left(TOKEN_CLASSES, tokens), len(TOKEN_CLASSES) - 1)]


@cache
def candidates(capability: tuple[int, int], tokens: int, skipped: str = "") -> tuple[Tiling, ...]:
    """Tilings to choose from on a device, for requests of about `tokens`; the first is safe.

    skipped  patterns of those to leave out
    """
    small = tokens <= TOKEN_CLASSES[0]
    found: tuple[Tiling, ...] = AMPERE_SMALL if small else AMPERE_LARGE
    if capability == HOPPER:
        found = HOPPER_SMALL if small else HOPPER_LARGE
    return tuple(tiling for tiling in found if not tiling.matches(skipped))
