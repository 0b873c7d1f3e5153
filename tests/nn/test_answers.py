"""What the assistant says: spans and token masks against formats written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from backends.nn.documents import Piece
from backends.nn.marks import ID_MOST, UNCOUNTED
from backends.nn.packing import Plan, encoded, within
from backends.nn.records import AnswersError, Message, rendered
from backends.nn.tokenizer import ByteTokenizer, HubTokenizer

TINY = Path(__file__).parents[2] / "scenarios" / "assets" / "tiny-llama"
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
LOOP = "{% for m in messages %}"
ASKS = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + ASKS + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
LLAMA3 = (
    "{{ bos_token }}" + LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    + ASKS + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + "{{ m.content | trim }}<end_of_turn>\n" + ASKS + "<start_of_turn>model\n{% endif %}"
)  # fmt: skip
QWEN3 = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    + "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    + ASKS + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
GENERATION = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    + "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    + "{{ '\\n' }}" + ASKS + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
Parts = list[tuple[str, bool]]


def chatml(messages: list[Message]) -> Parts:
    """Parts of the text, and whether the assistant says them."""
    parts: Parts = []
    for m in messages:
        parts += [(f"<|im_start|>{m['role']}\n", False)]
        parts += [(f"{m['content']}<|im_end|>", m["role"] == "assistant"), ("\n", False)]
    return parts


def llama3(messages: list[Message]) -> Parts:
    parts: Parts = [("<|endoftext|>", False)]
    for m in messages:
        parts += [(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False)]
        parts += [(f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant")]
    return parts


def gemma(messages: list[Message]) -> Parts:
    parts: Parts = [("<|endoftext|>", False)]
    for m in messages:
        says = m["role"] == "assistant"
        parts += [(f"<start_of_turn>{'model' if says else m['role']}\n", False)]
        parts += [(f"{m['content'].strip()}<end_of_turn>", says), ("\n", False)]
    return parts


def qwen3(messages: list[Message]) -> Parts:
    parts: Parts = []
    for place, m in enumerate(messages):
        says = m["role"] == "assistant"
        thinks = "<think>\n\n</think>\n\n" * (says and place == len(messages) - 1)
        parts += [(f"<|im_start|>{m['role']}\n", False)]
        parts += [(f"{thinks}{m['content']}<|im_end|>", says), ("\n", False)]
    return parts


FORMS: dict[str, tuple[str, Callable[[list[Message]], Parts]]] = {
    "chatml": (CHATML, chatml), "llama3": (LLAMA3, llama3), "gemma": (GEMMA, gemma),
    "qwen3": (QWEN3, qwen3), "generation": (GENERATION, chatml),
}  # fmt: skip
OFTEN = [{"role": role, "content": ":"} for role in ("user", "assistant")] * 3
SAYINGS = st.text(st.sampled_from("ab é日\n. :\U0001f600"), min_size=1, max_size=9).filter(
    str.strip
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """One to three questions, each with its answer; sometimes the system first."""
    found = [{"role": "system", "content": draw(SAYINGS)}] * draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(SAYINGS)})
        found.append({"role": "assistant", "content": draw(SAYINGS)})
    return found


def hub(template: str | None) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(TINY)
    found.add_special_tokens({"additional_special_tokens": MARKS})
    found.chat_template = template
    return found  # type: ignore[no-any-return]


TOKENIZERS = {name: hub(template) for name, (template, _) in FORMS.items()}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """How many bytes of the text a token of this byte-level vocabulary is."""
    name = tokenizer.convert_ids_to_tokens(token)
    return len(name.encode()) if token in tokenizer.all_special_ids else len(name)


@pytest.mark.parametrize("form", list(FORMS))
@settings(max_examples=25)
@example(messages=OFTEN)
@given(messages=conversations())
def test_the_mask_is_what_the_assistant_says(form: str, messages: list[Message]) -> None:
    """Byte by byte, in a text written by hand; and the ids are those of the whole text."""
    if form == "gemma":
        messages = [m for m in messages if m["role"] != "system"]
    plain = TOKENIZERS[form]
    tokenizer = HubTokenizer(plain)
    parts = FORMS[form][1](messages)
    record = rendered({"messages": messages}, tokenizer.chat, tokenizer.answers)
    assert record.text == "".join(text for text, _ in parts)
    says = [said for text, said in parts for _ in text.encode()]
    ids = plain(record.text, add_special_tokens=False)["input_ids"]
    expected, place = [], 0
    for token in ids:
        size = token_bytes(plain, token)
        expected.append(any(says[place : place + size]))
        place += size
    assert place == len(says)
    piece = Piece(record.text, marked=True, talk=True, answers=record.answers)
    ((_, tokens),) = encoded([piece], tokenizer, Plan(completions=True, apart=False))
    assert (tokens & (ID_MOST - 1)).tolist() == [*ids, 0]
    expected[0] = False  # nothing is before it
    counts = (tokens & UNCOUNTED) == 0
    assert counts.tolist() == [*expected, True]


@settings(max_examples=25)
@given(messages=conversations())
def test_a_generation_mask_is_that_of_transformers(messages: list[Message]) -> None:
    """Where a template says what the assistant's turns are."""
    plain = TOKENIZERS["generation"]
    found = plain.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokenizer = HubTokenizer(plain)
    text = tokenizer.chat(messages)
    assert text is not None
    piece = Piece(text, marked=True, talk=True, answers=tokenizer.answers(messages, text))
    ((_, tokens),) = encoded([piece], tokenizer, Plan(completions=True))
    counts = (tokens & UNCOUNTED) == 0
    assert counts.tolist() == [bool(one) for one in found["assistant_masks"]] + [True]


