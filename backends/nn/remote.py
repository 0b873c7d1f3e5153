"""Remote linears: modules without weights whose products a worker computes under encryption.

A *lane* is one micro-batch's forward and backward pass on its own thread. It runs ordinary
torch code and blocks where it meets a remote linear.

Modules fed the same tensor form a group: the first member that is called sends one ciphertext
for all of them, the others take their slice of the result; in backward autograd collects the
members' gradients into one tensor, which goes up once, and one input gradient comes down. The
group's outputs are kept per lane, until every member has taken its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from backends.he.interface import Values
from backends.he.manifest import GroupSpec
from backends.memory import Holes
from backends.nn.absent import AbsentWeight
from backends.nn.head import LocalHead

LinearFunction: TypeAlias = Callable[[int, Values], Values]
"""(matrix index, float32[T, K]) -> float32[T, N]; blocks until the product is there. Arrays, or
tensors where the owner's model is on a GPU."""


class NotConnectedError(RuntimeError):
    """A remote linear was used outside a session with a worker."""


@dataclass
class _Outputs:
    """What one group computed for one input in one lane."""

    x: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    waiting: set[int] = field(default_factory=set)


@dataclass(eq=False)
class RemoteGroup:
    """One group of a model: its place in the catalogue and its members' output sizes."""

    index: int
    spec: GroupSpec

    @property
    def forward_matrix(self) -> int:
        """Catalogue index of x -> x Wq^T."""
        return 2 * self.index

    @property
    def backward_matrix(self) -> int:
        """Catalogue index of dy -> dy Wq."""
        return 2 * self.index + 1


class Remote:
    """Connects a model's remote linears to a worker; one per model."""

    def __init__(self) -> None:
        self._linear: LinearFunction | None = None
        self._lane = threading.local()
        self._holes = Holes()
        self.recorder: Callable[[RemoteLinear, torch.Tensor], None] | None = None
        self.head: LocalHead | None = None

    @contextmanager
    def connected(self, linear: LinearFunction, head: LocalHead | None = None) -> Iterator[None]:
        """Within this context remote linears compute through `linear`.

        head  makes the backward product of a remote head
        """
        if self._linear is not None:
            raise NotConnectedError("this model is already connected to a worker")
        with self.instead(linear, head):
            yield

    @contextmanager
    def instead(self, linear: LinearFunction, head: LocalHead | None = None) -> Iterator[None]:
        """As `connected`, for a trial that no worker is to see, while no lane is at work."""
        former = self._linear, self.head
        self._linear, self.head = linear, head
        try:
            yield
        finally:
            self._linear, self.head = former

    def product(self, group: RemoteGroup, x: torch.Tensor) -> torch.Tensor:
        """x[..., K] -> [..., N], in x's dtype, through the worker."""
        y = self.compute(group.forward_matrix, _rows(x))
        return _like(y, x)

    def input_gradient(self, group: RemoteGroup, dy: torch.Tensor) -> torch.Tensor:
        """dy[..., N] -> [..., K], in dy's dtype, through the worker; a head's is the owner's."""
        rows = _rows(dy)
        if self.head is not None and self.head.group == group.index:
            dx = self.head.input_gradient(rows)
        else:
            dx = self.compute(group.backward_matrix, rows)
        return _like(dx, dy)

    def compute(self, matrix: int, rows: torch.Tensor) -> torch.Tensor:
        """float32[T, K] -> float32[T, N]; the one step a trace without numbers replaces."""
        if self._linear is None:
            raise NotConnectedError("remote linear called outside `with remote.connected(...)`")
        self._holes.look()
        operand = rows.numpy() if rows.device.type == "cpu" else rows
        return torch.as_tensor(self._linear(matrix, operand))

    def member_output(self, module: RemoteLinear, x: torch.Tensor) -> torch.Tensor:
        """This member's output for x, computing the whole group's when it is the first."""
        if self.recorder is not None:
            self.recorder(module, x)
            return x.new_zeros(*x.shape[:-1], module.out_features)
        group, slot = module.group, module.slot
        if group is None:
            raise NotConnectedError(f"{module.name} is in no group; call `discover_groups` first")
        kept: dict[int, _Outputs] = self._lane.__dict__.setdefault("kept", {})
        outputs = kept.get(group.index)
        if outputs is None or outputs.x is not x or slot not in outputs.waiting:
            # Whoever is first may want no gradients; the others do.
            with torch.set_grad_enabled(x.requires_grad):
                y = _GroupProduct.apply(x, self, group)  # type: ignore[no-untyped-call]
                parts = _split(y, group.spec.out_features)
            outputs = kept[group.index] = _Outputs(x, parts, set(range(len(parts))))
        outputs.waiting.discard(slot)
        if not outputs.waiting:
            del kept[group.index]
        return outputs.parts[slot]

    def forget_lane(self) -> None:
        """Drop what this lane kept, after a pass that was cut short."""
        self._lane.__dict__.pop("kept", None)


