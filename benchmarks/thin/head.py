"""A remote language-model head: how far its input's gradient is off, through the real cipher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backends.he.manifest import GroupSpec
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from backends.he.preparation import prepare
from backends.he.quantise import dequantise
from backends.he.store import PreparedModel
from backends.nn.head import LARGEST, SAMPLED, LocalHead
from backends.nn.losses import cross_entropy
from benchmarks.thin.training import documentation

VOCABULARY, HIDDEN, TOKENS = 128_256, 2048, 256
WARM_UP = 3
"""Passes before the one that counts: the first request has a gain of 1."""
_CANDIDATES = 32
_PRIOR_LENGTH = 20.0


def peaked(vocabulary: int, hidden: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(head float32[V, K], hidden states float32[T, K]) whose softmax is like a trained model's.

    Words are as frequent as Zipf says, by one direction of the hidden states; in each token a few
    of them, drawn so, have most of the probability, in shares that fall as Zipf's, steeper here
    and flatter there.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    ranks = torch.randperm(vocabulary, generator=generator) + 1.0
    prior = torch.log(1 / (ranks + 2.7))
    prior -= prior.mean()
    direction = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    weight += torch.outer(prior / _PRIOR_LENGTH, direction)
    few = min(_CANDIDATES, vocabulary // 2)
    drawn = torch.multinomial(prior.exp().expand(tokens, -1), few, generator=generator)
    steep = torch.empty(tokens, 1).uniform_(0.7, 2.5, generator=generator)
    shares = torch.softmax(-steep * torch.arange(1.0, few + 1).log(), dim=1)
    rest = torch.exp(torch.empty(tokens, 1).uniform_(-4.5, -0.5, generator=generator))
    wanted = torch.log(shares * (1 - rest) / rest) + torch.logsumexp(prior, 0)
    above = (wanted - prior[drawn]).clamp(min=0)
    states = torch.stack([a @ weight[w] for a, w in zip(above, drawn, strict=True)])
    return weight, states + _PRIOR_LENGTH * direction


@torch.no_grad()
def of_checkpoint(directory: Path, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A real model's head and hidden states, of Python's documentation."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = documentation(AutoTokenizer.from_pretrained(directory), tokens)
    states = model.base_model(input_ids=text[:1], use_cache=False).last_hidden_state
    return model.get_parameter("lm_head.weight").detach().clone(), states[0].clone()


def measure(
    weight: torch.Tensor, states: torch.Tensor, parameters: Parameters, cache: Path
) -> dict[str, Any]:
    """Relative errors of logits and of the hidden states' gradient, against the int8 head in clear.

    weight  float32[V, K]; states float32[T, K]. The word that follows is drawn from what the head
            says itself, as for a model that knows how sure it is.
    """
    vocabulary, hidden = weight.shape
    group = GroupSpec("lm_head", ("lm_head",), hidden, (vocabulary,), precise=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="head-", dir=cache) as directory:
        prepared = prepare(
            Path(directory) / "model", [group], lambda name: weight, parameters,
            lambda label, done: None,
        )  # fmt: skip
        return _measure(prepared, states, parameters)


def _measure(
    prepared: PreparedModel, states: torch.Tensor, parameters: Parameters
) -> dict[str, Any]:
    forward, backward = prepared.owner_matrices()
    (codes,) = prepared.worker_weights()
    exact = dequantise(codes, forward.out_scale, np.reciprocal(forward.in_scale))
    product = _products(prepared, parameters)
    head = LocalHead.of(0, codes, backward)
    logits = states @ exact.T
    generator = torch.Generator().manual_seed(2)
    chances = torch.softmax(logits, dim=1)
    targets = torch.multinomial(chances, 1, generator=generator)[:, 0]
    top = chances.amax(dim=1).mean().item()
    del chances
    dy, loss = _gradient(logits, targets)
    right = dy @ exact
    for _ in range(WARM_UP + 1):
        private_logits = product(0, states)
        private_dy, private_loss = _gradient(private_logits, targets)
        found = head.input_gradient(private_dy)
    alone = head.input_gradient(dy)
    encrypted = product(1, dy)
    return {
        "vocabulary": len(exact),
        "hidden": exact.shape[1],
        "tokens": len(states),
        "largest": LARGEST,
        "sampled": SAMPLED,
        "formats": [f"{m.plan.up_bits}/{m.plan.down_bits}" for m in (forward, backward)],
        "mean_top_probability": top,
        "loss": loss,
        "private_loss": private_loss,
        "logits_error": _off(private_logits, logits),
        "gradient_error": _off(found, right),
        "gradient_error_backward_alone": _off(alone, right),
        "gradient_error_encrypted": _off(encrypted, right),
    }


def _products(
    prepared: PreparedModel, parameters: Parameters
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """(0 forward or 1 backward, float32[T, K]) -> float32[T, N], under encryption."""
    owner, worker = MlweOwner(parameters, prepared.public_matrix()), MlweWorker()
    prepared.guard(owner)
    matrices = prepared.owner_matrices()
    loaded = [worker.load(m.weight, m.forward, m.format) for m in prepared.worker_matrices()]

    def product(index: int, rows: torch.Tensor) -> torch.Tensor:
        made = owner.encrypt(rows.contiguous().numpy(), matrices[index])
        answer = worker.multiply(made.payload, len(rows), loaded[index])
        return torch.from_numpy(owner.decrypt(made.sealed, answer, matrices[index]))

    return product


def _gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(of the mean loss by the logits, that loss in nats)."""
    leaf = logits.detach().requires_grad_(True)
    loss = cross_entropy(leaf, targets) / len(targets)
    return torch.autograd.grad(loss, leaf)[0], loss.item()


def _off(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()
