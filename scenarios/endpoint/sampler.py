"""Completions whose passes depend on what was asked for, and not on what is said.

A prompt is padded, on its left, to the length of all; then come as many passes as tokens may
follow, with as many rows as were asked for. What comes after an answer's end is thrown away.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from scenarios.endpoint.learner import Learner, Weights, picked
from scenarios.endpoint.requests import Lora, Sample

Sequences = list[tuple[bool, NDArray[np.int32], NDArray[np.float32]]]
"""Of each: whether it stopped by itself, tokens int32[n], their logprobs float32[n]."""

_TOKENS_MAX = 4096
"""Of one request to a worker."""

_COLDEST = 1e-4
"""Below, the likeliest token is sure; scores over it would overflow."""


class Sampler:
    """Completes with what a learner holds.

    ends    ids that end an answer, unless a request says otherwise
    decode  ids to text, for stops that are texts
    """

    def __init__(
        self, learner: Learner, ends: Sequence[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._learner, self._ends, self._decode = learner, tuple(ends), decode

    def run(
        self, request: Sample, lora: Lora | None, weights: Weights
    ) -> tuple[Sequences, NDArray[np.float32] | None]:
        """The samples; and the prompt's logprobs, float32[n], NaN at its first token, if asked."""
        with self._learner.sampling(lora, weights) as model, torch.random.fork_rng(devices=[]):
            torch.seed() if request.seed is None else torch.manual_seed(request.seed)
            before = self._prompt_logprobs(model, request.prompt) if request.prompt_too else None
            found: Sequences = []
            most = max(1, _TOKENS_MAX // self._learner.sequence)
            while len(found) < request.count:
                found += self._rows(model, request, min(most, request.count - len(found)))
        return found, before

    def _rows(self, model: PeftModel, request: Sample, rows: int) -> Sequences:
        width, length = self._learner.sequence, len(request.prompt)
        ids = torch.zeros(rows, width, dtype=torch.long)
        ids[:, width - length :] = torch.from_numpy(request.prompt)
        mask = torch.zeros_like(ids)
        mask[:, width - length :] = 1
        seen = _Logprobs(width)
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=_generation(request),
            logits_processor=LogitsProcessorList([seen]),
        )  # fmt: skip
        values = seen.all(out)
        found: Sequences = []
        for row, own in zip(out[:, width:].tolist(), values.numpy(), strict=True):
            end = self._end(row, request)
            count = len(row) if end is None else end
            found.append((end is not None, np.array(row[:count], np.int32), own[:count]))
        return found

    def _end(self, row: Sequence[int], request: Sample) -> int | None:
        """How many tokens there are up to the first stop, it included; None without one."""
        stop = self._ends if request.stop is None else request.stop
        found = next((n for n, token in enumerate(row, 1) if token in stop), None)
        texts = [each for each in stop if isinstance(each, str)]
        row = row[:found]

        def said(count: int) -> bool:
            words = self._decode(row[:count])
            return any(text in words for text in texts)

        if not texts or not said(len(row)):
            return found
        # A text may end within a token, and begin some tokens before: it is looked for in all of
        # them, and halving finds where it is whole without reading every beginning.
        return bisect_left(range(len(row)), True, lo=1, key=said)

    def _prompt_logprobs(self, model: PeftModel, prompt: NDArray[np.int64]) -> NDArray[np.float32]:
        ids = torch.zeros(1, self._learner.sequence, dtype=torch.long)
        ids[0, : len(prompt)] = torch.from_numpy(prompt)
        logits = model(input_ids=ids, use_cache=False).logits
        found = np.full(len(prompt), np.nan, np.float32)
        found[1:] = picked(logits[:, :-1], ids[:, 1:])[0, : len(prompt) - 1].numpy()
        return found


class _Logprobs(LogitsProcessor):
    """Takes the log-probability of each token once it is known, at temperature 1, so that no more
    than one step's logits are kept."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._last = torch.empty(0)
        self._found: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self._width:
            self._take(input_ids)
        self._last = scores.float()
        return scores

    def _take(self, ids: torch.Tensor) -> None:
        self._found.append(picked(self._last[:, None], ids[:, -1:])[:, 0])

    def all(self, ids: torch.Tensor) -> torch.Tensor:
        """float32[rows, tokens], of int64[rows, width + tokens]."""
        self._take(ids)
        return torch.stack(self._found, 1)


def _generation(request: Sample) -> GenerationConfig:
    """For exactly so many tokens: an end of text ends nothing."""
    greedy = request.temperature < _COLDEST
    chosen = {} if greedy else {
        "temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p,
    }  # fmt: skip
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=request.tokens, min_new_tokens=request.tokens, do_sample=not greedy,
        eos_token_id=None, pad_token_id=0, bos_token_id=None, **chosen,
    )  # fmt: skip
