"""Keeping less for backward changes no bit of a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig

from backends.nn import lean as module
from backends.nn.adapters import trainable
from backends.nn.lean import lean
from backends.nn.losses import token_losses

WIDE = {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 160}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig(**WIDE), 2 * 2 * 160 + 2 * 48),
    "gemma": (GemmaConfig(**WIDE), 2 * 2 * 160 + 2 * 48),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0,
                        embd_pdrop=0, attn_pdrop=0), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of gated layers the two arrays that are cheapest to make again are not kept."""
    monkeypatch.setattr(module, "_LEAST_VALUES", 1)
    config, spared = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    ids = torch.randint(0, 96, (2, 20))
    parameters = list(trainable(model).values())
    wanted = torch.autograd.grad(token_losses(model, ids), parameters)
    recipes: list[int] = []
    keep = module._keep

    def counted(array: torch.Tensor) -> object:
        kept = keep(array)
        if isinstance(kept, module._Recipe):
            recipes.append(kept.shape.numel())
        return kept

    monkeypatch.setattr(module, "_keep", counted)
    with lean():
        loss = token_losses(model, ids)
    found = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert sum(recipes) >= ids.numel() * min(spared, 2 * 2 * 160)


CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a product that is viewed": lambda x, y: (x * y).view(-1) ** 2,
    "of a part of it": lambda x, y: (x * y)[1:] ** 2,
    "that is turned": lambda x, y: (x * y).t().contiguous() ** 2,
    "with itself": lambda x, y: (x * x) ** 3,
    "of another shape": lambda x, y: (x * y[:1]) ** 2,
    "with what needs no gradient": lambda x, y: (x * y.detach()) ** 2 + (y.detach() * x) ** 2,
    "with a number": lambda x, y: (2.0 * x) ** 2,
    "that is changed": lambda x, y: (x * y).mul_(3.0) ** 2,
    "of products": lambda x, y: ((x * y) * functional.silu(x * y)) ** 2,
    "of activations": lambda x, y: (functional.silu(x) * functional.gelu(y)) ** 2,
    "in another type": lambda x, y: (x.double() * y).float() ** 2,
    "tanh's gelu": lambda x, y: functional.gelu(x * y, approximate="tanh") ** 2,
}


@pytest.mark.parametrize("name", CASES)
def test_any_way_to_an_array_gives_its_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST_VALUES", 1)
    torch.manual_seed(0)
    x, y = (torch.randn(6, 5, requires_grad=True) for _ in range(2))

    def gradients() -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(out.sum(), [x, y], allow_unused=True)

    out = CASES[name](x, y)
    wanted = gradients()
    with lean():
        out = CASES[name](x, y)
    for found, right in zip(gradients(), wanted, strict=True):
        assert (found is None) == (right is None)
        assert found is None or torch.equal(found, right)  # type: ignore[arg-type]