@settings(max_examples=25)
@given(messages=conversations())
def test_without_a_template_answers_are_known_by_construction(messages: list[Message]) -> None:
    """In `role: content`, and in a prompt joined with its completion."""
    tokenizer = ByteTokenizer((0,))
    record = rendered({"messages": messages}, tokenizer.chat, tokenizer.answers)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert record.answers is not None
    assert [record.text[start:end] for start, end in record.answers] == said
    asked, answered = messages[-2]["content"], messages[-1]["content"]
    record = rendered(
        {"prompt": asked, "completion": answered}, tokenizer.chat, tokenizer.answers
    )  # fmt: skip
    piece = Piece(record.text, talk=True, answers=record.answers)
    ((_, tokens),) = encoded([piece], tokenizer, Plan(completions=True))
    counts = (tokens & UNCOUNTED) == 0
    assert bytes((tokens[counts] & 255).astype(np.uint8)) == answered.encode() + b"\0"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + CHATML,
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ messages | length }}"),
        CHATML + "{% if messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}",
    ],
)
def test_a_template_that_writes_parts_otherwise_is_refused(template: str) -> None:
    """Never a wrong span; and nothing of the text is in the error."""
    tokenizer = HubTokenizer(hub(template))
    messages = [
        {"role": "user", "content": "secret"}, {"role": "assistant", "content": "secret"},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "secret"},
    ]  # fmt: skip
    text = tokenizer.chat(messages)
    assert text is not None
    with pytest.raises(AnswersError, match="turns cannot be told") as refused:
        tokenizer.answers(messages, text)
    assert "secret" not in str(refused.value)


LLAMAS_DAY = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n"
)


@pytest.mark.parametrize("form", [CHATML, GENERATION])
def test_the_day_changes_nothing(form: str) -> None:
    """Of a template that writes it: the same text and the same answers in every run."""
    tokenizer = HubTokenizer(hub(LLAMAS_DAY + form))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.chat(messages)
    assert text is not None
    assert text.startswith("Today: 26 Jul 2024")
    assert [text[start:end][:1] for start, end in tokenizer.answers(messages, text)] == ["b"]


