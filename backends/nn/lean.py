"""Less kept for backward: what is cheap to compute again is not kept at all.

An MLP keeps four arrays as wide as its hidden layer: gate, up, the gate's activation, and their
product. The last two are computed anew from the first two when they are wanted. Of a 1B's shape
that is a quarter of all that a pass keeps, and every bit is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional

_LEAST_VALUES = 1 << 16
"""Smaller arrays are kept: looking at them costs as much."""


_AGAIN: dict[str, Callable[[Any], torch.Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(
        node._saved_self, approximate=node._saved_approximate
    ),
}
"""By what made an array: how it is made again."""


@dataclass(frozen=True)
class _Recipe:
    """In place of an array that another one's backward needs."""

    node: Any
    shape: torch.Size


_Kept: TypeAlias = "torch.Tensor | _Recipe"


def _keep(array: torch.Tensor) -> _Kept:
    made = array if array._base is None else array._base
    node = made.grad_fn
    again = _AGAIN.get(type(node).__name__)
    if again is None or array.numel() < _LEAST_VALUES or array.numel() != made.numel():
        return array
    whole = array.is_contiguous() and made.is_contiguous() and made._version == 0
    if not whole or not _both_there(node):
        return array
    return _Recipe(node, array.shape)


def _both_there(node: Any) -> bool:
    """Whether what it is made of is kept anyway: not what only the other's gradient needs."""
    if type(node).__name__ != "MulBackward0":
        return True
    # Unpacking them would compute them again.
    return node._raw_saved_self.data is not None and node._raw_saved_other.data is not None


def _give(kept: _Kept) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    with torch.no_grad():
        made = _AGAIN[type(kept.node).__name__](kept.node)
    return made.view(kept.shape)


def lean() -> AbstractContextManager[None]:
    """Within this context passes keep less for their backward. Of the thread that enters it."""
    return torch.autograd.graph.saved_tensors_hooks(_keep, _give)
