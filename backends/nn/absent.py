"""The weight of a remote linear, which is not here.

`peft` asks it for type and device, and that works. What would compute with it (DoRA, adapters that
are initialised from the weights, merging) is refused instead of failing on its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from backends.errors import UserError

_MATHEMATICS = frozenset((
    "__add__", "__iadd__", "__imul__", "__isub__", "__itruediv__", "__matmul__", "__mul__",
    "__neg__", "__pow__", "__radd__", "__rdiv__", "__rmatmul__", "__rmul__", "__rpow__",
    "__rsub__", "__rtruediv__", "__sub__", "__truediv__", "abs", "add", "add_", "addmm",
    "amax", "amin", "baddbmm", "bmm", "copy_", "cosine_similarity", "div", "div_", "einsum",
    "linalg_norm", "linalg_qr", "linalg_svd", "linalg_vector_norm", "linear", "matmul", "max",
    "mean", "min", "mm", "mul", "mul_", "mv", "neg", "norm", "normalize", "pow", "prod", "qr",
    "rsub", "sqrt", "square", "std", "sub", "sub_", "sum", "svd", "svd_lowrank", "tensordot",
    "true_divide", "var",
))  # fmt: skip


class AbsentWeightError(UserError, RuntimeError):
    """Something wants to compute with weights that workers have; the text says what to do."""


class AbsentWeight(nn.Parameter):
    """An empty parameter in place of a weight. Arithmetic raises AbsentWeightError."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if getattr(func, "__name__", "") in _MATHEMATICS:
            raise AbsentWeightError(
                "the weights of remote linears are with the workers: DoRA needs their norm with "
                "the adapter on at every step, PiSSA and OLoRA their decomposition, merging all "
                "of them; use LoRA or rsLoRA with init_lora_weights=True, and merge the saved "
                "adapter into the base model with plain peft"
            )
        whole: Any = torch.Tensor.__torch_function__
        return whole.__func__(cls, func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as the empty parameter that it is."""
        plain: Any = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        return plain.__reduce_ex__(protocol)
