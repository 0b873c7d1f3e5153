"""Tokenizers of `transformers`: marks once, nothing cut off, and which are refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from backends.nn.documents import Piece, pieces
from backends.nn.marks import ID_MOST, UNCOUNTED
from backends.nn.packing import Plan, encoded, first_tokens
from backends.nn.records import RecordError, rendered
from backends.nn.texts import find_texts
from backends.nn.tokenizer import (
    HubTokenizer,
    TokenizerError,
    load_tokenizer,
    require_round_trip,
    round_trip,
)

TINY = Path(__file__).parents[2] / "scenarios" / "assets" / "tiny-llama"
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "dog": 4, "cat": 5, "user": 6, ":": 7}
MESSAGES = [{"role": "user", "content": "a dog"}]


def word_tokenizer(marks: str = "<s> $A", **more: Any) -> PreTrainedTokenizerFast:
    """A word a token, in lower case, with these marks around a text."""
    rules = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.decoder = decoders.WordPiece()
    rules.post_processor = processors.TemplateProcessing(
        single=marks, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **more
    )


def ids(tokenizer: HubTokenizer, *documents: Piece) -> list[int]:
    """Of these documents, with their marks."""
    return first_tokens(documents, tokenizer, 1000)


@pytest.mark.parametrize("marks", ["$A", "<s> $A", "<s> $A </s>"])
def test_documents_have_each_mark_once(marks: str) -> None:
    """What the tokenizer puts around a text by itself, and an end of text, whoever writes it."""
    tokenizer = HubTokenizer(word_tokenizer(marks))
    start = [1] if "<s>" in marks else []
    document = [*start, 3, 4, 2]
    assert ids(tokenizer, Piece("a dog"), Piece("a dog")) == document * 2
    cut = [Piece("a", True, False), Piece("dog", False, True)]
    assert ids(tokenizer, *cut) == document


@pytest.mark.parametrize("marks", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("begun", ["<s>", "", "<s><s>"])
@pytest.mark.parametrize("ended", ["</s>", "", "</s>\n", "</s>."])
def test_what_a_template_writes_gets_no_more_than_an_end(
    begun: str, ended: str, marks: str
) -> None:
    """Its own marks count, and what the tokenizer would put around a text does not."""
    tokenizer = HubTokenizer(word_tokenizer(marks, chat_template=f"{begun}a dog{ended}"))
    text = tokenizer.chat(MESSAGES)
    assert text is not None
    found = ids(tokenizer, Piece(text, marked=True))
    assert found == [*[1] * begun.count("<s>"), 3, 4, 2, *[0] * ended.count(".")]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<s>", "s>a", "Q"]
"""Some overlap, and one is a sign of its own."""


@cache
def marking() -> HubTokenizer:
    """The tiny Llama's byte-level tokenizer, with more special tokens and a template."""
    found = AutoTokenizer.from_pretrained(TINY)
    found.add_special_tokens({"additional_special_tokens": NAMES[2:]})
    found.chat_template = CHATML
    return HubTokenizer(found)


QUOTING = st.lists(st.sampled_from([*NAMES[:-1], "a", "s>", "<", " |", "\n", "é😀"])).map("".join)


