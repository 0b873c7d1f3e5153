"""What of data is refused before the first step is taken on it."""

from __future__ import annotations

import math

from torch import nn

from backends.nn.corpus import Sequences
from backends.nn.packing import Facts
from backends.nn.texts import DataError
from backends.nn.trainer import evaluate

CUT_MOST = 0.25
"""Share of all tokens that may be cut off conversations."""


def require_counted(facts: Facts) -> None:
    """Raises DataError when no token is counted in the loss."""
    if not facts.counted:
        raise DataError(
            "no token of the text is counted in the loss: the assistant says nothing in it; look "
            "at --preview, or give --loss-on all"
        )


def require_little_cut(facts: Facts, most: float = CUT_MOST) -> None:
    """Raises DataError when more than this share of all tokens was cut off."""
    share = facts.cut / max(1, facts.tokens)
    if share > most:
        raise DataError(
            f"{share:.0%} of all tokens would be cut off, since their conversations are longer "
            f"than a sequence; more than {most:.0%} is refused: give a longer --sequence, or "
            "split the conversations"
        )


def require_learnable(
    model: nn.Module, sequences: Sequences, micro_batch: int, vocabulary: int
) -> float:
    """The base model's loss on the first sequences, as many as one pass takes, in nats a token.

    A worker is asked for one pass, as for any other. For models that have learned something: random
    weights are no better than guessing.

    model       with its linears connected, and adapters that do nothing yet
    vocabulary  how many ids it has

    Raises DataError when it is not finite, or worse than guessing.
    """
    loss = evaluate(model, sequences[: min(micro_batch, len(sequences))], micro_batch, micro_batch)
    guessing = math.log(vocabulary)
    if not math.isfinite(loss):
        raise DataError(
            f"the base model's loss on this text is {loss}: its numbers overflow, or none of these "
            "tokens is counted; is the checkpoint damaged, or made for another type of numbers?"
        )
    if loss > guessing:
        raise DataError(
            f"the base model's loss on this text is {loss:.2f}, where guessing has ln(vocabulary) "
            f"= {guessing:.2f}: is the tokenizer this model's, and its checkpoint whole?"
        )
    return loss
