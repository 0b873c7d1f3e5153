"""Builds the owner's side of a model: everything local real, every frozen linear remote.

The transformer is made on the meta device, its linears are swapped for weightless remote ones,
and only what the owner keeps (embeddings, norms, biases, the head unless it is remote) is read
from the checkpoint. The model is never in memory whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backends.he.manifest import GroupSpec
from backends.nn.remote import Remote, RemoteLinear, discover_groups
from backends.nn.sane import require_finite
from backends.nn.sources import WeightSource


@dataclass
class Skeleton:
    """An owner's model before adapters are added.

    shapes      [out, in] of every remote module, by name
    transposed  names of remote modules whose stored weight is [in, out] (Conv1D)
    aliases     tensors stored under another name: a tied head is the embedding
    """

    model: PreTrainedModel
    remote: Remote
    groups: list[GroupSpec]
    shapes: dict[str, torch.Size]
    transposed: frozenset[str]
    aliases: dict[str, str]

    def load_weight(self, source: WeightSource, module: str) -> torch.Tensor:
        """The float weight [out, in] of a remote module."""
        shape = self.shapes[module]
        name = f"{module}.weight"
        name = self.aliases.get(name, name)
        if module in self.transposed:
            return source.get(name, torch.Size(reversed(shape))).t()
        return source.get(name, shape)


def build_skeleton(
    config: PretrainedConfig,
    source: WeightSource,
    remote_head: bool = False,
    dtype: torch.dtype = torch.float32,
    remote: Remote | None = None,
) -> Skeleton:
    """The owner's model for a causal-LM config.

    remote_head  send the language-model head to the worker too
    remote       what computes the remote linears, where it is not a plain `Remote`
    Raises CheckpointError when the source lacks a tensor, ValueError for no linear to send.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    remote = remote or Remote()
    head = model.get_output_embeddings()
    aliases = {}
    if config.tie_word_embeddings:
        aliases[f"{_name(model, head)}.weight"] = (
            f"{_name(model, model.get_input_embeddings())}.weight"
        )
    transposed = set()
    shapes: dict[str, torch.Size] = {}
    for name, module in list(model.named_modules()):
        if module is head and not remote_head:
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        swapped = _shell(remote, name, module, dtype)
        if isinstance(module, Conv1D):
            transposed.add(name)
        model.set_submodule(name, swapped)
        shapes[name] = torch.Size((swapped.out_features, swapped.in_features))
    if not shapes:
        raise ValueError(f"{type(model).__name__} has no linear layer to compute remotely")
    _load_local(model, source, dtype, skip=frozenset(aliases))
    if config.tie_word_embeddings and not remote_head:
        model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    require_finite(model)
    groups = discover_groups(model, remote)
    return Skeleton(model, remote, groups, shapes, frozenset(transposed), aliases)


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _shell(
    remote: Remote, name: str, module: nn.Linear | Conv1D, dtype: torch.dtype
) -> RemoteLinear:
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    else:
        outputs, inputs = module.weight.shape
    shell = RemoteLinear(remote, name, inputs, outputs, dtype)
    if module.bias is not None:
        shell.bias = nn.Parameter(torch.empty(outputs, device="meta"), requires_grad=False)
    return shell


def _load_local(
    model: nn.Module, source: WeightSource, dtype: torch.dtype, skip: frozenset[str]
) -> None:
    """Replace every meta parameter, but those to skip, by the checkpoint's tensor."""
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        if name in skip:
            continue
        tensor = source.get(name, parameter.shape).to(dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
