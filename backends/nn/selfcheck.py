"""What a model is tried with before anything long begins.

require_causal    it predicts from what comes before, and nothing else
require_faithful  with its linears elsewhere it says what transformers' own model says
keeps_apart       documents in one sequence do not see each other, if it is told where they begin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from backends.he.interface import Values
from backends.he.manifest import GroupSpec
from backends.nn.losses import token_losses
from backends.nn.remote import LinearFunction, Remote
from backends.nn.sources import CheckpointError, first_line, probe_tokens

if TYPE_CHECKING:
    from backends.nn.skeleton import Skeleton

_RANK = 4
_SCALES = (3.0, 0.3, 0.03, 0.003)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of a faithful answer, relative, by the model's type: other sums of the same numbers."""
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the same token in two rows of a batch, relative to all logits."""


def require_causal(model: PreTrainedModel, remote: Remote, groups: list[GroupSpec]) -> None:
    """Raises CheckpointError when a token changes what is predicted before it.

    Tried with small random matrices of low rank in place of the remote weights, which costs
    nothing: where information flows does not depend on the weights.
    """
    tokens = probe_tokens(model.config)
    for scale in _SCALES:
        try:
            with remote.connected(low_rank(groups, scale)), torch.no_grad():
                logits = _logits(model, tokens)
        except Exception as error:  # of any model's own code
            raise CheckpointError(
                f"{type(model).__name__} fails on {tokens.shape[1]} tokens: {first_line(error)}"
            ) from error
        if logits.dim() != 3:
            return  # it classifies whole sequences
        if logits.isfinite().all():
            break
    else:
        return  # it says nothing to such matrices, so this tells nothing
    before, last = logits[:, :-1], logits[:, -1]
    changed = torch.linalg.norm(before[1] - before[0]).item()
    rounding = _ROUNDING.get(model.dtype, 2e-2) * torch.linalg.norm(before[0]).item()
    if changed > rounding + 1e-3 * torch.linalg.norm(last[1] - last[0]).item():
        raise CheckpointError(
            f"{type(model).__name__} sees the tokens that it is to predict: it is an encoder, and "
            "would learn to copy; give a causal language model (some have a config entry "
            "is_decoder for it)"
        )


def keeps_apart(model: PreTrainedModel, remote: Remote, groups: list[GroupSpec]) -> bool:
    """Whether documents packed in one sequence are to the model what each is alone.

    Tried like `require_causal`, with two documents whose positions start again: another first one
    changes nothing of what is said of the second, and that is what is said of it alone. A model
    with a memory that runs on, or that is not told positions, fails.
    """
    first = probe_tokens(model.config)[0]
    half = len(first) // 2
    packed = torch.stack((first, torch.cat((first[:half].flip(0), first[half:]))))
    positions = torch.arange(half).repeat(4).view(2, -1)
    for scale in _SCALES:
        try:
            with remote.connected(low_rank(groups, scale)), torch.no_grad():
                both = _logits(model, packed, positions)[:, half:]
                alone = _logits(model, packed[:1, half:])[0]
        except Exception:  # of any model's own code: it does not take positions, for one
            return False
        if both.dim() == 3 and both.isfinite().all() and alone.isfinite().all():
            tolerance = _TOLERANCE.get(model.dtype, 5e-2)
            return _distance(both[1], both[0]) <= _ROUNDING.get(model.dtype, 2e-2) and (
                _distance(both[0], alone) <= tolerance
            )
    return False


def require_faithful(skeleton: Skeleton) -> None:
    """Raises CheckpointError when its parts together are not the model that transformers loads.

    The linears are computed here, with the weights a worker will have before rounding.
    """
    tokens = probe_tokens(skeleton.model.config)
    expected = skeleton.base.logits(tokens, skeleton.model.dtype)
    if expected is None:
        return
    with skeleton.remote.connected(exact_linear(skeleton)), torch.no_grad():
        found = _logits(skeleton.model, tokens)
    off = _distance(found, expected)
    if not off <= _TOLERANCE.get(skeleton.model.dtype, 5e-2):
        raise CheckpointError(
            f"{type(skeleton.model).__name__} with its linears elsewhere differs from the same "
            f"model in clear by {off:.1%}; this kind of model does not work here"
        )


def require_trainable(model: PeftModel, skeleton: Skeleton) -> None:
    """Raises CheckpointError when gradients cannot be computed, or reach no adapter.

    Tried like `require_causal`, forward and backward.
    """
    tokens = probe_tokens(skeleton.model.config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        with skeleton.remote.connected(low_rank(skeleton.groups, _SCALES[1])), torch.enable_grad():
            loss = token_losses(skeleton.model, tokens)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("no gradient reaches any of them")
    except Exception as error:  # of any model's own code
        raise CheckpointError(
            f"adapters of {type(skeleton.model).__name__} cannot be trained with its linears "
            f"elsewhere: {first_line(error)}"
        ) from error
    finally:
        skeleton.remote.forget_lane()


def exact_linear(skeleton: Skeleton) -> LinearFunction:
    """The remote linears in floating point, without rounding or encryption, forward and backward.

    Weights are read for every product, so that the model is never in memory whole.
    """

    def linear(matrix: int, x: Values) -> Values:
        group = skeleton.groups[matrix // 2]
        parts = [skeleton.load_weight(name).float() for name in group.members]
        weight = torch.cat(parts)
        rows = torch.as_tensor(x).cpu()
        return _like(x, rows @ (weight if matrix % 2 else weight.t()))

    return linear


def _like(x: Values, y: torch.Tensor) -> Values:
    """float32[T, N] as an array, or as a tensor where x is one."""
    return y.to(x.device) if isinstance(x, torch.Tensor) else y.numpy()


def _logits(
    model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    device = next(model.parameters()).device
    more = {} if positions is None else {"position_ids": positions.to(device)}
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False, **more).logits
    return logits.float().cpu()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = torch.linalg.norm(expected).item()
    return torch.linalg.norm(found - expected).item() / max(size, 1e-30)


def low_rank(groups: Sequence[GroupSpec] | Mapping[int, GroupSpec], scale: float) -> LinearFunction:
    """Products with small random matrices of low rank: where information flows costs nothing.

    groups  by their index in the catalogue
    """

    def linear(matrix: int, x: Values) -> Values:
        group = groups[matrix // 2]
        inputs, outputs = group.in_features, group.total_out
        if matrix % 2:
            inputs, outputs = outputs, inputs
        generator = torch.Generator().manual_seed(matrix)
        rows = torch.as_tensor(x).cpu()
        inward = torch.randn(inputs, _RANK, generator=generator)
        outward = torch.randn(_RANK, outputs, generator=generator)
        return _like(x, scale * (rows @ inward @ outward) / inputs**0.5)

    return linear
