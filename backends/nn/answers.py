"""Where in a conversation, as a chat template writes it, the assistant's turns are.

A template with `{% generation %}` says it itself. Of others the conversation is written up to each
turn: what comes after the header of an answer, up to and with what ends the turn, is the answer.
That takes templates that write a beginning of a conversation as they write the beginning of the
whole, which is looked at each time.

Writing all beginnings of a long conversation takes the square of its length. So where the same
stands before and after what is said in every turn, only the first of a kind and the last are found
like this, and the others by that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from backends.nn.records import ASSISTANT, AnswersError, Message, Span, first_user

FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}
"""For templates that write the day, as Llama 3's do, in place of today, so that a text is the same
in every run. It is the day that they take themselves where they cannot ask."""

_Write = Callable[[Sequence[Message], bool], str]
"""Writes messages as the template does, and what comes before an answer if it is asked for."""
_THOUGHT = "</think>"
_PLANE, _PLANE_SIGNS = 0xF0000, 0xFFFE
_MARKS = re.compile(f"([{chr(_PLANE)}-{chr(_PLANE + _PLANE_SIGNS)}])")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> tuple[Span, ...]:
    """The characters of `text`, which its template wrote, that the assistant says.

    What ends a turn belongs to it, the white space after that does not. A turn of the assistant
    that answers no user is left out.

    Raises AnswersError when they cannot be told.
    """
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return _generated(tokenizer, messages, text, template)

    def write(some: Sequence[Message], asks: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(
                list(some), tokenize=False, add_generation_prompt=asks, **FIXED
            ))  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            raise AnswersError(
                "the tokenizer's chat template does not write conversations in part, so that the "
                f"assistant's turns cannot be told ({type(error).__name__}); --loss-on all counts "
                "all"
            ) from error

    asked = first_user(messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT and i > asked]
    spans = _by_likeness(messages, text, turns, write) if len(turns) > 2 else None
    if spans is None:
        spans = tuple(_by_prefix(messages, text, turn, write) for turn in turns)
    if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
        raise _otherwise()
    return spans


def _otherwise() -> AnswersError:
    return AnswersError(
        "the tokenizer's chat template writes a turn otherwise when others follow it, so that the "
        "assistant's turns cannot be told; --loss-on all counts all"
    )


def _generated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, template: str
) -> tuple[Span, ...]:
    """As the template says itself."""
    render: Any = render_jinja_template  # its annotation names the text alone

    def spans_of(some: Sequence[Message]) -> tuple[str, list[Span]]:
        try:
            written, spans = render(
                conversations=[list(some)], chat_template=template,
                return_assistant_tokens_mask=True, **tokenizer.special_tokens_map, **FIXED,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            raise _otherwise() from error
        return written[0], [(int(start), int(end)) for start, end in spans[0]]

    written, spans = spans_of(messages)
    if written != text:
        raise AnswersError("the tokenizer's chat template writes it otherwise each time")
    unasked = messages[: first_user(messages)]
    if any(message["role"] == ASSISTANT for message in unasked):
        _, before = spans_of(unasked)
        if spans[: len(before)] != before:
            raise _otherwise()
        spans = spans[len(before) :]
    return tuple(spans)


def _by_prefix(messages: Sequence[Message], text: str, index: int, write: _Write) -> Span:
    """One turn of the assistant, from the conversation up to it, without and with it."""
    before = write(messages[:index], True)
    said = messages[index]["content"]
    turn = _turn(write(messages[: index + 1], False), before, text, said)
    if turn is None:
        raise _otherwise()
    if before == write(messages[:index], False):  # it may have no header; an empty answer is none
        header = turn.partition(said.strip())[0].strip() if said.strip() else ""
        if header:
            raise AnswersError(
                "the tokenizer's chat template does not say where an answer begins (it takes no "
                "notice of add_generation_prompt); --loss-on all counts all"
            )
        turn = turn if said.strip() else ""
    return len(before), len(before) + len(turn)


def _by_likeness(
    messages: Sequence[Message], text: str, turns: Sequence[int], write: _Write
) -> tuple[Span, ...] | None:
    """All turns, where each has around it what the first after such a message has.

    None where that cannot be told, or is not so.
    """
    ends = _ends_of_messages(messages, text, write)
    if ends is None:
        return None
    spans: list[Span] = []
    headers: dict[str, str] = {}
    ending = ""
    for turn in turns:
        before, end = ends[turn - 1], ends[turn]
        role = messages[turn - 1]["role"]
        if role not in headers:
            first = _by_prefix(messages, text, turn, write)
            headers[role] = text[before : first[0]].lstrip()
            ending = text[end : first[1]].strip()
        start, stop = _after(text, before, headers[role]), _after(text, end, ending)
        if start is None or stop is None or start > end:
            return None
        spans.append((start, stop))
    return tuple(spans) if spans[-1] == _by_prefix(messages, text, turns[-1], write) else None


def _ends_of_messages(messages: Sequence[Message], text: str, write: _Write) -> list[int] | None:
    """Where in the text each message's content ends, but for white space; None if nobody can tell.

    The whole is written once more, with a sign of its own for each, out of a plane of Unicode that
    no text uses.
    """
    if len(messages) > _PLANE_SIGNS or _MARKS.search(text):
        return None
    marks, marked = [chr(_PLANE + place) for place in range(len(messages))], []
    for message, mark in zip(messages, marks, strict=True):
        content = message["content"]
        said = len(content.rstrip())
        marked.append({**message, "content": content[:said] + mark + content[said:]})
    try:
        parts = _MARKS.split(write(marked, False))
    except AnswersError:
        return None
    # What was split at stands at the odd places.
    if parts[1::2] != marks or "".join(parts[::2]) != text:
        return None
    return list(accumulate(len(part) for part in parts[:-1:2]))


def _after(text: str, place: int, what: str) -> int | None:
    """Where `what` ends that stands at a place, maybe after white space; None if it does not."""
    while text[place : place + 1].isspace():
        place += 1
    return place + len(what) if what and text.startswith(what, place) else None


def _turn(upto: str, before: str, text: str, said: str) -> str | None:
    """What the assistant says in one turn, with what ends it; None when it is not in the text."""
    if not (text.startswith(before) and upto.startswith(before)):
        return None
    found: str | None = upto[len(before) :]
    if not text.startswith(upto):
        rest, turn = text[len(before) :], upto[len(before) :]
        found = (
            _later(turn, rest, said) or _later(turn, rest, said.strip()) or _unthought(turn, rest)
        )
    if found is None:
        return None
    ended, spoken = found.rstrip(), said.rpartition(_THOUGHT)[2].strip()
    return found if spoken and ended.endswith(spoken) else ended


def _later(turn: str, rest: str, said: str) -> str | None:
    """The end of a turn from what is said on, where the rest of the text begins with that.

    As of Qwen 3, which leaves out of earlier turns what comes before what is said.
    """
    place = turn.find(said) if said else -1
    while place >= 0:
        if rest.startswith(turn[place:]):
            return turn[place:]
        place = turn.find(said, place + 1)
    return None


def _unthought(turn: str, rest: str) -> str | None:
    """The same where what was thought is a part of what is said."""
    _, thought, spoken = turn.rpartition(_THOUGHT)
    forms = (spoken, spoken.lstrip("\n"), spoken.lstrip()) if thought else ()
    return next((form for form in forms if form and rest.startswith(form)), None)
