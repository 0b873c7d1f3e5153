"""Where in a conversation, as a chat template writes it, the assistant's turns are.

A template with `{% generation %}` says it itself. Of others the conversation is written up to each
turn: what comes after the header of an answer, up to and with what ends the turn, is the answer.
That takes templates that write a beginning of a conversation as they write the beginning of the
whole, which is looked at each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from backends.nn.records import ASSISTANT, AnswersError, Message, Span

FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}
"""For templates that write the day, as Llama 3's do, in place of today, so that a text is the same
in every run. It is the day that they take themselves where they cannot ask."""

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
        render: Any = render_jinja_template  # its annotation names the text alone
        written, spans = render(
            conversations=[list(messages)], chat_template=template,
            return_assistant_tokens_mask=True, **tokenizer.special_tokens_map, **FIXED,
        )  # fmt: skip
        if written[0] != text:
            raise AnswersError("the tokenizer's chat template writes it otherwise each time")
        return tuple((int(start), int(end)) for start, end in spans[0])

    def write(count: int, asks: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(
                list(messages[:count]), tokenize=False, add_generation_prompt=asks, **FIXED
            ))  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            raise AnswersError(
                "the tokenizer's chat template does not write conversations in part, so that the "
                f"assistant's turns cannot be told ({type(error).__name__}); --loss-on all counts "
                "all"
            ) from error

    return _by_prefixes(messages, text, write)


def _by_prefixes(
    messages: Sequence[Message], text: str, write: Callable[[int, bool], str]
) -> tuple[Span, ...]:
    spans: list[Span] = []
    for index, message in enumerate(messages):
        asked = any(earlier["role"] == "user" for earlier in messages[:index])
        if message["role"] != ASSISTANT or not asked:
            continue
        before = write(index, True)
        start = len(before)
        turn = _turn(write(index + 1, False), before, text, message["content"])
        if turn is None or (spans and start < spans[-1][1]):
            raise AnswersError(
                "the tokenizer's chat template writes a turn otherwise when others follow it, so "
                "that the assistant's turns cannot be told; --loss-on all counts all"
            )
        header = turn.partition(message["content"].strip())[0].strip()
        if header and before == write(index, False):
            raise AnswersError(
                "the tokenizer's chat template does not say where an answer begins (it takes no "
                "notice of add_generation_prompt); --loss-on all counts all"
            )
        spans.append((start, start + len(turn)))
    return tuple(spans)


def _turn(upto: str, before: str, text: str, said: str) -> str | None:
    """What the assistant says in one turn, with what ends it; None when it is not in the text."""
    if not (text.startswith(before) and upto.startswith(before)):
        return None
    found: str | None = upto[len(before) :]
    if not text.startswith(upto):
        rest, turn = text[len(before) :], upto[len(before) :]
        found = _later(turn, rest, said) or _later(turn, rest, said.strip())
    if found is None:
        return None
    ended = found.rstrip()
    return found if said.strip() and ended.endswith(said.strip()) else ended


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
