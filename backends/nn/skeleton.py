"""Builds the owner's side of a model: everything local real, every frozen linear remote.

transformers loads the model, but for the weights of its linears, which stay where they are. The
linears are swapped for weightless remote ones. What text never reaches (a vision tower) stays with
the owner whole, and so do weights that are in no linear, such as those of a mixture's experts:
which expert takes which token would show in what is sent.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backends.defaults import LEAST_REMOTE
from backends.he.manifest import GroupSpec
from backends.he.store import PreparedModel
from backends.nn.head import LocalHead
from backends.nn.remote import Remote, RemoteLinear, discover_groups
from backends.nn.sane import require_finite
from backends.nn.selfcheck import require_causal
from backends.nn.sources import Base, CheckpointError, first_line

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Skeleton:
    """An owner's model before adapters are added.

    shapes        [out, in] of every remote module, by name
    transposed    names of remote modules whose stored weight is [in, out] (Conv1D)
    remote_share  of the frozen weights that text meets, but embeddings and head, workers compute
                  this, 0 to 1
    notes         what a user should know of the model, a line each
    head          the name of the language-model head where that is remote
    """

    base: Base
    model: PreTrainedModel
    remote: Remote
    groups: list[GroupSpec]
    shapes: dict[str, torch.Size]
    transposed: frozenset[str]
    remote_share: float
    notes: tuple[str, ...]
    read: Callable[[str], torch.Tensor]
    head: str | None = None

    @property
    def adapted(self) -> list[str]:
        """Names of the modules that get adapters: all remote ones but the head.

        One there would add arrays as wide as the vocabulary to every pass.
        """
        return [name for name in self.shapes if name != self.head]

    @property
    def _head_place(self) -> int | None:
        """Of a remote head among the groups."""
        return next((i for i, group in enumerate(self.groups) if self.head in group.members), None)

    @property
    def unasked(self) -> frozenset[int]:
        """Matrices that workers are never asked for: the backward one of a remote head."""
        place = self._head_place
        return frozenset() if place is None else frozenset((2 * place + 1,))

    def local_head(self, prepared: PreparedModel) -> LocalHead | None:
        """What makes a remote head's backward product; None for a local head."""
        place = self._head_place
        if place is None:
            return None
        backward = prepared.owner_matrices()[2 * place + 1]
        return LocalHead.of(place, prepared.worker_weights()[place], backward)

    def load_weight(self, module: str) -> torch.Tensor:
        """The floating weight [out, in] of a remote module, on the CPU.

        Raises CheckpointError for one that is not finite.
        """
        weight = self.read(module)
        if weight.dtype not in _FLOATING:
            raise CheckpointError(
                f"{module}.weight holds {weight.dtype}: it is quantised, and the scales that its "
                "config promises are not there; give the checkpoint that it was quantised from"
            )
        if not weight.isfinite().all():
            raise CheckpointError(
                f"{module}.weight of the base model holds NaN or infinity: it is damaged"
            )
        return weight.t() if module in self.transposed else weight


def build_skeleton(
    base: Base,
    remote_head: bool = False,
    dtype: torch.dtype = torch.float32,
    remote: Remote | None = None,
    least_remote: float = LEAST_REMOTE,
    tables: Path | None = None,
) -> Skeleton:
    """The owner's model of a base.

    remote_head   send the language-model head to the workers too
    remote        what computes the remote linears, where it is not a plain `Remote`; the model is
                  then not tried
    least_remote  the least `remote_share` that is accepted
    tables        a directory for tables that are to be mapped; None has them all in memory

    Raises CheckpointError when the base cannot be loaded or is of a kind that does not work here.
    """
    checked = remote is None
    outline = base.outline(dtype)
    names = _linears(outline, remote_head)
    loaded = base.load(dtype, names, tables)
    model, remote = loaded.model, remote or Remote()
    head_module = _head(model)
    transposed = frozenset(n for n in names if isinstance(model.get_submodule(n), Conv1D))
    head = next((name for name in names if model.get_submodule(name) is head_module), None)
    shells = _swap(model, names, remote, dtype)
    if head is not None:
        shells[head].is_head = True
    model.requires_grad_(False)
    _stay_in_evaluation(model)
    require_finite(model)
    try:
        groups, unreached = discover_groups(model, remote)
    except Exception as error:  # of any model's own code
        raise CheckpointError(
            f"{type(model).__name__} does not work with its linears elsewhere: {first_line(error)}"
        ) from error
    shapes = {n: torch.Size((s.out_features, s.in_features)) for n, s in shells.items()}
    skeleton = Skeleton(
        base, model, remote, groups, shapes, transposed, 0.0, loaded.notes, loaded.read,
        None if head in unreached else head,
    )  # fmt: skip
    for name in unreached:
        _restore(skeleton, name, dtype)
    skeleton.remote_share = _require_share(skeleton, least_remote, unreached)
    skeleton.notes += _remarks(model, unreached)
    if checked:
        require_causal(model, remote, groups)
    return skeleton


