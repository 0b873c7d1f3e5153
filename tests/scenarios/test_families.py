"""Families of models, fine-tuned under `thin` as in clear: a few steps of tiny random ones."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import private_lora as pl
from tests.nn.conftest import tokens

FAMILIES = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Phi3", "GPT2", "GPTNeoX", "OPT", "Falcon",
    "StableLm", "Olmo", "Olmo2", "Granite",
)  # fmt: skip
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "Falcon": {}, "GPT2": {}, "GPTNeoX": {"intermediate_size": 80},
    "Gemma3Text": {"head_dim": 16, "num_key_value_heads": 2, "intermediate_size": 80},
    "OPT": {"ffn_dim": 80, "word_embed_proj_dim": 64},
    "Qwen3": {"head_dim": 16, "num_key_value_heads": 2, "intermediate_size": 80},
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 80}


def made(maker: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The same random model every time, in evaluation mode as the private one is."""
    torch.manual_seed(0)
    return maker.from_config(copy.deepcopy(config)).eval()


def losses(model: nn.Module, labels: torch.Tensor, steps: int = 6) -> list[float]:
    """Of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    said = []
    for _ in range(steps):
        loss = model(input_ids=tokens(4, 16), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        said.append(loss.item())
    return said


def both(
    maker: Any, config: PretrainedConfig, labels: torch.Tensor, cache: Path, task: str
) -> list[list[float]]:
    """Losses in clear, on the floating base, and in private."""
    public = pl.prepare(made(maker, config), cache=cache)
    found = []
    for private in (False, True):
        model = made(maker, config)
        model = pl.remote(model, public) if private else model
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type=task)
        adapted = get_peft_model(model, lora)
        with pl.connect(adapted) if private else nullcontext():
            found.append(losses(adapted, labels))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_what_it_learns_in_clear(family: str, tmp_path: Path) -> None:
    """The last loss within 1 %, and what was learnt within 3 % of what there was to learn."""
    kind = getattr(transformers, f"{family}Config")
    config = kind(**(SIZES | MORE.get(family, GROUPED)))
    clear, private = both(AutoModelForCausalLM, config, tokens(4, 16), tmp_path, "CAUSAL_LM")
    assert private[-1] == pytest.approx(clear[-1], rel=0.01)
    assert clear[0] - clear[-1] > 0.1
    assert private[0] - private[-1] == pytest.approx(clear[0] - clear[-1], rel=0.03)


@pytest.mark.parametrize("kind", [BertConfig, LlamaConfig])
def test_sequences_are_classified(kind: type[PretrainedConfig], tmp_path: Path) -> None:
    """An encoder, and a decoder; the classifier stays here and is trained beside the adapters."""
    # As wide as the vocabulary: a linear of the base is not taken for the head.
    config = kind(**SIZES, intermediate_size=SIZES["vocab_size"], num_labels=3)
    labels = torch.tensor([0, 1, 2, 1])
    clear, private = both(
        AutoModelForSequenceClassification, config, labels, tmp_path, "SEQ_CLS"
    )  # fmt: skip
    assert private[-1] == pytest.approx(clear[-1], abs=0.01 * clear[0])  # it ends near 0
    assert clear[0] - clear[-1] > 0.1
