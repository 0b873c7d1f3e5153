"""Which kernel multiplies on this machine.

The fastest one whose instructions the processor has, unless PRIVATE_LORA_KERNEL (or `--kernel`,
which sets it) names another. All give the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

from backends.defaults import KERNELS
from backends.errors import UserError
from backends.he.matmul import isa
from backends.he.matmul.generic import GenericKernel
from backends.he.matmul.interface import Kernel
from backends.he.matmul.tiled import TiledKernel

VARIABLE = "PRIVATE_LORA_KERNEL"

_TILED = {each.name: each for each in isa.ALL}
NAMES = (*_TILED, GenericKernel.name)
"""Every kernel there is, fastest first."""
assert NAMES == KERNELS


class KernelError(UserError, ValueError):
    """A kernel was asked for that does not exist, or that this processor cannot run."""


def runnable() -> dict[str, Callable[[], Kernel]]:
    """What makes each kernel that this processor can run, fastest first."""
    found: dict[str, Callable[[], Kernel]] = {
        name: partial(TiledKernel, each) for name, each in _TILED.items() if each.supported()
    }
    return found | {GenericKernel.name: GenericKernel}


@cache
def _kernel(name: str) -> Kernel:
    makers = runnable()
    if not name:
        return next(iter(makers.values()))()
    if name not in NAMES:
        raise KernelError(f"no kernel {name!r}; choose one of {', '.join(makers)}")
    if name not in makers:
        raise KernelError(
            f"kernel {name!r}: this processor lacks its instructions; it can run "
            f"{', '.join(makers)}"
        )
    return makers[name]()


def chosen_kernel() -> Kernel:
    """The kernel of this process.

    Raises KernelError when PRIVATE_LORA_KERNEL names one that cannot be run here.
    """
    return _kernel(os.environ.get(VARIABLE, "").strip().lower())