@settings(max_examples=60)
@given(QUOTING)
def test_the_name_of_a_special_token_in_a_text_is_text(text: str) -> None:
    """All of it comes back, one token ends it, and no other is special, at any place."""
    tokenizer = marking()
    special = set(tokenizer._tokenizer.all_special_ids) - {
        tokenizer._tokenizer.convert_tokens_to_ids("Q")
    }
    found = ids(tokenizer, Piece(text), Piece(text))
    half = found[: len(found) // 2]
    assert found == half * 2
    assert half[-1] == 0
    assert special.isdisjoint(half[:-1])
    assert tokenizer.decode(half[:-1]) == text
    (placed,) = tokenizer.encode_placed([text])
    assert placed.ids.tolist() == half[:-1]


@settings(max_examples=60)
@given(st.lists(QUOTING, min_size=2, max_size=4), st.booleans())
def test_and_in_a_message_too_where_those_of_the_template_are_tokens(
    contents: list[str], placed: bool
) -> None:
    """What the template wrote around the messages is as without; what they say is all there."""
    tokenizer = marking()
    plain = tokenizer._tokenizer
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]
    record = rendered({"messages": messages}, tokenizer.chat, tokenizer.answers)
    piece = Piece(record.text, marked=True, answers=record.answers if placed else None)
    ((_, tokens),) = encoded([piece], tokenizer, Plan(completions=True))
    found = (tokens & (ID_MOST - 1)).tolist()
    begin, end, last = plain.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    special = {i for i in plain.all_special_ids if i != plain.convert_tokens_to_ids("Q")}
    assert [i for i in found if i in special] == [begin, end] * len(contents) + [last]
    assert tokenizer.decode(found[:-1]) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    )
    if placed:
        counts = (tokens & UNCOUNTED) == 0
        said = tokenizer.decode([i for i, count in zip(found, counts, strict=True) if count])
        said, place = said.replace("<|endoftext|>", ""), 0
        # A sign may be of the same token as what stands before it, of the template too.
        for message in messages[1::2]:
            wanted = f"{message['content']}<|im_end|>".replace("<|endoftext|>", "")
            place = said.index(wanted, place) + len(wanted)


def test_no_message_holds_what_marks_its_quotes() -> None:
    """It would be lost."""
    with pytest.raises(RecordError, match=r"U\+FDD0"):
        marking().chat([{"role": "user", "content": "secret\ufdd0"}])
    assert marking().decode(ids(marking(), Piece("a\ufdd0b"))[:-1]) == "a\ufdd0b"


def test_a_template_writes_a_conversation_or_says_that_it_cannot() -> None:
    """It is a program of the checkpoint: whatever it raises is a refusal without the text."""
    good = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert HubTokenizer(word_tokenizer(chat_template=good)).chat(MESSAGES) == "user: a dog"
    assert HubTokenizer(word_tokenizer()).chat(MESSAGES) is None
    bad = "{{ raise_exception(messages[0].content) }}"
    with pytest.raises(RecordError, match="cannot write it") as refused:
        HubTokenizer(word_tokenizer(chat_template=bad)).chat(MESSAGES)
    assert "dog" not in str(refused.value)


@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    "saved", [(), ("truncation",), ("padding",), ("longest",), ("truncation", "padding", "longest")]
)
def test_nothing_is_cut_off_by_a_tokenizer_that_would(
    saved: tuple[str, ...], placed: bool, own_way: bool, tmp_path: Path
) -> None:
    """Neither by what its file says of truncation and padding, nor by its greatest length."""
    found = word_tokenizer("<s> $A")
    if "truncation" in saved:
        found.backend_tokenizer.enable_truncation(4)
    if "padding" in saved:
        found.backend_tokenizer.enable_padding(length=64)
    found.model_max_length = 4 if "longest" in saved else 10**9
    found.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "tokenizer.json").read_text())
    assert [stated[what] is not None for what in ("truncation", "padding")] == [
        what in saved for what in ("truncation", "padding")
    ]
    tokenizer = load_tokenizer(tmp_path)
    if own_way:  # transformers' own call, in place of the backend's
        tokenizer._plain = False
    text = "dog " * 50
    answers = ((0, len(text)),) if placed else None
    for marked in (False, True):
        piece = Piece(text, marked=marked, answers=answers)
        ((_, tokens),) = encoded([piece], tokenizer, Plan(completions=True))
        start = [] if marked else [1]
        assert (tokens & (ID_MOST - 1)).tolist() == [*start, *[4] * 50, 2]


@pytest.mark.parametrize("marks", ["$A", "<s> $A", "<s> $A </s>", "<s> $A </s> </s>"])
@pytest.mark.parametrize("text", ["a dog", "<s> a dog </s>", "</s>", "a dog </s></s>"])
def test_each_document_has_one_end(marks: str, text: str) -> None:
    """Whatever it quotes; as many as the tokenizer itself puts there, and one at least."""
    tokenizer = HubTokenizer(word_tokenizer(marks))
    found = ids(tokenizer, Piece(text), Piece("a", True, False), Piece("dog", False, True))
    ends = max(1, marks.count("</s>"))
    assert found.count(2) == 2 * ends
    assert found.count(1) == 2 * marks.count("<s>")
    assert found[-ends:] == [2] * ends


