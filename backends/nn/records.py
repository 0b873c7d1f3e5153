"""Datasets in JSON: which keys hold the text, and how a conversation becomes text.

    {"text": ...}                                        taken as it is; "content" too
    {"messages": [{"role": ..., "content": ...}, ...]}   a conversation; "conversations" too, also
                                                         with "from" and "value" (ShareGPT)
    {"prompt": ..., "completion": ...}                   two turns, or two lists of messages
    {"instruction": ..., "input": ..., "output": ...}    two turns; the input may be missing

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
ASSISTANT = "assistant"

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
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
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
    for key in _TEXTS:
        if isinstance(record.get(key), str) and "role" not in record:
            return Rendered(_unicode(record[key]), marked=False)
    conversation = _conversation(record)
    if conversation is None:
        raise RecordError(
            f"its form is not known: its keys are {_shown(record)}, where 'text', 'messages', "
            "'conversations', 'prompt' and 'completion', or 'instruction' and 'output' are; "
            "rename the keys (docs/texts.md), or the file to .txt to train on it as it is"
        )
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
    text = any(isinstance(value.get(key), str) for key in _TEXTS) and "role" not in value
    chat = any(isinstance(value.get(key), list) for key in _CHATS)
    return text or chat or any(asked in value and answered in value for asked, answered in _PAIRS)


def is_json_lines(first_line: str) -> bool:
    """Whether a file that begins with this line, and has more, is one JSON object a line."""
    try:
        return isinstance(json.loads(first_line), dict)
    except (ValueError, RecursionError):
        return False


class _Plain(NamedTuple):
    """A conversation without a template, and what of it the assistant says."""

    text: str
    answers: tuple[Span, ...]


def _conversation(record: Mapping[str, Any]) -> tuple[list[Message], _Plain] | None:
    """Its messages, and its plain form; None when there are none."""
    if record.get("tools") or record.get("functions"):
        raise RecordError("it offers tools, which cannot be trained on; leave such records out")
    for key in _CHATS:
        if key in record:
            messages = _led(record, _messages(record[key], key))
            return messages, _plain(messages)
    for asked, answered in _PAIRS:
        if asked not in record or answered not in record:
            continue
        question, answer = record[asked], record[answered]
        if isinstance(question, list) and isinstance(answer, list):
            turns = _messages(question, asked) + _messages(answer, answered)
            messages = _led(record, turns)
            return messages, _plain(messages)
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise RecordError(f"{asked!r} and {answered!r} are neither two strings nor two lists")
        more = _optional(record, _MORE)
        whole = f"{question}\n\n{more}" if more else question
        turns = [{"role": "user", "content": whole}, {"role": "assistant", "content": answer}]
        messages = _led(record, turns)
        as_it_is = (asked, answered) == ("prompt", "completion") and len(messages) == 2
        if not as_it_is:
            return messages, _plain(messages)
        return messages, _Plain(whole + answer, ((len(whole), len(whole + answer)),))
    return None


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
    if item.get("tool_calls") or item.get("function_call"):
        raise RecordError("a message calls tools, which cannot be trained on; leave it out")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise RecordError(
            f"a message in {key!r} has not a 'role' and a 'content' of text: its keys are "
            f"{_shown(item)}"
        )
    return {"role": _ROLES.get(role, role), "content": content}


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
    text, answers = "", []
    for message in messages:
        text += f"{_BETWEEN if text else ''}{message['role']}: "
        if message["role"] == ASSISTANT:
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
