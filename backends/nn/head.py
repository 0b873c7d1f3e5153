"""The owner's share in a remote language-model head's backward product.

The gradient of a softmax is nearly one-hot, and an encrypted product's error is that of its largest
inputs: all of it in one product over the vocabulary would drown in noise. So of every token the
owner multiplies the largest entries itself, by rows of the public int8 weight, and only the rest
goes to a worker. As many for every token, so that the work tells nothing of the text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import OwnerMatrix
from backends.nn.tables import tensor_over

K_LOCAL = 256
"""Entries of each token that the owner multiplies itself."""

_CHUNK_VALUES = {"cuda": 1 << 27}
_SMALL_CHUNK_VALUES = 1 << 21


class LocalHead:
    """Multiplies the largest entries of the logits' gradient.

    group      place of the head among the groups
    codes      int8[V, K], on the CPU
    in_scale   float32[V], applied to gradients before the product
    out_scale  float32[K], applied to its results
    """

    def __init__(
        self, group: int, codes: torch.Tensor, in_scale: torch.Tensor, out_scale: torch.Tensor
    ) -> None:
        self.group = group
        self._codes, self._in_scale, self._out_scale = codes, in_scale, out_scale

    @classmethod
    def of(cls, group: int, weight: NDArray[np.int8], backward: OwnerMatrix) -> LocalHead:
        """Of what a prepared model holds: its weight stays where it is mapped."""
        scales = (torch.from_numpy(s) for s in (backward.in_scale, backward.out_scale))
        return cls(group, tensor_over(weight), *scales)

    def input_gradient(
        self, dy: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """float32[T, V] -> float32[T, K]; `product` multiplies what is left of dy.

        While it does, dy lacks the largest entries; afterwards they are back. A copy of it would
        be the largest array of the pass.
        """
        values, index = self._take(dy)
        dx = product(dy)
        dy.scatter_(1, index, values)
        return dx + self._multiply(values, index)

    def _take(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(float32[T, K_LOCAL], int64[T, K_LOCAL]): the largest by their share in dy's length,
        and where they were; zeros are there now."""
        scale, count = self._in_scale.to(dy.device), min(K_LOCAL, dy.shape[1])
        found = [
            (dy[part] * scale).abs_().topk(count, sorted=False).indices
            for part in _parts(dy, dy.shape[1])
        ]
        index = torch.cat(found)
        values = dy.gather(1, index)
        dy.scatter_(1, index, 0.0)
        return values, index

    def _multiply(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """float32[T, K]: the product of these entries alone."""
        width = self._codes.shape[1]
        where = index.to(self._codes.device)
        scaled = values * self._in_scale.to(values.device)[index]
        dx = values.new_empty(len(values), width)
        for part in _parts(values, width * values.shape[1]):
            rows = self._codes.index_select(0, where[part].reshape(-1)).to(values.device)
            rows = rows.to(torch.float32).reshape(-1, values.shape[1], width)
            dx[part] = torch.bmm(scaled[part, None], rows)[:, 0]
        return dx.mul_(self._out_scale.to(dx.device))


def _parts(rows: torch.Tensor, values: int) -> list[slice]:
    """Few rows at a time, where one of them takes so many values."""
    most = _CHUNK_VALUES.get(rows.device.type, _SMALL_CHUNK_VALUES)
    step = max(1, most // values)
    return [slice(start, start + step) for start in range(0, len(rows), step)]
