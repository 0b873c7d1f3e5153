"""Greedy completion whose length does not depend on what is said.

A worker counts the requests it gets. A completion that ends where the model ends it would tell it
how long the model's answer was; here every completion takes the same passes, and what comes after
the end is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def complete(
    model: nn.Module,
    prompt: torch.Tensor,
    count: int,
    stop: int | None,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """The most likely `count` tokens after int64[1, S], up to the first `stop`.

    Always one pass over the prompt and count - 1 over a token each; both lengths are seen.

    on_token  is told of each token, those after `stop` too
    """
    model.eval()
    ids = prompt.to(next(model.parameters()).device)
    found: list[int] = []
    past = None
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            ids = out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
            on_token(found[-1])
    return found[: found.index(stop)] if stop in found else found