def test_a_template_that_does_not_ask_is_refused() -> None:
    """Where an answer begins it does not say: its header would be counted."""
    template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    tokenizer = HubTokenizer(hub(template))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.chat(messages)
    assert text is not None
    with pytest.raises(AnswersError, match="does not say where an answer begins"):
        tokenizer.answers(messages, text)
    silent = [messages[0], {"role": "assistant", "content": " "}]
    text = tokenizer.chat(silent)
    assert text is not None
    assert {end - start for start, end in tokenizer.answers(silent, text)} == {0}


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize(
    ("roles", "answers"),
    [("au", 0), ("aua", 1), ("aaua", 1), ("saua", 1), ("saaauaua", 2), ("a", 0), ("sa", 0)],
)
def test_an_answer_to_nobody_is_not_counted(form: str | None, roles: str, answers: int) -> None:
    """As where a conversation begins with a greeting, however the turns are told."""
    tokenizer = HubTokenizer(TOKENIZERS[form] if form else hub(None))
    names = {"s": "system", "u": "user", "a": "assistant"}
    if form == "gemma":
        roles = roles.replace("s", "")
    messages = [{"role": names[r], "content": f"say {i}"} for i, r in enumerate(roles)]
    record = rendered({"messages": messages}, tokenizer.chat, tokenizer.answers)
    assert record.answers is not None
    said = [record.text[start:end].partition("say ")[2][:1] for start, end in record.answers]
    places = [place for place, r in enumerate(roles) if r == "a" and "u" in roles[:place]]
    assert said == [str(place) for place in places]
    assert len(said) == answers


THINKS = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}" + LOOP
    + "{% set content = m.content %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ content.lstrip('\\n') }}{% else %}{{ content }}"
    "{% endif %}<|im_end|>\n" + ASKS + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
"""As Qwen 3's: thoughts within what is said are written after the last question alone."""


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.none() | st.text(st.sampled_from("ab<>/\n"), max_size=4),
            st.text(st.sampled_from("ab \n"), max_size=4),
        ),
        min_size=1, max_size=5,
    ),
)  # fmt: skip
def test_thoughts_that_a_template_leaves_out_are_no_matter(
    turns: list[tuple[str | None, str]],
) -> None:
    """Each answer is what its template writes between the header and the next turn."""
    tokenizer = HubTokenizer(hub(THINKS))
    messages, expected = [], []
    for place, (thought, said) in enumerate(turns):
        thinks = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
        messages.append({"role": "user", "content": f"ask {place}"})
        messages.append({"role": "assistant", "content": thinks + said})
        written = said if thought is None else said.lstrip("\n")
        if place == len(turns) - 1:
            kept = (thought or "").strip("\n") if thought else ""
            written = f"<think>\n{kept}\n</think>\n\n{said.lstrip(chr(10))}"
        expected.append(f"{written}<|im_end|>")
    text = tokenizer.chat(messages)
    assert text is not None
    assert [text[start:end] for start, end in tokenizer.answers(messages, text)] == expected


def test_a_long_conversation_takes_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the square of it, in messages that templates are given; with every turn where it is."""
    written: list[int] = []
    kind = PreTrainedTokenizerBase
    real = kind.apply_chat_template

    def apply(self: Any, messages: list[Message], **more: Any) -> Any:
        written.append(len(messages))
        return real(self, messages, **more)

    monkeypatch.setattr(kind, "apply_chat_template", apply)
    for form, (_, by_hand) in FORMS.items():
        tokenizer = HubTokenizer(TOKENIZERS[form])
        messages = [
            {"role": role, "content": ": " * (place % 3) + "e" * (place % 5 + 1) + "\n"}
            for place in range(150) for role in ("user", "assistant")
        ]  # fmt: skip
        text = tokenizer.chat(messages)
        assert text is not None
        written.clear()
        spans = tokenizer.answers(messages, text)
        place, expected = 0, []
        for part, said in by_hand(messages):
            expected += [(place, place + len(part))] * said
            place += len(part)
        assert list(spans) == expected
        assert sum(written) < 6 * len(messages), form


def test_many_answers_are_marked_as_one_by_one() -> None:
    """In tokens of any length, some of them empty, before, in and between answers."""
    draws = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(draws.integers(0, 60, 2 * draws.integers(0, 9)))
        spans = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        starts = np.sort(draws.integers(0, 60, 30))
        characters = np.stack([starts, starts + draws.integers(0, 4, 30)], axis=1)
        expected = [
            any(a < max(last, first + 1) and b > first for a, b in spans)
            for first, last in characters.tolist()
        ]
        assert within(characters, spans).tolist() == expected