def _linears(model: PreTrainedModel, remote_head: bool) -> list[str]:
    head = _head(model)
    # What stands on a base without a language-model head is new, and trained: a classifier.
    reached: nn.Module = model.base_model if head is None else model
    within = set(reached.modules())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module in within
        and (remote_head or module is not head)
    ]


def _head(model: PreTrainedModel) -> nn.Module | None:
    """Its language-model head; where it does not say, the linear as wide as the vocabulary."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        return head
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    base = model.base_model
    within = set() if base is model else set(base.modules())  # of these some are as wide by chance
    wide = [
        m for m in model.modules()
        if isinstance(m, nn.Linear) and m.out_features == vocabulary and m not in within
    ]  # fmt: skip
    return wide[-1] if wide else None


def _swap(
    model: nn.Module, names: Iterable[str], remote: Remote, dtype: torch.dtype
) -> dict[str, RemoteLinear]:
    """Put shells in the place of these linears, wherever they are."""
    shells = {name: _shell(remote, name, model.get_submodule(name), dtype) for name in names}
    by_module = {id(model.get_submodule(name)): shell for name, shell in shells.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_module:
            model.set_submodule(name, by_module[id(module)])
    return shells


def _shell(remote: Remote, name: str, module: Any, dtype: torch.dtype) -> RemoteLinear:
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    else:
        outputs, inputs = module.weight.shape
    shell = RemoteLinear(remote, name, inputs, outputs, dtype)
    if module.bias is not None:
        shell.bias = module.bias
    return shell


def _restore(skeleton: Skeleton, name: str, dtype: torch.dtype) -> None:
    """Give a module that is not to be remote its weights back."""
    shell: Any = skeleton.model.get_submodule(name)
    outputs, inputs = skeleton.shapes.pop(name)
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=False)
    weight = skeleton.load_weight(name).to(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = shell.bias
    for other, module in list(skeleton.model.named_modules(remove_duplicate=False)):
        if module is shell:
            skeleton.model.set_submodule(other, linear)


def _stay_in_evaluation(model: PreTrainedModel) -> None:
    """The base never trains: its dropout would differ between lanes, and on resuming."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    model.eval()  # type: ignore[no-untyped-call]
    model.train = types.MethodType(train, model)  # type: ignore[method-assign]


def _require_share(skeleton: Skeleton, least: float, unreached: Collection[str]) -> float:
    model = skeleton.model
    apart = {id(model.get_input_embeddings()), id(_head(model))}
    kept: dict[str, int] = {}
    for name, module in model.named_modules():
        if id(module) in apart or name in unreached:
            continue
        if isinstance(module, nn.Embedding | RemoteLinear):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                kept[f"{name}.{leaf}"] = parameter.numel()
    there = sum(shape.numel() for shape in skeleton.shapes.values())
    share = there / max(1, there + sum(kept.values()))
    if not there:
        raise CheckpointError(f"{type(model).__name__} has no linear that workers could compute")
    if share < least:
        largest = max(kept, key=kept.__getitem__)
        experts = " (experts: which one takes a token would show in what is sent)"
        raise CheckpointError(
            f"workers could compute only {share:.0%} of the weights of this "
            f"{type(model).__name__}, less than {least:.0%}: the rest is in no linear, as "
            f"{largest}{experts if 'expert' in largest else ''}; choose a dense model, or lower "
            "--least-remote and compute the rest yourself"
        )
    return share


def _remarks(model: PreTrainedModel, unreached: list[str]) -> tuple[str, ...]:
    remarks = []
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    for key, value in model.config.get_text_config(decoder=True).to_dict().items():
        if ("drop" in key) and isinstance(value, float) and value > 0:
            rates.add(value)
    if rates:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        remarks.append(f"the base's own dropout ({shown}) is off, in training too")
    if unreached:
        remarks.append(
            f"{len(unreached)} linears that text did not reach stay with you ({unreached[0]}, ...)"
        )
    return tuple(remarks)
