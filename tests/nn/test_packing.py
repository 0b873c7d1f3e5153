"""Documents in sequences: what is counted, who sees whom, what is cut off and what is held out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from backends.he.interface import Values
from backends.nn.adapters import add_lora, trainable
from backends.nn.corpus import Corpus, batch_indices, corpus_of
from backends.nn.documents import Piece
from backends.nn.gates import require_counted, require_learnable, require_little_cut
from backends.nn.losses import token_losses
from backends.nn.marks import APART, ID_MOST, UNCOUNTED, counted, read_rows
from backends.nn.packing import Facts, Plan, blocks
from backends.nn.remote import LinearFunction, Remote
from backends.nn.selfcheck import keeps_apart, low_rank
from backends.nn.skeleton import build_skeleton
from backends.nn.texts import DataError, find_texts
from backends.nn.tokenizer import ByteTokenizer, Placed
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from tests.nn.conftest import BASES, CONFIGS, tokens

END = 1


class Signs(ByteTokenizer):
    """A token a character: its code point."""

    def encode(self, texts: Sequence[str], marked: bool = False) -> list[NDArray[np.int32]]:
        return [np.array([ord(sign) for sign in text], np.int32) for text in texts]

    def encode_placed(self, texts: Sequence[str], marked: bool = False) -> list[Placed]:
        found = self.encode(texts)
        return [
            Placed(ids, np.stack([range(ids.size), range(1, ids.size + 1)], 1)) for ids in found
        ]


class Document(NamedTuple):
    """How long, whether it is a conversation, and which of its characters are answers."""

    size: int
    talk: bool
    answers: tuple[tuple[int, int], ...] | None


@st.composite
def some_documents(draw: st.DrawFn) -> list[Document]:
    found = []
    for _ in range(draw(st.integers(1, 12))):
        size, talk = draw(st.integers(1, 30)), draw(st.booleans())
        places = sorted(draw(st.sets(st.integers(0, size), max_size=4)))
        answers = tuple(pairwise(places))[::2] if talk and draw(st.booleans()) else None
        found.append(Document(size, talk, answers))
    return found


@settings(max_examples=60)
@given(some_documents(), st.integers(2, 16), st.booleans())
def test_a_prediction_is_of_a_document_and_of_what_it_counts(
    documents: list[Document], length: int, apart: bool
) -> None:
    """Every character there is only once, so that a slow look at each token knows where it is of.

    A conversation is in one sequence, from its beginning, or left out for want of an answer; plain
    texts lose what no sequence is left for.
    """
    signs, place_of, pieces = iter(range(0x4E00, 0x9000)), {}, []
    for number, document in enumerate(documents):
        text = "".join(chr(next(signs)) for _ in range(document.size))
        place_of |= {ord(sign): (number, place) for place, sign in enumerate(text)}
        pieces.append(Piece(text, talk=document.talk, answers=document.answers))
    facts = Facts()
    plan = Plan(completions=True, apart=apart)
    found = [block.rows for block in blocks(pieces, Signs((END,)), length, None, facts, plan)]
    marked = torch.from_numpy(np.concatenate(found or [np.empty((0, length), np.int32)])).long()
    rows = read_rows(marked)
    seen: dict[int, list[int]] = {}
    predictions = 0
    for row in range(len(marked)):
        document = begin = 0
        for column, token in enumerate(rows.ids[row].tolist()):
            if token in place_of:
                document, place = place_of[token]
                if column == 0 or place == 0:
                    begin = column
                seen.setdefault(document, []).append(place)
                if apart and rows.positions is not None:
                    assert rows.positions[row, column] == column - begin
            target = int(rows.targets[row, column])
            predictions += target >= 0
            if token == END:
                assert target < 0
            if token not in place_of or target < 0:
                continue
            now = documents[document]
            spans = [(0, now.size)] if now.answers is None else now.answers
            if target == END:
                assert place == now.size - 1
                assert any(last == now.size for _, last in spans)
            else:
                assert place_of[target] == (document, place + 1)
                assert any(first <= place + 1 < last for first, last in spans)
    assert predictions == facts.counted == counted(marked)
    for number, now in enumerate(documents):
        there = seen.get(number, [])
        if now.talk:
            assert there in ([], list(range(min(now.size, length))))
            answered = range(1, min(now.size + 1, length))
            spans = [(1, now.size + 1)] if now.answers is None else now.answers
            wanted = any(a <= i < b or (i == b == now.size) for i in answered for a, b in spans)
            assert bool(there) == wanted
    whole = sum(d.size + 1 for d in documents)
    assert facts.tokens == whole
    plain = sum(d.size + 1 for d in documents if not d.talk)
    left_out = [d for n, d in enumerate(documents) if d.talk and n not in seen]
    assert facts.empty == len(left_out)
    kept = sum(min(d.size + 1, length) for n, d in enumerate(documents) if d.talk and n in seen)
    assert marked.numel() == plain - plain % length + kept + facts.padding


def model_of(name: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config: PretrainedConfig = CONFIGS[name]
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


PACKED = [5, 9, 3]


def packed_row() -> torch.Tensor:
    """Three documents of those lengths, each of which begins with a mark."""
    row = tokens(1, sum(PACKED))
    for begin in (0, 5, 14):
        row[0, begin] |= APART | UNCOUNTED
    return row


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone(name: str, attention: str) -> None:
    """Logits and loss, with rotary positions and with learned ones."""
    model = model_of(name, attention)
    row = packed_row()
    rows = read_rows(row)
    assert rows.positions is not None
    packed = model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits
    loss, begin = 0.0, 0
    for size in PACKED:
        alone = rows.ids[:, begin : begin + size]
        logits = model(input_ids=alone, use_cache=False).logits
        torch.testing.assert_close(packed[:, begin : begin + size], logits, rtol=1e-4, atol=1e-5)
        loss += functional.cross_entropy(logits[0, :-1], alone[0, 1:], reduction="sum").item()
        begin += size
    assert token_losses(model, row).item() == pytest.approx(loss, rel=1e-5)
    together = token_losses(model, row & ~APART).item()
    assert abs(together - loss) > 1e-3


def family(name: str) -> PreTrainedModel:
    """A tiny model of that type, with its linears here."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, **MORE.get(name, {"num_key_value_heads": 2}),
    )  # fmt: skip
    found: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return found.eval()


