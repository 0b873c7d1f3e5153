"""Configs of the models that studies know by name, as published; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig


def _llama_3(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    head_dim: int,
    tied: bool,
    rope_factor: float,
) -> LlamaConfig:
    """A Llama 3.1 or 3.2 of text: all have 8 key/value heads and one vocabulary."""
    from transformers import LlamaConfig  # which takes seconds: names of models are asked sooner

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=128_000,
        eos_token_id=128_001,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def _gpt2() -> GPT2Config:
    """The smallest of its kind."""
    from transformers import GPT2Config

    return GPT2Config()


MODELS: Mapping[str, Callable[[], PretrainedConfig]] = MappingProxyType(
    {
        "llama-3.2-1b": lambda: _llama_3(2048, 8192, 16, 32, 64, True, 32.0),
        "llama-3.2-3b": lambda: _llama_3(3072, 8192, 28, 24, 128, True, 32.0),
        "llama-3.1-8b": lambda: _llama_3(4096, 14_336, 32, 32, 128, False, 8.0),
        "llama-3.1-70b": lambda: _llama_3(8192, 28_672, 80, 64, 128, False, 8.0),
        "gpt2": _gpt2,
    }
)
"""A fresh config by name."""


def model_config(name: str) -> PretrainedConfig:
    """The config of a model by name. Raises ValueError, naming the choices."""
    try:
        return MODELS[name]()
    except KeyError:
        raise ValueError(f"no model {name!r}; choose one of {', '.join(MODELS)}") from None
