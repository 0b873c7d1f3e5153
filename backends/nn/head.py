"""The backward product of a remote language-model head, which the owner makes itself.

The gradient of a softmax is nearly one-hot over a hundred thousand inputs. Encrypted, it would cost
as many ciphertext values a token, and an error that is many times what matters in it. The owner has
the weight (it is public, and mapped), and needs few of its rows: of every token it multiplies the
LARGEST entries, and of the others a sample of SAMPLED, drawn in proportion to their size. What
comes out is unbiased. On a pretrained model with 262,144 words its error is 0.2 % of the gradient,
and the work a thousandth of the model's. Nothing is sent. As many rows for every token, so that the
work tells nothing of the text.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import OwnerMatrix
from backends.he.rows import chosen, weighted_rows
from backends.nn.tables import tensor_over

LARGEST = 256
"""Entries of each token that are multiplied as they are."""
SAMPLED = 512
"""Rows that stand for all others."""

_CHUNK_VALUES = {"cuda": 1 << 27}
_SMALL_CHUNK_VALUES = 1 << 21


class LocalHead:
    """Multiplies the logits' gradient by a head's weight, nearly.

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
        # Of the system's entropy: nothing that trains draws from it, or is repeated by a seed.
        self._random = np.random.default_rng()

    @classmethod
    def of(cls, group: int, weight: NDArray[np.int8], backward: OwnerMatrix) -> LocalHead:
        """Of what a prepared model holds: its weight stays where it is mapped."""
        scales = (torch.from_numpy(s) for s in (backward.in_scale, backward.out_scale))
        return cls(group, tensor_over(weight), *scales)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """float32[T, V] -> float32[T, K], on average dy times the weight."""
        dx = dy.new_empty(len(dy), self._codes.shape[1])
        for part in _parts(dy):
            dx[part] = self._multiply(*self._chosen(dy[part]))
        return dx.mul_(self._out_scale.to(dy.device))

    def _chosen(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(float32[T, n], int64[T, n]): factors of rows of the weight, and which rows."""
        most = min(LARGEST, dy.shape[1])
        offset = self._random.random(len(dy))
        if _has_kernels(dy):
            scale = self._in_scale.numpy()
            factors, index = chosen(dy.numpy(), scale, most, offset, SAMPLED)
            return torch.from_numpy(factors), torch.from_numpy(index)
        scaled = dy * self._in_scale.to(dy.device)
        return chosen_by_torch(scaled, most, torch.from_numpy(offset).to(dy))

    def _multiply(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """float32[T, K]: the sums of rows of the weight times their factors."""
        if _has_kernels(values):
            found = weighted_rows(values.numpy(), index.numpy(), self._codes.numpy())
            return torch.from_numpy(found)
        where = index.to(self._codes.device)
        rows = self._codes.index_select(0, where.reshape(-1)).to(values.device)
        rows = rows.to(torch.float32).reshape(*index.shape, -1)
        return torch.bmm(values[:, None], rows)[:, 0]


def chosen_by_torch(
    scaled: torch.Tensor, largest: int, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rows.chosen` chooses, by operations of any device, but for roundings of its sums."""
    weights = scaled.abs()
    top = weights.topk(largest, sorted=False).indices
    weights.scatter_(1, top, 0.0)
    sums = weights.cumsum(1)
    step = sums[:, -1:] / SAMPLED
    place = torch.arange(SAMPLED, device=weights.device)
    rest = torch.searchsorted(sums, (place + offset[:, None]) * step, right=True)
    rest.clamp_(max=weights.shape[1] - 1)
    signs = torch.where(scaled.gather(1, rest) > 0, step, -step)
    return torch.cat([scaled.gather(1, top), signs], dim=1), torch.cat([top, rest], dim=1)


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _parts(rows: torch.Tensor) -> list[slice]:
    """Few rows at a time, as each is as wide as the vocabulary."""
    most = _CHUNK_VALUES.get(rows.device.type, _SMALL_CHUNK_VALUES)
    step = max(1, most // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]
