"""LoRA adapters of several training clients over one remote model, and their steps.

All of it is called from one thread. What workers see is the same for any data: every pass holds
`batch` sequences of `sequence` tokens, the last one of a request filled up with padding, and every
forward_backward goes backward, whatever its weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from backends.errors import UserError
from backends.nn.remote import RemoteLinear
from scenarios.endpoint.fields import RequestError
from scenarios.endpoint.requests import Datum, Lora, Pass, Step

ALPHA = 32
"""Of every adapter, as the service that the client is made for has it."""
_ATTENTION = ("attn", "attention")

Weights = dict[str, torch.Tensor]
"""An adapter's tensors, by the names that `peft` stores them under."""


class NoSuchLinearsError(UserError, ValueError):
    """An adapter was asked for in a part that this model does not have."""


class Learner:
    """Adapters by name; `base` is the model without any.

    model     as `remote` gave it, connected
    sequence  tokens that every datum is padded to
    batch     data in a pass
    """

    def __init__(self, model: PreTrainedModel, sequence: int, batch: int) -> None:
        self.sequence, self._batch = sequence, batch
        remote = {n: m for n, m in model.named_modules() if isinstance(m, RemoteLinear)}
        self._remote = next(iter(remote.values())).remote
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = [n for n, m in model.named_modules() if m is head and n not in remote]
        self._attention = [n for n in remote if any(word in n for word in _ATTENTION)]
        self._mlp = [n for n in remote if n not in self._attention]
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        self._spoilt: set[str] = set()
        self._samplers, self._sampler = 0, "sampler0"
        self._lora = {self._sampler: Lora(1, bool(self._attention), not self._attention, False)}
        config = self.config(self._lora[self._sampler])
        self.model: PeftModel = get_peft_model(model, config, adapter_name=self._sampler)
        self._sampled: object = None

    def config(self, lora: Lora) -> LoraConfig:
        """As `peft` has it. Raises NoSuchLinearsError."""
        parts = (
            (lora.attention, self._attention),
            (lora.mlp, self._mlp),
            (lora.unembed, self._head),
        )
        names = [name for wanted, found in parts if wanted for name in found]
        if not names:
            raise NoSuchLinearsError("this model has none of the linears that are to be adapted")
        return LoraConfig(
            r=lora.rank, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM"
        )

    def create(self, name: str, lora: Lora, seed: int | None) -> None:
        """A new adapter, which changes nothing until it is trained."""
        with torch.random.fork_rng(devices=[]):
            torch.seed() if seed is None else torch.manual_seed(seed)
            self._add(name, lora)
        self._optimizers[name] = torch.optim.AdamW(self._parameters(name).values(), lr=0.0)

    def drop(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        if self._optimizers.pop(name, None) is not None:
            self.model.set_adapter(self._sampler)
            self.model.delete_adapter(name)
            del self._lora[name]
            self._spoilt.discard(name)

    def lora(self, name: str) -> Lora:
        """What an adapter is like."""
        return self._lora[name]

    def run(self, name: str, request: Pass) -> tuple[list[NDArray[np.float32]], float]:
        """(logprobs of the targets, float32[n] of each datum; the loss, summed over all tokens).

        Unless it is forward only, gradients are added to those since the last step.

        Raises RequestError for a loss that is not finite; whatever is raised, the next step is
        refused, as its gradients are not whole.
        """
        self.model.set_adapter(name)
        logprobs: list[NDArray[np.float32]] = []
        total = 0.0
        try:
            with torch.set_grad_enabled(not request.forward_only):
                for start in range(0, len(request.data), self._batch):
                    part = request.data[start : start + self._batch]
                    found, loss = self._pass(part, request)
                    if not math.isfinite(loss.item()):
                        raise RequestError("the loss is not finite: lower the learning rate")
                    if not request.forward_only:
                        loss.backward()  # type: ignore[no-untyped-call]
                    logprobs += found
                    total += loss.item()
        except BaseException:
            self._remote.forget_lane()
            if not request.forward_only:
                self.spoil(name)
            raise
        return logprobs, total

    def spoil(self, name: str) -> None:
        """Refuse the next step of an adapter: not all of its gradients were computed."""
        if name in self._optimizers:
            self._spoilt.add(name)

    def _pass(
        self, data: Sequence[Datum], request: Pass
    ) -> tuple[list[NDArray[np.float32]], torch.Tensor]:
        ids = self._padded([datum.tokens for datum in data])
        targets = self._padded([datum.targets for datum in data])
        inputs = {
            name: self._padded([datum.inputs[name] for datum in data])
            for name in data[0].inputs
        }  # fmt: skip
        logprobs = picked(self.model(input_ids=ids, use_cache=False).logits, targets)
        loss = _loss(request.loss, logprobs, inputs, request.config)
        values = logprobs.detach().numpy()
        return [row[: len(d.tokens)].copy() for row, d in zip(values, data, strict=False)], loss

    def _padded(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        """[batch, sequence]: each row, and zeros; what follows a token never changes it."""
        found = np.zeros((self._batch, self.sequence), rows[0].dtype)
        for place, row in zip(found, rows, strict=False):
            place[: len(row)] = row
        return torch.from_numpy(found)

    def step(self, name: str, request: Step) -> None:
        """One step with the gradients since the last one, which are then gone.

        Raises RequestError where there are none, or not all of them.
        """
        optimizer = self._optimizers[name]
        parameters = list(self._parameters(name).values())
        try:
            if name in self._spoilt:
                raise RequestError(
                    "a forward_backward before this step failed, so its gradients are not whole: "
                    "they were dropped and nothing was changed; send the data of this step again"
                )
            if all(p.grad is None for p in parameters):
                raise RequestError("no forward_backward since the last step: nothing to learn from")
            norm = nn.utils.clip_grad_norm_(parameters, request.clip or math.inf)
            if not norm.isfinite():
                raise RequestError(
                    "the gradients of this step are not finite: they were dropped and nothing was "
                    "changed; look at the logprobs, weights and advantages that were sent"
                )
            optimizer.param_groups[0].update(
                lr=request.learning_rate, betas=request.betas, eps=request.eps,
                weight_decay=request.weight_decay,
            )  # fmt: skip
            optimizer.step()
        finally:
            self._spoilt.discard(name)
            optimizer.zero_grad()

    def weights(self, name: str) -> Weights:
        """A copy of an adapter as it is now."""
        return {n: p.detach().clone() for n, p in self._parameters(name).items()}

    def moments(self, name: str) -> Weights:
        """A copy of what the optimiser knows; empty before the first step."""
        state = self._optimizers[name].state
        return {
            f"{key}/{n}": state[p][key].detach().clone()
            for n, p in self._parameters(name).items()
            for key in ("exp_avg", "exp_avg_sq", "step")
            if p in state
        }

    def shapes(self, lora: Lora) -> dict[str, tuple[int, ...]]:
        """Of the tensors of such an adapter."""
        self._fit_sampler(lora)
        return {n: tuple(p.shape) for n, p in self._parameters(self._sampler).items()}

    def restore(self, name: str, weights: Weights, moments: Weights) -> None:
        """Take saved tensors, of this adapter's shapes; without moments the optimiser begins."""
        own = self._parameters(name)
        optimizer = torch.optim.AdamW(own.values(), lr=0.0)
        for n, p in own.items():
            p.data.copy_(weights[n])
            p.grad = None
            if moments:
                optimizer.state[p] = {
                    key: moments[f"{key}/{n}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._optimizers[name] = optimizer
        self._spoilt.discard(name)

    @contextmanager
    def sampling(self, lora: Lora | None, weights: Weights) -> Iterator[PeftModel]:
        """The model with these weights for adapter, without gradients; lora None is the base."""
        try:
            with torch.no_grad():
                if lora is None:
                    with self.model.disable_adapter():
                        yield self.model
                    return
                self._load_sampler(lora, weights)
                self.model.set_adapter(self._sampler)
                yield self.model
        except BaseException:
            self._remote.forget_lane()
            raise

    def _load_sampler(self, lora: Lora, weights: Weights) -> None:
        if self._sampled is weights:
            return
        self._fit_sampler(lora)
        for n, p in self._parameters(self._sampler).items():
            p.data.copy_(weights[n])
        self._sampled = weights

    def _fit_sampler(self, lora: Lora) -> None:
        if self._lora[self._sampler] != lora:
            self._sampled, old = None, self._sampler
            self._samplers += 1
            self._sampler = f"sampler{self._samplers}"
            self._add(self._sampler, lora)
            self.model.set_adapter(self._sampler)
            self.model.delete_adapter(old)  # after: one is always there
            del self._lora[old]

    def _add(self, name: str, lora: Lora) -> None:
        with warnings.catch_warnings():  # of a tied head, which docs/endpoint.md has
            warnings.simplefilter("ignore")
            self.model.add_adapter(name, self.config(lora))
        self._lora[name] = lora

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Of an adapter, by the names that `peft` stores them under, in a fixed order."""
        mark = f".{name}."
        return {
            n.replace(mark, "."): p
            for n, p in sorted(self.model.named_parameters())
            if mark in n and "lora_" in n
        }


def picked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32[B, S] log-probabilities of int64[B, S] in [B, S, V]."""
    wide = logits.float()
    return wide.gather(-1, targets[..., None])[..., 0] - wide.logsumexp(-1)


def _loss(
    kind: str,
    logprobs: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    config: Mapping[str, float],
) -> torch.Tensor:
    """Summed over tokens; those of padding count nothing."""
    if kind == "cross_entropy":
        return -(inputs["weights"] * logprobs).sum()
    ratio = (logprobs - inputs["logprobs"]).exp()
    gain = ratio * inputs["advantages"]
    if kind == "ppo":
        low, high = config["clip_low_threshold"], config["clip_high_threshold"]
        gain = torch.minimum(gain, ratio.clamp(low, high) * inputs["advantages"])
    return -gain.sum()
