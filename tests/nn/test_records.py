"""Which of a record's keys are taken, and who speaks in a conversation."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from backends.nn.records import RecordError, Rendered, is_record, rendered
from backends.nn.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": "A"}]}, "user: A"),
    ({"conversations": [{"from": "human", "value": "B"}]}, "user: B"),
    ({"prompt": "C", "completion": "c"}, "Cc"),
    ({"instruction": "D", "output": "d"}, "user: D\n\nassistant: d"),
    ({"question": "E", "answer": "e"}, "user: E\n\nassistant: e"),
    ({"text": "F"}, "F"),
    ({"content": "G"}, "G"),
]
"""A record of each form and its text, in the order in which they are taken."""


def read(record: dict[str, Any]) -> Rendered:
    return rendered(record, TOKENIZER.chat)


@pytest.mark.parametrize(("first", "second"), list(combinations(range(len(FORMS)), 2)))
def test_of_two_forms_in_a_record_one_is_taken(first: int, second: int) -> None:
    """A conversation before a pair before a text, wherever the keys stand; a null one is none."""
    (one, text), (other, rest) = FORMS[first], FORMS[second]
    assert read(other | one).text == read(one | other).text == text
    nothing: dict[str, Any] = dict.fromkeys(one)
    assert read(nothing | other).text == rest
    assert is_record(nothing | other)
    if first < 2:
        assert read({key: [] for key in one} | other).text == rest


@pytest.mark.parametrize("nothing", [None, [], "", {}])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_an_empty_conversation_alone_is_refused(key: str, nothing: object) -> None:
    """With keys that say what it is."""
    with pytest.raises(RecordError, match=r"is no list of messages|its form is not known"):
        read({key: nothing, "id": 1})


@pytest.mark.parametrize(
    "record",
    [{"text": 5}, {"text": ["a"]}, {"text": None}, {"prompt": "a"}, {"content": {}},
     {"prompt": "a", "completion": None}],
)  # fmt: skip
def test_what_holds_no_text_is_refused(record: dict[str, Any]) -> None:
    """Naming its keys."""
    with pytest.raises(RecordError, match="its form is not known"):
        read(record)
    assert not is_record(record)


@pytest.mark.parametrize(
    ("names", "role"),
    [("user User USER human Human prompter", "user"), ("system System SYSTEM", "system"),
     ("assistant Assistant ASSISTANT gpt GPT chatgpt ChatGPT bot AI model Model", "assistant")],
)  # fmt: skip
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_roles_have_other_names(names: str, role: str, keys: tuple[str, str]) -> None:
    """However they are capitalised, and what the assistant says is found by each."""
    for name in names.split():
        messages = [{"role": "user", "content": "A"}, {keys[0]: f" {name}", keys[1]: "B"}]
        found = rendered({"messages": messages}, TOKENIZER.chat, TOKENIZER.answers)
        assert found.text == f"user: A\n\n{role}: B"
        said = [found.text[start:end] for start, end in found.answers or ()]
        assert said == ["B"] * (role == "assistant")


def test_other_roles_are_the_templates_affair() -> None:
    """As they are written."""
    assert read({"messages": [{"role": "Narrator", "content": "A"}]}).text == "Narrator: A"


@pytest.mark.parametrize(
    "role",
    ["function_call", "observation", "tool", "Tool", "tool_call", "tool_calls", "tool_response",
     "tool-result", "tool output", "function", "Functions", "function_response", "ipython",
     "OBSERVATION", "code_interpreter"],
)  # fmt: skip
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_what_tools_are_asked_and_say_is_refused(role: str, keys: tuple[str, str]) -> None:
    """It is nobody's speech; in a pair of two lists too."""
    messages = [{"role": "user", "content": "A"}, {keys[0]: role, keys[1]: "secret"}]
    for record in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}):
        with pytest.raises(RecordError, match="calls tools, or is what they say") as refused:
            read(record)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "record",
    [{"messages": FORMS[0][0]["messages"]}, {"prompt": "a", "completion": "b"}],
)  # fmt: skip
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_offers_of_tools_are_refused_beside_what_they_are_for(
    record: dict[str, Any], key: str
) -> None:
    """Null or empty ones are none, and a plain text has no use for them."""
    with pytest.raises(RecordError, match="offers tools"):
        read(record | {key: [{}], "text": "a"})
    assert read(record | {key: None}).text == read(record | {key: []}).text
    assert read({"text": "a", key: [{}]}).text == "a"


@pytest.mark.parametrize(
    "message",
    [{"content": "A"}, {"role": None, "content": "A"}, {"role": " ", "content": "A"},
     {"role": 5, "content": "A"}, {"role": "user"}, {"role": "user", "content": None}],
)  # fmt: skip
def test_a_message_has_somebody_who_says_something(message: dict[str, Any]) -> None:
    """A missing role or content is refused by its keys; null ones leave the other spelling."""
    with pytest.raises(RecordError, match="has not a 'role' and a 'content'"):
        read({"messages": [message]})
    whole = {"from": "human", "value": "A", "role": None, "content": None}
    assert read({"messages": [whole]}).text == "user: A"
