"""What of a base model can be known to be wrong before anything is computed with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from backends.errors import UserError
from backends.he.manifest import GroupSpec

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_OFFSETS = 4  # rows that some tables of positions have beyond the positions


class DamagedWeightError(UserError, ValueError):
    """A tensor of the base model holds what no weight can be; the text names it."""


class RankError(UserError, ValueError):
    """Adapters are larger than what they adapt."""


class SequenceError(UserError, ValueError):
    """Sequences are longer than the model can take."""


def require_finite(model: nn.Module) -> None:
    """Raise DamagedWeightError for a loaded tensor that is not finite.

    Parameters hold neither NaN nor infinities, buffers no NaN: a mask may be made of infinities.
    What is on the meta device is not looked at.
    """
    for name, tensor in model.named_parameters():
        if not _finite(tensor):
            raise DamagedWeightError(
                f"{name} of the base model holds NaN or infinity: the checkpoint is damaged, or "
                "was saved after a training that failed"
            )
    for name, buffer in model.named_buffers():
        if not _finite(buffer, infinities=True):
            raise DamagedWeightError(f"{name} of the base model holds NaN: is it damaged?")


def _finite(tensor: torch.Tensor, infinities: bool = False) -> bool:
    """Whether no element is NaN, nor, unless they are allowed, infinite."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
        return True
    # Takes no memory, whatever the size, and a NaN is passed on.
    least, most = torch.aminmax(tensor.detach())
    both = torch.stack((least, most)).float()
    return bool((~both.isnan() if infinities else both.isfinite()).all())


def require_rank(groups: Sequence[GroupSpec], rank: int) -> None:
    """Raise RankError for adapters of a higher rank than any linear of the model can have."""
    full = max(min(g.in_features, out) for g in groups for out in g.out_features)
    if rank > full:
        raise RankError(
            f"adapters of rank {rank} are larger than the linears they adapt, whose rank is {full} "
            f"at most; give --rank {full} or less"
        )


def positions(model: nn.Module) -> tuple[int, bool] | None:
    """(tokens that a sequence of this model is made for, whether a longer one is impossible).

    Impossible where positions are looked up in a table; rotary ones are computed, but nobody has
    trained with longer ones. None for a model that names no length.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    named = [getattr(config, name, None) for name in _POSITIONS]
    known = [value for value in named if isinstance(value, int) and value > 0]
    if not known:
        return None
    longest = known[0]
    words = model.get_input_embeddings()  # type: ignore[operator]
    tables = [
        module.weight.shape[0]
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not words
    ]
    # GPT-J's sines, or a causal mask that is cut to size.
    held = [value for module in model.modules() for value in vars(module).values()]
    held += model.buffers()
    tables += [
        size for t in held if isinstance(t, torch.Tensor) and t.dim() > 1 for size in t.shape
    ]
    return longest, any(longest <= size <= longest + _OFFSETS for size in tables)


def require_positions(model: nn.Module, sequence: int) -> str | None:
    """A warning when sequences of so many tokens are longer than what the model was made for.

    Raises SequenceError when it cannot take them at all.
    """
    found = positions(model)
    if found is None or sequence <= found[0]:
        return None
    longest, impossible = found
    if impossible:
        raise SequenceError(
            f"sequences of {sequence} tokens are longer than the {longest} positions that the "
            f"model has learned; give --sequence {longest} or less"
        )
    return (
        f"warning: sequences of {sequence} tokens are longer than the {longest} that the model "
        "was made for; what it makes of the rest is anyone's guess"
    )
