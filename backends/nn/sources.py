"""A public base model, wherever its weights come from: what the owner's side is built from.

`backends.nn.base` opens checkpoints. Here is what all bases have in common, and those that need no
file: seeded random weights, and a model that is in memory already.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backends.errors import UserError
from backends.nn.remote import RemoteLinear
from backends.nn.tables import map_input_table, table_place


class CheckpointError(UserError, ValueError):
    """A base model is missing, incomplete, not what its config says, or of a kind that does not
    work here; the text says which and what to do."""


@dataclass
class Loaded:
    """A base model whose remote linears have no weights, and where those are.

    read  name of a remote linear -> its weight as the module stores it: [out, in], or of a Conv1D
          [in, out]; floating, on the CPU. May be called in several threads.
    notes what a user should know of the loading, a line each
    """

    model: PreTrainedModel
    read: Callable[[str], torch.Tensor]
    notes: tuple[str, ...] = ()


class Base(ABC):
    """One public base model."""

    config: PretrainedConfig

    def outline(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model without numbers: parameters on the meta device, buffers real.

        Raises CheckpointError when transformers cannot make one of this config.
        """
        return outline_of(self.config, dtype)

    @abstractmethod
    def load(
        self, dtype: torch.dtype, remote: Collection[str], tables: Path | None = None
    ) -> Loaded:
        """The model in `dtype`; weights of the linears named in `remote` stay where they are.

        tables  a directory for an embedding that is then mapped (`map_input_table`)
        """

    @abstractmethod
    def identity(self) -> str:
        """Hex digest that changes when any weight may have changed."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people: where the weights are from."""

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What the model says in clear to int64[B, S], by the code of transformers alone.

        float[B, S, vocabulary]; None where there is no independent way to it.
        """
        return None


def outline_of(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model of a config, its parameters on the meta device.

    Raises CheckpointError with what transformers says when it cannot make one.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:  # of any model's own code, fed with any config
        raise CheckpointError(
            f"transformers cannot build a causal language model of this config "
            f"({config.model_type}): {first_line(error)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def first_line(error: BaseException) -> str:
    """An error of somebody else's code, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = 2 if lines and lines[0].endswith(":") else 1  # what is wrong is below
    text = " ".join(lines[:told]) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


class RandomBase(Base):
    """Seeded random weights of the right shapes, for systems work without a checkpoint."""

    def __init__(self, config: PretrainedConfig, seed: int, deviation: float = 0.02) -> None:
        self.config = config
        self._seed = seed
        self._deviation = deviation

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor of that name: fp32 of `shape`."""
        if "norm" in name or name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        text = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
        out = torch.empty(shape)
        return out.normal_(0.0, self._deviation, generator=generator)

    def load(
        self, dtype: torch.dtype, remote: Collection[str], tables: Path | None = None
    ) -> Loaded:
        """Tied weights are one tensor, named as the model names it first."""
        model = self.outline(dtype)
        shapes = {f"{name}.weight": model.get_parameter(f"{name}.weight").shape for name in remote}
        tied = model.all_tied_weights_keys if self.config.tie_word_embeddings else {}
        for name, parameter in list(model.named_parameters()):
            if name not in tied and name not in shapes:
                owner, _, leaf = name.rpartition(".")
                value = self.get(name, parameter.shape).to(dtype)
                frozen = nn.Parameter(value, requires_grad=False)
                setattr(model.get_submodule(owner), leaf, frozen)
        model.tie_weights()
        if tables is not None:
            map_input_table(model, remote, [], table_place(tables, self.identity(), dtype))

        def read(module: str) -> torch.Tensor:
            name = f"{module}.weight"
            return self.get(tied.get(name, name), shapes[name])

        return Loaded(model, read)

    def identity(self) -> str:
        return hashlib.sha256(f"random:{self._seed}:{self._deviation}".encode()).hexdigest()

    def describe(self) -> str:
        return f"random weights from seed {self._seed} (no checkpoint was given)"


class HeldBase(Base):
    """A model that is in memory already. It is changed in place.

    Raises CheckpointError for one that is quantised, or already has adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise CheckpointError(
                f"a {type(model).__name__} is no PreTrainedModel of transformers; give the base "
                "model, and add adapters afterwards"
            )
        if any("lora_" in name for name, _ in model.named_parameters()):
            raise CheckpointError("the model has adapters already; add them afterwards")
        for name, module in model.named_modules():
            if isinstance(module, RemoteLinear):
                raise CheckpointError(
                    f"{name} is remote already, and its weights are with the workers; load the "
                    "model again"
                )
            if isinstance(module, nn.Linear | Conv1D) and not module.weight.is_floating_point():
                raise CheckpointError(
                    f"{name} holds {module.weight.dtype}: the model was loaded quantised; load it "
                    "in a floating type, workers make int8 weights of their own"
                )
        self.config = model.config
        self._model = model
        self._identity: str | None = None
        self._before: torch.Tensor | None = None
        self._held: list[tuple[str, nn.Module]] = []
        self._trained = [p for p in model.parameters() if p.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self._model.dtype

    def outline(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model itself, which has numbers."""
        return self._model

    def load(
        self, dtype: torch.dtype, remote: Collection[str], tables: Path | None = None
    ) -> Loaded:
        """It keeps the type it has, and all of it in memory."""
        self.identity()
        self._before = self._clear_logits(probe_tokens(self.config))
        wanted = {id(self._model.get_submodule(name)) for name in remote}
        self._held = [
            (name, module)
            for name, module in self._model.named_modules(remove_duplicate=False)
            if id(module) in wanted
        ]
        weights = {name: self._model.get_parameter(f"{name}.weight").detach() for name in remote}
        return Loaded(self._model, lambda module: weights[module].cpu())

    def give_back(self) -> None:
        """Make the model what it was before `load`, in evaluation mode."""
        for name, module in self._held:
            self._model.set_submodule(name, module)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._model.__dict__.pop("train", None)

    def give_up(self) -> None:
        """Let go of the weights of the linears that went remote."""
        self._held, self._trained = [], []

    def _clear_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self._model.eval()  # type: ignore[no-untyped-call]
            found = self._model(input_ids=tokens.to(self._model.device), use_cache=False)
        logits: torch.Tensor = found.logits
        return logits.float().cpu()

    def identity(self) -> str:
        """Of its config, and all its tensors as they were before it was changed."""
        if self._identity is None:
            stated = self.config.to_dict()
            for key in ("transformers_version", "_name_or_path"):
                stated.pop(key, None)
            text = json.dumps(stated, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode())
            for name, tensor in self._model.state_dict().items():
                digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                whole = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(whole.view(torch.uint8).numpy())
            self._identity = digest.hexdigest()
        return self._identity

    def describe(self) -> str:
        name = self.config.name_or_path
        return f"the {type(self._model).__name__} in memory{f' ({name})' if name else ''}"

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """As it answered to `probe_tokens` before it was changed."""
        return self._before


def probe_tokens(config: PretrainedConfig) -> torch.Tensor:
    """int64[2, 6]: what a model is tried with. Both rows agree but for their last token."""
    vocabulary = config.get_text_config(decoder=True).vocab_size
    first = torch.tensor([5, 17, 3, 11, 29, 7]) % vocabulary
    second = first.clone()
    second[-1] = (first[-1] + 1 + vocabulary // 2) % vocabulary
    return torch.stack((first, second))
