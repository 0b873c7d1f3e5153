"""How large everything that is measured is: the shapes, and how often each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Matrix:
    """One direction of one linear group, and how often a step multiplies by it."""

    name: str
    inputs: int
    outputs: int
    count: int


def matrices_of(config: PretrainedConfig) -> tuple[Matrix, ...]:
    """What a Llama's worker multiplies by, forward and backward, the head being local."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    groups = {
        "q+k+v": (hidden, queries + 2 * keys),
        "o": (queries, hidden),
        "gate+up": (hidden, 2 * config.intermediate_size),
        "down": (config.intermediate_size, hidden),
    }
    both = []
    for name, (inputs, outputs) in groups.items():
        both.append(Matrix(f"{name} forward", inputs, outputs, layers))
        both.append(Matrix(f"{name} backward", outputs, inputs, layers))
    return tuple(both)


def llama_1b() -> PretrainedConfig:
    """Llama-3.2-1B."""
    from sim.models import model_config  # takes seconds, and not every part looks at the model

    return model_config("llama-3.2-1b")


@dataclass(frozen=True)
class Scale:
    """How large everything is. Tests use a tiny one, so that they run every line.

    model           makes its config
    layers          (in, out) of the single layers set against clear bf16
    layer_tokens    of their requests
    tokens          of any other request, and of a training step
    ragged          token counts whose products are compared bit for bit
    owner_tokens    token counts of the owner's work; the last one is judged
    square          side of the library's products
    copy_bytes      read and written by the copy that measures memory
    probe_steps     products one program of the tensor core probe does, each on its tile
    rounds          measurements, whose median counts
    repeats         actions in one measurement
    training_steps  of the whole run
    """

    model: Callable[[], PretrainedConfig] = llama_1b
    layers: tuple[tuple[int, int], ...] = ((2048, 8192), (8192, 2048), (2048, 2048))
    layer_tokens: int = 4096
    tokens: int = 2048
    ragged: tuple[int, ...] = (1, 7, 64, 255, 256, 257, 1000, 2048)
    owner_tokens: tuple[int, ...] = (1, 256, 2048)
    square: int = 8192
    copy_bytes: int = 1 << 31
    probe_steps: int = 2048
    rounds: int = 15
    repeats: int = 10
    training_steps: int = 5

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of the model."""
        return matrices_of(self.model())


FULL = Scale()
QUICK = Scale(ragged=(1, 257, 2048), owner_tokens=(2048,), rounds=5, training_steps=3)