MORE: dict[str, dict[str, object]] = {
    "gemma3_text": {
        "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48},
    "falcon": {}, "gpt_neox": {}, "bloom": {}, "gpt2": {},
}  # fmt: skip
CAN = [
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo",
]  # fmt: skip


@pytest.mark.parametrize("name", [*CAN, "opt", "falcon", "bloom"])
def test_which_models_keep_documents_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the documentation has it; and none does that does not hear of positions."""
    model = family(name)
    assert keeps_apart(model, Remote(), []) == (name in CAN)
    hearing = type(model).forward

    def forward(*args: object, position_ids: object = None, **more: object) -> object:
        return hearing(*args, **more)

    monkeypatch.setattr(type(model), "forward", forward)
    assert not keeps_apart(model, Remote(), [])


def marked_data() -> torch.Tensor:
    """Sequences of several documents, of whose tokens a third is counted."""
    data, drawn = tokens(10, 12), torch.rand(10, 12, generator=torch.Generator().manual_seed(1))
    data |= UNCOUNTED * (drawn > 0.33).long()
    return data | (APART | UNCOUNTED) * (drawn > 0.8).long()


CONFIG = TrainConfig(steps=3, batch=4, micro_batch=1, learning_rate=1e-2, warmup_steps=1)


def test_lanes_change_not_one_bit_of_a_marked_training() -> None:
    """And its first loss is the mean over what is counted, over all micro-batches."""
    found = []
    data = marked_data()
    for lanes in (1, 4):
        skeleton = build_skeleton(BASES["llama"])
        model = add_lora(skeleton.model, 4, 8, seed=0)
        trainer = Trainer(model, data, CONFIG, lanes, forget_lane=skeleton.remote.forget_lane)
        with skeleton.remote.connected(low_rank(skeleton.groups, 0.3)):
            chosen = data[batch_indices(0, CONFIG.batch, len(data), CONFIG.seed)]
            total = sum(token_losses(model, row[None]).item() for row in chosen)
            losses = trainer.train()
        assert losses[0] == pytest.approx(total / counted(chosen), rel=1e-5)
        found.append((losses, [p.detach().clone() for p in trainable(model).values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


def test_a_worker_is_asked_for_the_same_whatever_is_counted() -> None:
    """The same products of as many tokens, with marks and without."""
    asked = []
    for data in (tokens(4, 12), marked_data()[:4]):
        skeleton = build_skeleton(BASES["llama"])
        model = add_lora(skeleton.model, 4, 8, seed=0)
        seen: list[tuple[int, tuple[int, ...]]] = []
        real = low_rank(skeleton.groups, 0.3)

        def linear(
            matrix: int, x: Values, seen: list[tuple[int, tuple[int, ...]]] = seen,
            real: LinearFunction = real,
        ) -> Values:  # fmt: skip
            seen.append((matrix, tuple(x.shape)))
            return real(matrix, x)

        with skeleton.remote.connected(linear):
            Trainer(model, data, TrainConfig(1, 4, 2, 1e-2)).train()
        asked.append(seen)
    assert asked[0] == asked[1]
    assert len(asked[0]) > 10


@torch.no_grad()
def test_an_evaluation_is_the_mean_over_what_is_counted() -> None:
    """Whatever the micro-batch; NaN of nothing."""
    model, data = model_of("llama", "sdpa"), marked_data()
    whole = token_losses(model, data).item() / counted(data)
    for micro_batch in (1, 3, 10):
        assert evaluate(model, data, micro_batch, 12) == pytest.approx(whole, rel=1e-5)
    assert math.isnan(evaluate(model, data | UNCOUNTED, 5))


def dataset(tmp_path: Path, records: list[dict[str, str]]) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def parts(path: Path, length: int = 32, plan: Plan | None = None) -> tuple[Corpus, str, str]:
    """A corpus, and the text of its two parts."""
    plan = plan or Plan(completions=True, held_out=0.05)
    out = path.parent / "out" / "corpus"
    found = corpus_of(find_texts([path]), ByteTokenizer((0,)), length, 256, out, plan=plan)
    train, held = (
        ByteTokenizer().decode((part[:] & (ID_MOST - 1)).flatten().tolist())
        for part in found.parts()
    )
    return found, train, held


def test_held_out_documents_are_others_and_always_the_same(tmp_path: Path) -> None:
    """About one in twenty, copies on one side, found again on disk and with other lengths."""
    records = [{"prompt": f"q{i % 400:03}", "completion": f"a{i % 400:03}"} for i in range(800)]
    corpus, train, held = parts(dataset(tmp_path, records))
    those = {i for i in range(400) if f"a{i:03}" in held}
    assert 16 <= len(those) <= 27
    assert those.isdisjoint(i for i in range(400) if f"a{i:03}" in train)
    assert corpus.facts.held == 2 * len(those)
    assert corpus.held_out > 0
    again, _, same = parts(tmp_path / "a.jsonl")
    assert (same, again.facts, again.held_out) == (held, corpus.facts, corpus.held_out)
    _, _, longer = parts(tmp_path / "a.jsonl", 64)
    assert those == {i for i in range(400) if f"a{i:03}" in longer}


def test_of_few_documents_the_last_sequences_are_held_out(tmp_path: Path) -> None:
    """At least one, never all."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(500)))
    corpus, train, held = parts(path)
    assert len(corpus) * 0.04 < corpus.held_out < len(corpus) * 0.06
    assert (train + held) == path.read_text()[: len(train + held)]
    path.write_text("x" * 70)
    assert parts(path)[0].held_out == 1
    path.write_text("x" * 40)
    assert parts(path)[0].held_out == 0
    assert parts(path, plan=Plan())[0].held_out == 0


def test_a_conversation_is_not_cut_and_not_lost_in_silence(tmp_path: Path) -> None:
    """Its end is cut off and counted where it is longer than a sequence."""
    records = [
        {"prompt": "q" * 10, "completion": "a" * 50},  # 61 tokens, 32 of them kept
        {"prompt": "q" * 40, "completion": "a"},  # no answer within 32
        {"prompt": "q" * 10, "completion": "b" * 10},
    ]
    corpus, train, _ = parts(dataset(tmp_path, records), plan=Plan(completions=True))
    assert train.count("a") == 22
    assert train.count("b") == 10
    assert corpus.facts.cut == 61 - 32 + 42
    assert corpus.facts.empty == 1
    assert corpus.facts.counted == 22 + 11
    assert corpus.facts.padding == 2 * 32 - 32 - 21
    with pytest.raises(DataError, match="57% of all tokens would be cut off"):
        require_little_cut(corpus.facts)
    require_little_cut(corpus.facts, 0.6)


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    """Nothing that is counted; a loss that is no number, or worse than guessing."""
    silent = dataset(tmp_path, [{"prompt": "q" * 40, "completion": ""}] * 9)
    with pytest.raises(DataError, match="no conversation has a token to predict"):
        parts(silent)
    with pytest.raises(DataError, match="no token of the text is counted"):
        require_counted(Facts(tokens=9))
    model, data = model_of("llama", "sdpa"), tokens(5, 12)
    assert 4 < require_learnable(model, data, 2, 200) < math.log(200)
    with pytest.raises(DataError, match="where guessing has"):
        require_learnable(model, data, 2, 20)
    with pytest.raises(DataError, match="is nan"):
        require_learnable(model, data | UNCOUNTED, 2, 200)
    next(model.parameters()).data.fill_(math.inf)
    with pytest.raises(DataError, match="is nan"):
        require_learnable(model, data, 2, 200)
