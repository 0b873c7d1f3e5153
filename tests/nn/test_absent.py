"""A weight that is not here refuses to be computed with, whichever side of an operator it is on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from backends.nn.absent import AbsentWeight, AbsentWeightError

X = torch.ones(3)
USES: list[Callable[[torch.Tensor], object]] = [
    lambda w: w + X, lambda w: X + w, lambda w: w - X, lambda w: X - w, lambda w: 1 - w,
    lambda w: w * X, lambda w: X * w, lambda w: w / X, lambda w: X / w, lambda w: 1 / w,
    lambda w: w**2, lambda w: 2**w, lambda w: -w, lambda w: w @ X, lambda w: X @ w,
    lambda w: torch.einsum("i,i->i", w, X), lambda w: w.norm(), torch.linalg.norm, torch.linalg.svd,
    lambda w: functional.linear(X, w), lambda w: functional.normalize(w, dim=0),
    lambda w: w.sum(), lambda w: w.mean(), lambda w: w.var(), lambda w: w.abs(), lambda w: w.max(),
    lambda w: torch.tensordot(w, X, 1), lambda w: w.mul_(2), lambda w: w.copy_(X),
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_it_refuses_arithmetic(use: Callable[[torch.Tensor], object]) -> None:
    """With the sentence that says what to do, not with an error about its shape."""
    with pytest.raises(AbsentWeightError, match="with the workers"):
        use(AbsentWeight(torch.empty(0), requires_grad=False))
