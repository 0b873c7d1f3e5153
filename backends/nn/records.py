"""Datasets in JSON: which keys hold the text, and how a conversation becomes text.

    {"messages": [{"role": ..., "content": ...}, ...]}   a conversation; "conversations" too, also
                                                         with "from" and "value" (ShareGPT)
    {"prompt": ..., "completion": ...}                   two turns, or two lists of messages
    {"instruction": ..., "input": ..., "output": ...}    two turns; the input may be missing
    {"text": ...}                                        taken as it is; "content" too

The first of these that is there is taken: a text beside a conversation or a pair is the same,
written already for some other model. What is null, as tables of several kinds of records fill up
their columns, is not there.

A conversation is written by the tokenizer's chat template. Without one it is `role: content` with
an empty line between turns; a prompt and its completion are then joined as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, str]
Chat = Callable[[Sequence[Message]], "str | None"]
"""Writes a conversation as a chat template does; None without a template.

Raises RecordError when the template cannot write it.
"""
Span = tuple[int, int]
"""Characters of a text, from the first to before the last."""
Answers = Callable[[Sequence[Message], str], tuple[Span, ...]]
"""Where in a conversation's text, as `Chat` wrote it, the assistant's turns are, in order.

Raises AnswersError when nobody can tell.
"""
ASSISTANT, USER = "assistant", "user"

_TEXTS = ("text", "content")
_CHATS = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
)
_MORE = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), USER), "system": "system",
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai", "model"), ASSISTANT),
}  # fmt: skip
"""Other names of the three roles, however they are capitalised."""
_TOOLS = re.compile(r"(tool|function)s?([_ -].*)?|observation|ipython|code_interpreter")
"""Roles, as of ShareGPT and OpenAI, of calls and of what is called."""
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]{1,24}")
_KEYS_SHOWN = 8
_BETWEEN = "\n\n"


class RecordError(ValueError):
    """A record of no known form. The text says why, and quotes nothing but keys."""


class AnswersError(RecordError):
    """The assistant's turns of a conversation cannot be told from the rest."""


class Rendered(NamedTuple):
    """A record's text.

    marked   a chat template wrote it, special tokens included
    talk     it is a conversation, or a question and its answer
    answers  what of it the assistant says; None when that was not asked, and of plain texts
    """

    text: str
    marked: bool
    talk: bool = False
    answers: tuple[Span, ...] | None = None


def rendered(record: object, chat: Chat, answers: Answers | None = None) -> Rendered:
    """The text of one record.

    answers  finds the assistant's turns; None when nobody asks

    Raises RecordError when it has no known form.
    """
    if not isinstance(record, dict):
        raise RecordError("it is no JSON object")
    there = _there(record)
    conversation = _conversation(there)
    if conversation is None:
        return Rendered(_unicode(_text(there)), marked=False)
    messages, plain = conversation
    _unicode(plain.text)
    written = chat(messages)
    if written is None:
        return Rendered(plain.text, False, True, None if answers is None else plain.answers)
    found = None if answers is None else answers(messages, _unicode(written))
    return Rendered(_unicode(written), marked=True, talk=True, answers=found)


def is_record(value: object) -> bool:
    """Whether it looks like one record of a known form."""
    if not isinstance(value, dict):
        return False
    there = _there(value)
    text = any(isinstance(there.get(key), str) for key in _TEXTS) and "role" not in there
    chat = any(isinstance(there.get(key), list) for key in _CHATS)
    return text or chat or any(asked in there and answered in there for asked, answered in _PAIRS)


def is_json_lines(first_line: str) -> bool:
    """Whether a file that begins with this line, and has more, is one JSON object a line."""
    try:
        return isinstance(json.loads(first_line), dict)
    except (ValueError, RecursionError):
        return False


def first_user(messages: Sequence[Message]) -> int:
    """Which message is the first of a user: what the assistant says before it answers nobody.

    As many as there are without one.
    """
    roles = [message["role"] for message in messages]
    return roles.index(USER) if USER in roles else len(roles)


class _Plain(NamedTuple):
    """A conversation without a template, and what of it the assistant says."""

    text: str
    answers: tuple[Span, ...]


