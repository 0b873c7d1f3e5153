"""What a chaos run trains: two very small models, with real remote linears, LoRA and gradients.

    plain   an embedding, one gated block (two linears that share an input, one more), a head;
            in torch alone, so that a pass takes a millisecond
    llama   a one-layer Hugging Face Llama with `peft` adapters

Both are made once a process and put back to their first parameters for every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from backends.he.manifest import GroupSpec
from backends.he.openfhe import NAMES as OPENFHE
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.nn.adapters import add_lora, trainable
from backends.nn.remote import Remote, RemoteLinear, discover_groups
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig, Trainer

VOCABULARY = 32
HIDDEN = 16
INNER = 24
SEQUENCE = 6
MICRO_BATCH = 2
RANK = 2
TOKENS = SEQUENCE * MICRO_BATCH
KINDS = ("plain", "llama")
PRESETS = {"clear": "", "mlwe": "exact", "thin": "thin", **dict.fromkeys(OPENFHE, "")}
"""Of this project's cipher, by what a run is under; others need the weights alone."""

LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=SEQUENCE,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
BASE = RandomBase(LLAMA, 0, deviation=0.3)


class _Adapted(nn.Module):
    """A remote linear with a LoRA adapter beside it."""

    def __init__(self, base: RemoteLinear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(RANK, base.in_features))
        self.b = nn.Parameter(torch.empty(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.a), self.b)


class PlainModel(nn.Module):
    """A causal language model in miniature: each token sees the mean of those before it."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.embedding = nn.Parameter(
            BASE.get("embedding", torch.Size((VOCABULARY, HIDDEN))), requires_grad=False
        )
        self.gain = nn.Parameter(torch.ones(HIDDEN))

        def linear(name: str, inputs: int, outputs: int) -> _Adapted:
            return _Adapted(RemoteLinear(remote, name, inputs, outputs, torch.float32))

        self.gate = linear("gate", HIDDEN, INNER)
        self.up = linear("up", HIDDEN, INNER)
        self.down = linear("down", INNER, HIDDEN)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """int64[B, S] -> an object whose `logits` are float32[B, S, VOCABULARY]."""
        x = functional.embedding(input_ids, self.embedding)
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).reshape(1, -1, 1)
        x = x + torch.cumsum(x, dim=1) / counts
        h = functional.layer_norm(x, (HIDDEN,)) * self.gain
        h = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return SimpleNamespace(logits=functional.linear(h, self.embedding))


def _plain_weight(groups: Sequence[GroupSpec], module: str) -> torch.Tensor:
    """The frozen weight [out, in] of a linear of the plain model."""
    group = next(group for group in groups if module in group.members)
    outputs = group.out_features[group.members.index(module)]
    return BASE.get(module, torch.Size((outputs, group.in_features)))


@dataclass(frozen=True)
class Reference:
    """The fault-free run: parameters before any step and after each, and each step's mean loss."""

    states: tuple[dict[str, torch.Tensor], ...]
    losses: tuple[float, ...]


class Subject:
    """One of the two models, prepared for each cipher, and its fault-free runs."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self._directory = directory
        self._prepared: dict[str, PreparedModel] = {}
        if kind == "plain":
            self.remote = Remote()
            self.model: nn.Module = PlainModel(self.remote)
            self._groups, _ = discover_groups(self.model, self.remote)
            self._load_weight = lambda name: _plain_weight(self._groups, name)
        else:
            skeleton = build_skeleton(BASE)
            self.remote, self._groups = skeleton.remote, skeleton.groups
            self.model = add_lora(skeleton.model, RANK, 2 * RANK, seed=0)
            self._load_weight = skeleton.load_weight
        self.parameters = trainable(self.model)
        # Away from zero, where AdamW would turn the cipher's noise into steps of full size.
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters.values():
            if parameter.dim() == 2:  # the adapters' factors
                nn.init.normal_(parameter, std=0.2, generator=generator)
        self._initial = self.snapshot()
        self.weights = [np.array(w) for w in self.prepared("clear").worker_weights()]
        self.matrices = self.prepared("clear").owner_matrices()
        self._operands = [torch.from_numpy(weight.astype(np.float32)) for weight in self.weights]
        self._references: dict[tuple[TrainConfig, int], Reference] = {}

    def prepared(self, cipher: str) -> PreparedModel:
        """The model prepared for a cipher of PRESETS, made when it is first asked for."""
        if cipher not in self._prepared:
            self._prepared[cipher] = prepare(
                self._directory / self.kind / cipher,
                self._groups,
                self._load_weight,
                preset(name) if (name := PRESETS[cipher]) else None,
                lambda label, done: None,
            )
        return self._prepared[cipher]

    def reset(self) -> None:
        """Put every trainable parameter back to its first value."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._initial[name])

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable parameters."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def product(self, matrix: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[T, N] = x[T, K] times a matrix of the catalogue, with nothing in between."""
        facts, operand = self.matrices[matrix], self._operands[matrix // 2]
        values = torch.from_numpy(x * facts.in_scale)
        answer = values @ (operand.t() if matrix % 2 == 0 else operand)
        return answer.numpy() * facts.out_scale

    def reference(self, config: TrainConfig, data_seed: int) -> Reference:
        """The run without network, faults or resume; kept for the next run of its kind."""
        key = (config, data_seed)
        if key not in self._references:
            self.reset()
            trainer = Trainer(self.model, sequences(data_seed), config)
            states = [self.snapshot()]
            with self.remote.connected(self.product):
                losses = trainer.train(lambda step, loss: states.append(self.snapshot()))
            self._references[key] = Reference(tuple(states), tuple(losses))
        return self._references[key]


@cache
def sequences(seed: int) -> torch.Tensor:
    """Private data: int64[16, SEQUENCE]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (16, SEQUENCE), generator=generator)


def as_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Every bit of some named tensors, in order of their names."""
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of parameters."""
    total: Any = sum(((a[name] - b[name]).double() ** 2).sum() for name in a)
    return float(total) ** 0.5