class _GroupProduct(torch.autograd.Function):
    """x[..., K] -> concatenated outputs [..., N]; backward sums over all members at once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, remote: Remote, group: RemoteGroup) -> torch.Tensor:
        ctx.remote, ctx.group = remote, group
        return remote.product(group, x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.remote.input_gradient(ctx.group, dy), None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32[T, n] of [..., n]; x's own memory where it can be."""
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32[T, m] as [..., m], in the dtype and with the leading sizes of x."""
    return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _split(y: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Each member's part of [..., N]; one's alone is y itself, whose gradient nothing copies."""
    return (y,) if len(sizes) == 1 else torch.split(y, list(sizes), dim=-1)


class RemoteLinear(nn.Linear):
    """A frozen linear whose weight lives on the worker. Takes the place of Linear or Conv1D.

    It is an nn.Linear so that `peft` wraps it like one; its own weight is empty. The bias, where
    there is one, stays with the owner and is added in clear.

    is_head  whether it is the model's language-model head
    """

    def __init__(
        self, remote: Remote, name: str, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = AbsentWeight(torch.empty(0, dtype=dtype), requires_grad=False)
        self.bias = None  # type: ignore[assignment]
        self.name = name
        self.is_head = False
        self.group: RemoteGroup | None = None
        self.slot = 0
        # Not a submodule or attribute torch would copy or save.
        object.__setattr__(self, "_remote", remote)

    @property
    def remote(self) -> Remote:
        """What computes it."""
        found: Remote = self._remote  # type: ignore[assignment]
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]. Raises ValueError for another last dimension."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.name}: takes [..., {self.in_features}], got {list(x.shape)}")
        y = self.remote.member_output(self, x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, remote"


def discover_groups(model: nn.Module, remote: Remote) -> tuple[list[GroupSpec], list[str]]:
    """Find which remote linears share an input, from one dry run, and tell each its group.

    The run feeds a few tokens through the model with zeros for every product; modules called in
    a row with the same tensor object form a group. Nothing is assumed about the architecture.

    Returns the groups, and the names of the remote linears that were not reached.
    """
    device = next(model.parameters()).device
    calls: list[tuple[RemoteLinear, torch.Tensor]] = []
    remote.recorder = lambda module, x: calls.append((module, x))
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
            model(input_ids=tokens, use_cache=False)
    finally:
        remote.recorder = None
    groups: list[list[RemoteLinear]] = []
    previous: torch.Tensor | None = None
    for module, x in calls:
        if any(module in group for group in groups):
            continue
        if previous is x:
            groups[-1].append(module)
        else:
            groups.append([module])
        previous = x
    reached = {module for group in groups for module in group}
    lost = [m.name for m in model.modules() if isinstance(m, RemoteLinear) and m not in reached]
    specs = []
    for index, members in enumerate(groups):
        spec = GroupSpec(
            _group_name([m.name for m in members]),
            tuple(m.name for m in members),
            members[0].in_features,
            tuple(m.out_features for m in members),
            precise=any(m.is_head for m in members),
        )
        specs.append(spec)
        shared = RemoteGroup(index, spec)
        for slot, module in enumerate(members):
            module.group, module.slot = shared, slot
    return specs, lost


def _group_name(names: list[str]) -> str:
    """'model.layers.0.self_attn.q_proj+k_proj+v_proj'."""
    prefix, _, _ = names[0].rpartition(".")
    return f"{prefix}." + "+".join(name.rpartition(".")[2] for name in names)