def _there(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _text(record: Mapping[str, Any]) -> str:
    """That of a plain text. Raises RecordError when it is none."""
    for key in _TEXTS:
        if isinstance(record.get(key), str) and "role" not in record:
            return str(record[key])
    for key in _CHATS:
        if key in record:
            raise RecordError(f"{key!r} is no list of messages")
    raise RecordError(
        f"its form is not known: its keys are {_shown(record)}, where 'text', 'messages', "
        "'conversations', 'prompt' and 'completion', or 'instruction' and 'output' are, with a "
        "value; rename the keys (docs/texts.md), or the file to .txt to train on it as it is"
    )


def _conversation(record: Mapping[str, Any]) -> tuple[list[Message], _Plain] | None:
    """Its messages, and its plain form; None when there are none."""
    for key in _CHATS:
        if record.get(key):  # an empty one is another way of saying that there is none
            _refuse_tools(record)
            messages = _led(record, _messages(record[key], key))
            return messages, _plain(messages)
    for asked, answered in _PAIRS:
        if asked not in record or answered not in record:
            continue
        _refuse_tools(record)
        question, answer = record[asked], record[answered]
        if isinstance(question, list) and isinstance(answer, list):
            turns = _messages(question, asked) + _messages(answer, answered)
            messages = _led(record, turns)
            return messages, _plain(messages)
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise RecordError(f"{asked!r} and {answered!r} are neither two strings nor two lists")
        more = _optional(record, _MORE)
        whole = f"{question}\n\n{more}" if more else question
        turns = [{"role": USER, "content": whole}, {"role": ASSISTANT, "content": answer}]
        messages = _led(record, turns)
        as_it_is = (asked, answered) == ("prompt", "completion") and len(messages) == 2
        if not as_it_is:
            return messages, _plain(messages)
        return messages, _Plain(whole + answer, ((len(whole), len(whole + answer)),))
    return None


def _refuse_tools(record: Mapping[str, Any]) -> None:
    if record.get("tools") or record.get("functions"):
        raise RecordError("it offers tools, which cannot be trained on; leave such records out")


def _led(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """With the system's turn that stands beside them, unless they have one."""
    system = _optional(record, _SYSTEM)
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(found: object, key: str) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise RecordError(f"{key!r} is no list of messages")
    return [_message(item, key) for item in found]


def _message(item: object, key: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f"{key!r} holds something that is no message")
    item = _there(item)
    role = item.get("role", item.get("from"))
    named = role.strip().casefold() if isinstance(role, str) else ""
    if item.get("tool_calls") or item.get("function_call") or _TOOLS.fullmatch(named):
        raise RecordError(
            "a message calls tools, or is what they say, which cannot be trained on; leave such "
            "conversations out"
        )
    content = item.get("content", item.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not (named and isinstance(content, str)):
        raise RecordError(
            f"a message in {key!r} has not a 'role' and a 'content' of text: its keys are "
            f"{_shown(item)}"
        )
    return {"role": _ROLES.get(named, str(role)), "content": content}


def _optional(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of them that is there; empty without. Raises RecordError when it is no text."""
    for key in keys:
        value = record.get(key)
        if value:
            if not isinstance(value, str):
                raise RecordError(f"{key!r} is no text")
            return value
    return ""


def _plain(messages: Sequence[Message]) -> _Plain:
    text, answers, asked = "", [], first_user(messages)
    for place, message in enumerate(messages):
        text += f"{_BETWEEN if text else ''}{message['role']}: "
        if message["role"] == ASSISTANT and place > asked:
            answers.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return _Plain(text, tuple(answers))


def _unicode(text: str) -> str:
    """JSON can write what no text holds."""
    if "\0" in text:
        raise RecordError("a string in it holds NUL characters; take them out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("a string in it holds half of a surrogate pair; mend it") from error
    return text


def _shown(record: Mapping[Any, Any]) -> str:
    """Its first keys; those that are no plain names could be somebody's text, and are hidden."""
    keys = [key if _PLAIN_KEY.fullmatch(key) else "(...)" for key in list(record)[:_KEYS_SHOWN]]
    return ", ".join(keys + ["..."] * (len(record) > _KEYS_SHOWN)) or "none"
