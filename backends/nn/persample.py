"""Gradients of an adapter for each sequence of a micro-batch, from one pass, clipped and summed.

A LoRA adapter is two linears without bias, and a linear's gradient from one sequence is dy^T x over
that sequence's tokens. Both are in the owner's hands in any pass, so that workers are asked for
nothing more. While a lane collects, it holds the gradients of its micro-batch one by one: as many
times the adapter as the micro-batch has sequences (an adapter of rank 16 for all linears of a 1B
is 45 MB in float32, so 360 MB for 8), and their sum in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from backends.errors import UserError
from backends.he.manifest import GroupSpec
from backends.nn.adapters import trainable
from backends.nn.lean import lean
from backends.nn.losses import token_losses
from backends.nn.remote import RemoteLinear
from backends.nn.selfcheck import low_rank
from backends.nn.sources import first_line

_SHOWN = 3
_SCALE = 0.3
"""Of the matrices that a model is tried with."""


class SeparationError(UserError, RuntimeError):
    """A model's gradients cannot be had sequence by sequence; the text says why."""


class _Taken:
    """Gradients of one pass: float[B, out, in] by the parameter's name."""

    def __init__(self, sequences: int, length: int) -> None:
        self.sequences, self.length = sequences, length
        self.gradients: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Of a linear that took x[B, ..., in], once more where it is used several times."""
        rows, outputs = (t.reshape(self.sequences, -1, t.shape[-1]) for t in (x, dy))
        found = torch.bmm(outputs.transpose(1, 2), rows)
        former = self.gradients.get(name)
        self.gradients[name] = found if former is None else former.add_(found)

    def require_apart(self, name: str, x: torch.Tensor) -> None:
        """Raise SeparationError where an input's rows are not those of the sequences in turn."""
        flat = x.dim() == 2 and x.shape[0] == self.sequences * self.length
        if not flat and (x.dim() < 3 or x.shape[0] != self.sequences):
            raise SeparationError(
                f"{name} is given {list(x.shape)} for {self.sequences} sequences of {self.length} "
                "tokens: this model mixes them, and cannot be trained with differential privacy"
            )


