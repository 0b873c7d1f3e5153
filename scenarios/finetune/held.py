"""The held-out loss of a run through all its interruptions, and prompts for samples."""

from __future__ import annotations

import json
import math
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from backends.files import read_bounded, write_json
from backends.nn.checkpoint import data_tag
from backends.nn.corpus import Sequences
from backends.nn.marks import APART, ID_MOST, UNCOUNTED
from backends.nn.trainer import evaluate

NAME = "held-out.json"
_BYTES_MAX = 16 << 20
PROMPT_TOKENS = 24
SAMPLES = 2
"""Of prompts that are taken from the text, and how many: workers see both, so they are the same
whatever the text is."""
_ROWS_TRIED = 64


class HeldOut:
    """Losses on held-out sequences, in nats a token, kept in a file beside the checkpoints.

    The file has a tag of the sequences, under the checkpoints' key: a loss on others says nothing
    of these.

    points  (steps done, loss), of the steps that the run has come to
    """

    def __init__(
        self, sequences: Sequences, micro_batch: int, asked: int, checkpoints: Path, done: int
    ) -> None:
        """sequences: int64[n, S]; asked: as `evaluate` has it; done: steps of the run so far."""
        self._rows = sequences[: min(asked, len(sequences))]
        self._micro_batch, self._asked = micro_batch, asked
        self._path, self._tag = checkpoints.parent / NAME, data_tag(checkpoints, self._rows)
        found = _kept(self._path, self._tag) if done else []
        self.points = [(step, loss) for step, loss in found if step <= done]

    @property
    def base(self) -> float | None:
        """The base model's."""
        return next((loss for step, loss in self.points if step == 0), None)

    @property
    def last(self) -> float | None:
        """The newest."""
        return self.points[-1][1] if self.points else None

    def look(self, model: nn.Module, step: int) -> float:
        """The loss of a model after so many steps; of what was known, what is later is dropped.

        The model is in training mode afterwards. Raises FloatingPointError for a loss that is not
        finite.
        """
        loss = self._loss(model)
        self.points = [(s, known) for s, known in self.points if s < step] + [(step, loss)]
        self.keep()
        return loss

    def keep(self) -> None:
        """Write the points down."""
        write_json(self._path, {"of": self._tag, "points": self.points})

    def of_base(self, model: Any) -> float:
        """The base model's loss, under adapters that have learned something."""
        with model.disable_adapter():
            loss = self._loss(model)
        self.points.insert(0, (0, loss))
        return loss

    def _loss(self, model: nn.Module) -> float:
        loss = evaluate(model, self._rows, self._micro_batch, self._asked)
        model.train()
        if not math.isfinite(loss):
            raise FloatingPointError(
                "the held-out loss is not finite; lower the learning rate, or look at the data"
            )
        return loss


def _kept(path: Path, tag: str) -> list[tuple[int, float]]:
    """What an earlier run has written; nothing where that is damaged, or of other sequences."""
    try:
        found = json.loads(read_bounded(path, _BYTES_MAX))
        points = [(step, loss) for step, loss in found["points"]]
        right = found["of"] == tag and all(
            type(step) is int and type(loss) is float and math.isfinite(loss)
            for step, loss in points
        )
        return sorted(points) if right else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def beginnings(
    sequences: Sequences, fill: int, count: int = SAMPLES, size: int = PROMPT_TOKENS
) -> list[torch.Tensor]:
    """`count` prompts int64[1, size] from documents of int64[n, S], whatever these hold.

    Long ones first. A shorter one has `fill` before it; where there are fewer than `count` they
    are there again.

    fill  a token that nothing hangs on: the end of the text before
    """
    found: list[torch.Tensor] = []
    for row in sequences[: min(_ROWS_TRIED, len(sequences))]:
        starts = ((row & APART) != 0).nonzero().flatten()
        found += [_beginning(document, size) for document in row.tensor_split(starts)]
    longest = sorted((prompt for prompt in found if len(prompt)), key=len, reverse=True)[:count]
    nothing = torch.empty(0, dtype=torch.int64)
    taken = islice(cycle(longest or [nothing]), count)
    return [functional.pad(prompt, (size - len(prompt), 0), value=fill)[None] for prompt in taken]


def _beginning(document: torch.Tensor, size: int) -> torch.Tensor:
    """int64[at most size] of int64[n] marked tokens: what stands before an answer, or its end.

    Of a document that is counted from its second token on, as plain texts are, the beginning.
    """
    counts = ((document & UNCOUNTED) == 0).nonzero().flatten()
    if not len(counts):
        return document[:0]
    first = int(counts[0])
    end = first if first > 1 else min(size, len(document) - 1)
    return document[max(0, end - size) : end] & (ID_MOST - 1)