def test_a_tokenizer_with_a_way_of_its_own_keeps_it() -> None:
    """Only one that adds nothing to its backend is called past `transformers`."""

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, **more: Any) -> Any:
            return super()._encode_plus([one.replace("!", " cat") for one in text], **more)

    plain = word_tokenizer("$A")
    own = Shouting(
        tokenizer_object=plain.backend_tokenizer, unk_token="<unk>", eos_token="</s>"
    )  # fmt: skip
    assert ids(HubTokenizer(own), Piece("a dog!")) == [3, 4, 5, 2]
    assert ids(HubTokenizer(own), Piece("a </s> dog!")) == [3, 0, 0, 0, 4, 5, 2]
    assert ids(HubTokenizer(own), Piece("a </s> dog!", marked=True)) == [3, 2, 4, 5, 2]
    assert ids(HubTokenizer(plain), Piece("a dog!")) == [3, 4, 0, 2]


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tmp_path: Path) -> None:
    """With a byte-level tokenizer, cut before spaces and at line ends."""
    (tmp_path / "a.py").write_text(Path(__file__).read_text() * 2)
    tokenizer = load_tokenizer(TINY)
    plain = AutoTokenizer.from_pretrained(TINY, model_max_length=10**9)
    text = (tmp_path / "a.py").read_text()
    expected = plain(text, split_special_tokens=True)["input_ids"] + [plain.eos_token_id]
    documents = list(pieces(find_texts([tmp_path / "a.py"]), tokenizer.chat, 1000))
    assert len(documents) > 10
    assert first_tokens(documents, tokenizer, 10**6) == expected


def test_a_tokenizers_identity_is_its_rules() -> None:
    """The same for the same files, another one for anything that may change ids."""
    assert load_tokenizer(TINY).identity() == load_tokenizer(TINY).identity()
    found = [
        HubTokenizer(word_tokenizer(marks, chat_template=template)).identity()
        for marks in ("$A", "<s> $A") for template in (None, "a")
    ]  # fmt: skip
    assert len({*found, load_tokenizer(TINY).identity()}) == 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no usable tokenizer"),
        (
            {"config.json": LlamaConfig().to_json_string()},
            r"no usable.*there is no tokenizer\.json",
        ),
        ({"config.json": '{"model_type": "gpt2"}'}, r"vocabulary is empty.*merges\.txt"),
        ({"tokenizer.json": "{"}, "no usable tokenizer"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, "no usable tokenizer"),
        ({"config.json": "[]"}, "no usable tokenizer"),
    ],
    ids=["nothing", "llama without", "gpt2 without", "cut off", "pointer", "no config"],
)
def test_a_missing_tokenizer_is_refused_by_name(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    """In a line that says which files there should be."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
    assert "tokenizer.json first of all" in str(refused.value)


def test_code_in_a_tokenizers_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether it may be."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    config = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)
    assert not asked


def test_a_text_that_a_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    """What is changed in case, accents and spaces counts as kept; what is lost does not."""
    words = HubTokenizer(word_tokenizer())
    assert round_trip(words, ["A  Dog\n", "a cat"]) == round_trip(words, ["a dog a cat"])
    assert require_round_trip(words, ["a Dog\n\na cat " * 50], tmp_path) is None
    remark = require_round_trip(words, ["a dog a cat " * 20 + "bird " * 5], tmp_path)
    assert remark is not None
    assert "% come back" in remark
    with pytest.raises(TokenizerError, match="not for this text: 100% of the tokens"):
        require_round_trip(words, ["日本 語"], tmp_path)
    assert require_round_trip(load_tokenizer(TINY), ["日本語 é 🙂\n\tx = 1"], tmp_path) is None
