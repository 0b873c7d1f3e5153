"""The loss of a language model without copies of its logits.

Logits are the largest array of a pass: a 1B's are 0.5 MB a token. `functional.cross_entropy` holds
four of them (slice, float32, log-softmax, gradient). Here tokens are taken a few at a time, and the
gradient is written where the logits were, since nobody needs those any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backends.nn.marks import Rows, read_rows

_CHUNK_VALUES = {"cuda": 1 << 25}
_SMALL_CHUNK_VALUES = 1 << 21  # a processor computes as fast in small pieces, and keeps less


def token_losses(
    model: nn.Module, tokens: torch.Tensor | Rows, counted: int | None = None
) -> torch.Tensor:
    """Cross-entropy in nats, summed over the predicted tokens of int64[B, S] that are counted.

    Its gradient takes the place of the model's logits.

    tokens   marked (`marks`): of plain ids B*(S-1) are counted; or what `marks` read of them
    counted  only the first so many sequences; the others are computed, for a worker to see
    """
    device = next(model.parameters()).device
    rows = tokens if isinstance(tokens, Rows) else read_rows(tokens.to(device))
    # transformers keeps documents apart where positions start again, if it is given no mask.
    more = {} if rows.positions is None else {"position_ids": rows.positions}
    logits = model(input_ids=rows.ids, use_cache=False, **more).logits
    return cross_entropy(logits[:counted], rows.targets[:counted], spend=not _needed(logits))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, spend: bool = False) -> torch.Tensor:
    """Cross-entropy in nats, summed: float32[] of floating [..., V] and int64[...].

    Computed in float32 (float64 for such logits). A target below 0 is not counted.

    spend  backward writes the gradient into the memory of the logits. Whoever else needs them for
           a gradient gets torch's error for a variable that was changed in place
    """
    rows = logits.reshape(-1, logits.shape[-1])
    return _CrossEntropy.apply(rows, targets.reshape(-1), spend)  # type: ignore[no-untyped-call]


def _needed(logits: torch.Tensor) -> bool:
    """Whether the operation that made them, a softmax or tanh, needs them for its gradient."""
    made = (logits if logits._base is None else logits._base).grad_fn  # a view has its base's
    kept = [getattr(made, name) for name in dir(made) if name.startswith("_saved_")]
    place = logits.untyped_storage().data_ptr()
    return any(
        isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == place
        for value in kept
    )


class _CrossEntropy(torch.autograd.Function):
    """Of rows [T, V] and targets int64[T]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, targets: torch.Tensor, spend: bool) -> torch.Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        largest = torch.empty(len(rows), 1, dtype=wide, device=rows.device)
        sums, losses = torch.empty_like(largest), torch.empty_like(largest)
        for part in _parts(rows):
            values, index = rows[part].to(wide), targets[part, None]
            largest[part] = values.amax(-1, keepdim=True)
            wanted = values.gather(-1, index.clamp(min=0)) - largest[part]
            sums[part] = (values - largest[part]).exp_().sum(-1, keepdim=True).log_()
            losses[part] = (sums[part] - wanted).masked_fill_(index < 0, 0)
        ctx.save_for_backward(rows, targets, largest, sums)
        ctx.spend = spend
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """dy (softmax - one-hot)."""
        rows, targets, largest, sums = ctx.saved_tensors
        out = rows.detach() if ctx.spend else rows.clone()
        for part in _parts(rows):
            values = out[part].to(sums.dtype)  # of float32 it is that memory itself
            values.sub_(largest[part]).sub_(sums[part]).exp_()
            index = targets[part, None]
            values.scatter_add_(-1, index.clamp(min=0), values.new_full(index.shape, -1))
            values.mul_((dy * (index >= 0)).to(values.dtype))
            if values.dtype != out.dtype:
                out[part] = values
        return out, None, None


def _parts(rows: torch.Tensor) -> list[slice]:
    most = _CHUNK_VALUES.get(rows.device.type, _SMALL_CHUNK_VALUES)
    step = max(1, most // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]
