"""What a sequence says of its tokens beside their ids, in two bits of each.

A token is an integer below ID_MOST. APART on it: a document begins here, and sees nothing before
it. UNCOUNTED: predicting it is no part of the loss. So plain ids are one document a row, counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

ID_MOST = 1 << 29
APART = 1 << 29
UNCOUNTED = 1 << 30


class Rows(NamedTuple):
    """Sequences as a model takes them.

    ids        int64[B, S]
    targets    int64[B, S]: the next token where it is counted, else -1
    positions  int64[B, S], from 0 in every document; None where no row has a second document
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None


def plain_rows(ids: torch.Tensor) -> Rows:
    """Of int64[B, S] plain ids, whose numbers are not looked at: a simulation has none."""
    return Rows(ids, _next(ids), None)


def read_rows(marked: torch.Tensor) -> Rows:
    """Take int64[B, S] of marked tokens apart."""
    ids = marked & (ID_MOST - 1)
    wanted = ids.masked_fill((marked & UNCOUNTED) != 0, -1)
    begins = (marked & APART) != 0
    positions = None
    if begins[:, 1:].any():
        places = torch.arange(marked.shape[1], device=marked.device)
        positions = places - (places * begins).cummax(dim=1).values
    return Rows(ids, _next(wanted), positions)


def _next(tokens: torch.Tensor) -> torch.Tensor:
    return functional.pad(tokens[:, 1:], (0, 1), value=-1)


def predictions(marked: Any) -> Any:
    """bool[B, S-1]: which of marked tokens [B, S] are counted once they are predicted; of a tensor
    or an array, as what is given."""
    return (marked[:, 1:] & UNCOUNTED) == 0


def counted(marked: torch.Tensor | NDArray[np.int32]) -> int:
    """How many predictions of marked tokens [B, S] are part of the loss."""
    return int(predictions(marked).sum())
