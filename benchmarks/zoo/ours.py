"""A checkpoint through our path without a cipher: plain products in place of a worker's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from backends.defaults import LEAST_REMOTE
from backends.he.interface import Values
from backends.nn.base import open_base
from backends.nn.selfcheck import require_faithful
from backends.nn.skeleton import Skeleton, build_skeleton


def open_skeleton(directory: Path, least_remote: float = LEAST_REMOTE) -> Skeleton:
    """What a run opens, as it opens it. Raises UserError for what it refuses.

    least_remote  the least share of the frozen weights that workers must compute
    """
    skeleton = build_skeleton(open_base(directory), least_remote=least_remote)
    require_faithful(skeleton)
    return skeleton


def plain_products(skeleton: Skeleton) -> Callable[[int, Values], Values]:
    """(matrix index, float32[T, K]) -> float32[T, N] with the checkpoint's own float weights."""
    weights: dict[str, torch.Tensor] = {}

    def weight(module: str) -> torch.Tensor:
        if module not in weights:
            weights[module] = skeleton.load_weight(module).to(torch.float32)
        return weights[module]

    def linear(matrix: int, rows: Values) -> Values:
        group = skeleton.groups[matrix // 2]
        x = torch.as_tensor(rows)
        if matrix % 2 == 0:
            return torch.cat([x @ weight(m).t() for m in group.members], dim=1)
        parts = torch.split(x, list(group.out_features), dim=1)
        return sum(p @ weight(m) for p, m in zip(parts, group.members, strict=True))

    return linear
