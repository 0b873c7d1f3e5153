"""The requests a worker gets: matrices and token counts, the same for all data of one size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.nn.corpus import pack
from backends.nn.documents import Piece
from backends.nn.generate import complete
from backends.nn.local import localise
from backends.nn.tokenizer import ByteTokenizer
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from tests.nn.conftest import Tiny, tokens

CONFIG = TrainConfig(steps=2, batch=4, micro_batch=2, learning_rate=1e-2, warmup_steps=1)
PROMPT = tokens(1, 5, seed=9)


def seen(
    tiny: Tiny, data: torch.Tensor, held_out: torch.Tensor, stop: int
) -> list[tuple[int, int]]:
    """(matrix, tokens) of every request of a training, an evaluation and a completion."""
    with tiny.requests() as (model, forget_lane, requests):
        Trainer(model, data, CONFIG, forget_lane=forget_lane).train()
        evaluate(model, held_out, 4, asked=30)
        complete(model, PROMPT, 6, stop)
    return requests


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sequences=st.integers(1, 12),
    held_out=st.integers(1, 30),
    seed=st.integers(1, 1000),
    stop=st.integers(0, 95),
    letters=st.text("abc é", min_size=1, max_size=5),
)
def test_requests_depend_on_public_sizes_only(
    llama: Tiny, sequences: int, held_out: int, seed: int, stop: int, letters: str
) -> None:
    """Steps, sequence length and micro-batches are public; texts and their lengths are not."""
    plain = seen(llama, tokens(10, 12), tokens(8, 12), stop=-1)
    text = letters * (1 + sequences * 12 // len(letters.encode()))
    packed = pack([Piece(text)], ByteTokenizer(end=(0,)), 12) % 96
    for data in (tokens(sequences, 12, seed), packed):
        assert seen(llama, data, tokens(held_out, 12, seed), stop) == plain


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_a_padded_evaluation_is_the_mean_over_the_real_ones(llama: Tiny, count: int) -> None:
    """Whatever fills up the last micro-batch counts for nothing."""
    skeleton = llama.skeleton()
    localise(skeleton, llama.prepared["clear"])
    data = tokens(count, 12)
    alone = sum(evaluate(skeleton.model, row[None], 1) for row in data) / count
    for asked in (None, count, 20):
        assert evaluate(skeleton.model, data, 4, asked) == pytest.approx(alone, rel=1e-5)
    with pytest.raises(ValueError, match=f"{count} sequences to evaluate on, where 1 to 0"):
        evaluate(skeleton.model, data, 4, asked=0)


def test_a_completion_is_the_models_own_and_ends_at_its_end(llama: Tiny) -> None:
    """As `transformers` continues it; what comes after the end is thrown away."""
    skeleton = llama.skeleton()
    localise(skeleton, llama.prepared["clear"])
    model = skeleton.model
    found = complete(model, PROMPT, 8, stop=None)
    out = model.generate(  # type: ignore[operator]
        input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False,
        min_new_tokens=8, max_new_tokens=8, pad_token_id=0, eos_token_id=95,
    )  # fmt: skip
    assert found == out[0, 5:].tolist()
    assert complete(model, PROMPT, 8, stop=found[3]) == found[: found.index(found[3])]