class _Linear(torch.autograd.Function):
    """x[..., in] -> [..., out]; the weight's gradient goes to `taken`, sequence by sequence."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, taken: _Taken, name: str
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.taken, ctx.name = taken, name
        return functional.linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.taken.add(ctx.name, x, dy)
        return (dy @ weight if ctx.needs_input_grad[0] else None), None, None, None


class PerSample:
    """The linears of a model's adapters, with gradients of each sequence.

    Several threads may compute passes at once. `adapted` must be in force meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises SeparationError where something else than plain LoRA is trained."""
        self._model = model
        self._parameters = trainable(model)
        modules = dict(model.named_modules())
        self._linears = {
            name: modules[name.rpartition(".")[0]]
            for name in self._parameters
            if name.endswith(".weight") and (".lora_A." in name or ".lora_B." in name)
        }
        others = [
            name for name in self._parameters if type(self._linears.get(name)) is not nn.Linear
        ]
        if others or not self._parameters:
            shown = ", ".join(others[:_SHOWN]) + " ..." * (len(others) > _SHOWN)
            raise SeparationError(
                "with differential privacy only LoRA adapters of linears are trained, "
                + (f"and not {shown}" if others else "and this model has none")
            )
        self._lane = threading.local()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within this context the adapters' linears look for whom a pass collects."""
        for name, linear in self._linears.items():
            linear.forward = partial(self._forward, name, linear)
        try:
            yield
        finally:
            for linear in self._linears.values():
                del linear.forward

    def _forward(self, name: str, linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        taken: _Taken | None = getattr(self._lane, "taken", None)
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        if taken is None or not torch.is_grad_enabled():
            return functional.linear(x, weight)
        taken.require_apart(name, x)
        return _Linear.apply(x, weight, taken, name)  # type: ignore[no-untyped-call]

    def of_each(
        self, tokens: torch.Tensor, counted: int | None = None
    ) -> tuple[float, list[torch.Tensor]]:
        """Loss in nats, summed over int64[B, S], and the gradient of each sequence's own sum.

        tokens   marked (`marks`)
        counted  as `token_losses` has it

        Gradients are [B, *shape] of each trainable parameter, in order. Raises SeparationError
        where they cannot be told apart.
        """
        taken = _Taken(*tokens.shape)
        self._lane.taken = taken
        try:
            with lean():
                loss = token_losses(self._model, tokens, counted)
            # On this lane's own thread, as `Trainer` has it.
            with torch.autograd.set_multithreading_enabled(False):
                rest = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        finally:
            self._lane.taken = None
        beside = [
            name
            for name, gradient in zip(self._parameters, rest, strict=True)
            if gradient is not None
        ]
        if beside:
            raise SeparationError(
                f"{beside[0]} is used outside of its linear: this kind of adapter cannot be "
                "trained with differential privacy"
            )
        return loss.item(), [
            taken.gradients.get(name, parameter.new_zeros(1).expand(len(tokens), *parameter.shape))
            for name, parameter in self._parameters.items()
        ]

    def require_apart(self) -> None:
        """Raise SeparationError where a sequence's loss has a gradient by another sequence.

        Tried with two short sequences, and where linears are elsewhere with small random matrices
        in place of the remote weights: no worker is asked for anything.
        """
        device = next(iter(self._parameters.values())).device
        first = torch.tensor([5, 17, 3, 11, 29, 7, 2, 13], device=device)
        tokens = torch.stack((first, first.flip(0)))
        remotes = [m for m in self._model.modules() if isinstance(m, RemoteLinear)]
        groups: dict[int, GroupSpec] = {m.group.index: m.group.spec for m in remotes if m.group}
        try:
            with (
                remotes[0].remote.instead(low_rank(groups, _SCALE)) if remotes else nullcontext(),
                self.adapted(),
                torch.enable_grad(),
            ):
                # Of the first sequence's loss alone.
                _, gradients = self.of_each(tokens, counted=1)
        except SeparationError:
            raise
        except Exception as error:  # of any model's own code
            raise SeparationError(
                "gradients of single sequences cannot be computed with this model: "
                f"{first_line(error)}"
            ) from error
        finally:
            if remotes:
                remotes[0].remote.forget_lane()
        sizes = [max(float(g[row].abs().amax()) for g in gradients) for row in (0, 1)]
        if not (sizes[0] > 0 and sizes[1] == 0):
            raise SeparationError(
                "one sequence's loss depends on the others of its batch in this model, which "
                "cannot be trained with differential privacy"
            )


def clipped_sum(
    gradients: list[torch.Tensor], weights: torch.Tensor, clip: float
) -> list[torch.Tensor]:
    """The sum over sequences of their gradients, each no longer than `clip` over all parameters.

    gradients  [B, ...] of each parameter, as `PerSample.of_each` gives them
    weights    float64[B]: what each sequence's gradient is multiplied with first

    A sequence whose gradient is not finite adds nothing, as it has no direction to be clipped to:
    so whatever it is, what it adds depends on it alone, and is no longer than `clip`. Float64, so
    that roundings of the sum are nothing beside the clip norm.
    """
    squares = torch.stack(
        [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
    ).square()
    norms = squares.sum(0).sqrt() * weights
    whole = norms.isfinite()
    factors = torch.where(whole, weights * (clip / norms.clamp(min=clip)), 0.0)
    if not whole.all():  # nothing times infinity would be something
        gradients = [torch.where(_beside(whole, g), g, 0.0) for g in gradients]
    return [torch.tensordot(factors, g.double(), 1) for g in gradients]


def _beside(rows: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], with as many dimensions as these."""
    return rows.view(-1, *(1 for _ in gradients.shape[1:]))
