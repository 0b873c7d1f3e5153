"""Names of special tokens that a message quotes: they stay text, where a template's are tokens.

A sign within each keeps them apart in the text of a conversation, until that is encoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from backends.nn.records import RecordError

QUOTED = "\ufdd0"
"""Stands within the name of a special token that a message quotes, so that it is no token's name.

Unicode has it for programs' own use; no text has it.
"""


def special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the names of its special tokens in a text; those of one sign are words as well."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})") if longest else None


def with_quoted(content: str, special: re.Pattern[str] | None) -> str:
    """What a message says, with QUOTED in all names of special tokens.

    Raises RecordError when it holds that already.
    """
    if QUOTED in content:
        raise RecordError("a string in it holds U+FDD0, which is no character; take it out")
    # What is left of two names that overlap may be one.
    while special is not None and special.search(content):
        content = special.sub(lambda name: f"{name[0][:1]}{QUOTED}{name[0][1:]}", content)
    return content


class Part(NamedTuple):
    """A stretch of a text, `text` from `begin` on of the text `owner`, that is encoded by itself.

    literal  no special token is in it
    """

    owner: int
    begin: int
    text: str
    literal: bool

    def placed(self, characters: NDArray[np.int64]) -> NDArray[np.int64]:
        """In the whole text, of places int64[n, 2] in this one without QUOTED."""
        if self.literal and characters.size:
            kept = [n for n, sign in enumerate(self.text) if sign != QUOTED]
            characters = np.asarray([*kept, len(self.text)], np.int64)[characters]
        return self.begin + characters


def parts_of(texts: Sequence[str], special: re.Pattern[str] | None) -> list[Part]:
    """Texts that a chat template wrote: each whole, or, where it quotes some, at special tokens.

    A stretch between these that quotes one is encoded by itself, with no special token in it.
    """
    parts = []
    for owner, text in enumerate(texts):
        stretches = special.split(text) if special is not None and QUOTED in text else [text]
        begin = 0
        for literal, some in groupby(stretches, lambda stretch: QUOTED in stretch):
            stretch = "".join(some)
            parts.append(Part(owner, begin, stretch, literal))
            begin += len(stretch)
    return parts
