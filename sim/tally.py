"""Counts what every operation of a torch program costs, on the meta device: no number is computed.

Theory. Inside `Tally` each operation that reaches a kernel adds three counts, which are what the
roofline model of `sim.device` needs:

    multiply-adds   of matrix products and attention, from their shapes; an elementwise function
                    without an instruction of its own (exp, tanh, ...) counts as TRANSCENDENTAL
                    multiply-adds a value
    bytes           that its operands and results occupy; a broadcast operand counts once, and an
                    operand of which rows are picked counts the rows picked
    launches        1

An operation whose results are all views of its operands is free. The sum of the operations'
rooflines, sum of max(compute, memory), cannot be had from summed counts: a product bound by
arithmetic would hide a copy bound by memory. So counts are summed by octave of arithmetic
intensity (multiply-adds per byte), one `Work` each. Only the octave that holds a device's own
ratio then mixes both kinds, and within it the error is at most 17 %, wherever that ratio lies.

Attention counts the whole square of scores, although half of it is masked: the CPU kernel masks
in blocks of 512 keys, and up to that length takes as long with the mask as without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from sim.device import Work

TRANSCENDENTAL = 16
"""Multiply-adds that one value of such a function takes (measured for silu: 17 to 20)."""

SELECTION = 128
"""Multiply-adds that choosing the largest of many takes a value (measured: 3.5 ns)."""

_KNOWN_VALUES_MAX = 1 << 24

aten = torch.ops.aten

_TRANSCENDENTALS = {
    getattr(aten, name)
    for name in (
        "exp", "exp_", "log", "log_", "log1p", "sin", "cos", "tanh", "sigmoid", "silu",
        "silu_backward", "gelu", "gelu_backward", "softplus", "erf", "_softmax", "_safe_softmax",
        "_log_softmax", "_log_softmax_backward_data", "mish", "elu",
    )
}  # fmt: skip

# Operands of which an operation reads as many values as it writes, or (0) none at all.
_PICKED: Mapping[Any, tuple[int, bool]] = {
    aten.embedding: (0, True),
    aten.index_select: (0, True),
    aten.index: (0, True),
    aten.gather: (0, True),
}

_SCATTERED = (aten.scatter_, aten.scatter_add_)
"""Written in place, and read, as many values as there are indices."""

_UNTOUCHED = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
)  # fmt: skip


class NoNumbersError(ValueError):
    """A model's program depends on values that a trace without numbers does not have."""


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the costs of all operations run inside it, until `take` starts a new sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counting = True
        self._sums: dict[int | None, list[float]] = {}
        self._known = WeakTensorKeyDictionary()

    def take(self) -> tuple[Work, ...]:
        """The work since the last call, one `Work` for each octave of arithmetic intensity."""
        sums, self._sums = self._sums, {}
        order = sorted(sums, key=lambda octave: -math.inf if octave is None else octave)
        return tuple(
            Work({"float": sums[o][0]} if sums[o][0] else {}, sums[o][1], sums[o][2]) for o in order
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = list(_tensors((*args, *kwargs.values())))
        if func is aten._local_scalar_dense.default:
            return self._value(args[0]).item()
        result = func(*args, **kwargs)
        results = list(_tensors(result if isinstance(result, tuple | list) else (result,)))
        self._remember(func, args, kwargs, operands, results)
        if self.counting and not _free(func, operands, results):
            self._add(*_cost(func, args, kwargs, operands, results))
        return result

    def _add(self, products: float, size_bytes: float) -> None:
        octave = math.floor(math.log2(products / size_bytes)) if products and size_bytes else None
        sums = self._sums.setdefault(octave, [0.0, 0.0, 0.0])
        sums[0] += products
        sums[1] += size_bytes
        sums[2] += 1

    # Some programs ask for a number that follows from shapes alone: whether the position ids
    # start anew in the middle, say. Integers that depend on nothing else are computed along.

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor not in self._known:
            raise NoNumbersError(
                "the forward pass asks for a number that depends on its data or weights; this "
                "model cannot be traced from its config alone"
            )
        value: torch.Tensor = self._known[tensor]
        return value

    def _remember(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        exact = [r for r in results if r.is_meta and not r.is_floating_point()]
        if not exact:
            return
        known = func.overloadpacket not in _UNTOUCHED and not _draws(func)
        known = known and all(not t.is_meta or t in self._known for t in operands)
        small = sum(r.numel() for r in exact) <= _KNOWN_VALUES_MAX
        if not (known and small and len(exact) == len(results)):
            if func._schema.is_mutable:
                self._known = WeakTensorKeyDictionary()  # what was written may have views
            return

        def on_cpu(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self._value(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        values = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        values = values if isinstance(values, tuple | list) else (values,)
        for meta, value in zip(results, _tensors(values), strict=True):
            self._known[meta] = value


class CpuAttention(TorchFunctionMode):
    """Gives attention on the meta device the kernel that it would have on the CPU.

    torch chooses by the device's type, and would fall back to its slowest form here.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(
            attn_mask,
            torch.scalar_tensor(0.0, dtype=query.dtype, device="meta"),
            torch.scalar_tensor(-math.inf, dtype=query.dtype, device="meta"),
        )
    with torch._C._DisableTorchDispatch():  # asking for the choice costs the model nothing
        mask = None if attn_mask is None else _on_cpu(attn_mask)
        fused = torch._fused_sdp_choice(
            _on_cpu(query), _on_cpu(key), _on_cpu(value), mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if not fused:
        return func(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out: torch.Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same form; its memory is never touched, so it takes none."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return like.requires_grad_(tensor.requires_grad)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _draws(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _free(func: Any, operands: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Whether nothing is read or written: all results are views, or memory not yet used."""
    if func._schema.is_mutable:
        return False
    if func.overloadpacket in _UNTOUCHED:
        return True
    held = {t.untyped_storage()._cdata for t in operands}
    return all(t.untyped_storage()._cdata in held for t in results)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements a tensor shows."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def _cost(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: list[torch.Tensor],
    results: list[torch.Tensor],
) -> tuple[float, float]:
    """(multiply-adds, bytes read and written) of one operation."""
    packet = func.overloadpacket
    written = sum(_bytes(t) for t in results or _written(func, args))
    read = sum(_bytes(t) for t in operands)
    if packet in _PICKED:
        place, picks = _PICKED[packet]
        read += (_bytes(results[0]) if picks else 0) - _bytes(args[place])
    elif packet in _SCATTERED:
        picked = args[2].numel() * args[0].element_size()
        read, written = read + picked - _bytes(args[0]), picked
    if packet in _TRANSCENDENTALS:
        return TRANSCENDENTAL * results[0].numel(), read + written
    if packet is aten.topk:
        return SELECTION * args[0].numel(), read + written
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return 2 * _scores(*args[:2]), read + written
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 5 * _scores(*args[1:3]), read + written
    if packet in flop_registry:
        out = results[0] if len(results) == 1 else tuple(results)
        return flop_registry[packet](*args, **kwargs, out_val=out) / 2, read + written
    return 0, read + written


def _written(func: Any, args: tuple[Any, ...]) -> Iterable[torch.Tensor]:
    """The operands that an operation without results writes to."""
    places = zip(func._schema.arguments, args, strict=False)
    return _tensors(arg for place, arg in places if place.is_write)


def _scores(query: torch.Tensor, key: torch.Tensor) -> int:
    """Multiply-adds of one product of attention: queries with keys, or scores with values."""
    return query.numel() * key.shape[-2]
