"""A checkpoint through our path without a cipher: the skeleton, and plain products for a worker's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backends.he.interface import Values


def open_skeleton(directory: Path) -> Any:
    """What a run opens, as it opens it. Raises UserError for what it refuses."""
    try:
        from backends.nn.base import open_base
        from backends.nn.selfcheck import require_faithful
        from backends.nn.skeleton import build_skeleton
    except ImportError:
        from benchmarks.zoo.standin import build_skeleton, open_base, require_faithful
    skeleton = build_skeleton(open_base(directory), least_remote=0.0)
    require_faithful(skeleton)
    return skeleton


def plain_products(skeleton: Any) -> Callable[[int, Values], Values]:
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
        return sum(p @ weight(m) for p, m in zip(parts, group.members, strict=True))  # type: ignore[return-value]

    return linear
