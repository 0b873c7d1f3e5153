"""The held-out loss of a run through all its interruptions, and prompts for samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backends.files import read_bounded, write_json
from backends.nn.corpus import Sequences
from backends.nn.marks import APART, ID_MOST, UNCOUNTED
from backends.nn.trainer import evaluate

NAME = "held-out.json"
_BYTES_MAX = 16 << 20
PROMPT_TOKENS = 24
"""Of every prompt that is taken from the text: a worker sees this number, so it is always the same.
"""
SAMPLES = 2
_ROWS_TRIED = 64


class HeldOut:
    """Losses on held-out sequences, in nats a token, kept in a file beside the checkpoints.

    points  (steps done, loss), of the steps that the run has come to
    """

    def __init__(
        self, sequences: Sequences, micro_batch: int, asked: int, path: Path, done: int
    ) -> None:
        """sequences: int64[n, S]; asked: as `evaluate` has it; done: steps of the run so far."""
        self._rows = sequences[: min(asked, len(sequences))]
        self._micro_batch, self._asked, self._path = micro_batch, asked, path
        found = _kept(path, asked) if done else []
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
        write_json(self._path, {"sequences": self._asked, "points": self.points})
        return loss

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


def _kept(path: Path, asked: int) -> list[tuple[int, float]]:
    """What an earlier run has written; nothing where that is damaged, or of other sequences."""
    try:
        found = json.loads(read_bounded(path, _BYTES_MAX))
        points = [(step, loss) for step, loss in found["points"]]
        right = found["sequences"] == asked and all(
            type(step) is int and type(loss) is float and math.isfinite(loss)
            for step, loss in points
        )
        return sorted(points) if right else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def beginnings(
    sequences: Sequences, count: int = SAMPLES, size: int = PROMPT_TOKENS
) -> list[torch.Tensor]:
    """Up to `count` prompts int64[1, size] from documents of int64[n, S].

    Of a conversation what stands before the first thing that is counted, an assistant's answer, or
    its end where that is long; of anything else the beginning.
    """
    found: list[torch.Tensor] = []
    for row in sequences[: min(_ROWS_TRIED, len(sequences))]:
        starts = [0, *(int(i) for i in ((row & APART) != 0).nonzero().flatten() if i)]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            counts = ((row[start:end] & UNCOUNTED) == 0).nonzero().flatten()
            if len(counts):
                cut = max(start + size, start + int(counts[0]))
                if cut < end:
                    found.append(row[None, cut - size : cut] & (ID_MOST - 1))
            if len(found) == count:
                return found
    return found
