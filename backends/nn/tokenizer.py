"""Tokenizers as training needs them, and whether one can be trusted with a text."""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from backends.errors import UserError
from backends.nn.answers import FIXED, answer_spans
from backends.nn.quotes import QUOTED, parts_of, special_names, with_quoted
from backends.nn.records import AnswersError, Message, RecordError, Span

UNKNOWN_SAID = 0.01
"""Share of unknown tokens from which on it is said."""

UNKNOWN_MOST = 0.5
KEPT_LEAST = 0.5
KEPT_SAID = 0.98
"""Of a sample's letters, how many must come back, and below which share it is said."""

_PROBES = ("a", "A", "1", "一", ".")
_USUAL_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_OF_ITS_OWN_LEAST = 3  # tokens that are not special: nucleotides are four


class TokenizerError(UserError, ValueError):
    """A tokenizer is missing, incomplete, or not one for this text."""


class Placed(NamedTuple):
    """Ids int32[n], and the characters int64[n, 2] that each is made of, from first to past last.

    A token that is no character's has an empty place.
    """

    ids: NDArray[np.int32]
    characters: NDArray[np.int64]


_NOWHERE = np.empty((0, 2), np.int64)


class Tokenizer(Protocol):
    """What is needed of a tokenizer.

    start, end  ids around a document
    unknown     the id of what the vocabulary has not, if there is one
    places      whether it can say which characters a token is made of
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    unknown: int | None
    places: bool

    def encode(self, texts: Sequence[str], marked: bool = False) -> list[NDArray[np.int32]]:
        """The ids of each text, without those around a document.

        marked  `chat` wrote them, or somebody who knows the marks: the name of a special token is
                that token, where a message does not quote it. In other texts it is text
        """
        ...

    def encode_placed(self, texts: Sequence[str], marked: bool = False) -> list[Placed]:
        """The same ids, and the characters of each; only with `places`."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of such ids."""
        ...

    def chat(self, messages: Sequence[Message]) -> str | None:
        """A conversation as its template writes it; None without a template.

        Names of special tokens in its messages have QUOTED in them.

        Raises RecordError when the template cannot write it.
        """
        ...

    def answers(self, messages: Sequence[Message], text: str) -> tuple[Span, ...]:
        """What of `text`, which `chat` wrote, the assistant says.

        Raises AnswersError when that cannot be told.
        """
        ...

    def identity(self) -> str:
        """Changes when it may give other ids."""
        ...


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends a document; 0 where none does."""
    return tokenizer.end[-1] if tokenizer.end else 0


class ByteTokenizer:
    """One token a byte: for models without a tokenizer (random weights).

    end  ids after each document
    """

    def __init__(self, end: tuple[int, ...] = ()) -> None:
        self.start: tuple[int, ...] = ()
        self.end = end
        self.unknown: int | None = None
        self.places = True

    def encode(self, texts: Sequence[str], marked: bool = False) -> list[NDArray[np.int32]]:
        """UTF-8 bytes as token ids; there are no special ones."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_placed(self, texts: Sequence[str], marked: bool = False) -> list[Placed]:
        """The same, and the character that each byte is of."""
        found = []
        for ids in self.encode(texts):
            begins = (ids & 0xC0) != 0x80  # the others go on with a character
            place = np.cumsum(begins) - 1
            found.append(Placed(ids, np.stack((place, place + 1), axis=1).astype(np.int64)))
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of such ids; ids above 255 are left out."""
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    def chat(self, messages: Sequence[Message]) -> str | None:
        """It has no template."""
        return None

    def answers(self, messages: Sequence[Message], text: str) -> tuple[Span, ...]:
        """It has no template."""
        raise AnswersError("there is no chat template")

    def identity(self) -> str:
        """The same for all with this end."""
        return f"bytes, end {self.end}"


class HubTokenizer:
    """A tokenizer of `transformers`, fast or slow.

    Documents get what it puts around a text by itself, and its end-of-text token once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        tokenizer.model_max_length = sys.maxsize  # texts are cut into sequences afterwards
        self.start, self.end = _around(tokenizer)
        stop = tokenizer.eos_token_id
        if stop is not None and self.end[-1:] != (stop,):
            self.end += (stop,)
        self.unknown: int | None = tokenizer.unk_token_id
        self._plain = self.places = _is_plain(tokenizer)
        self._special = special_names(tokenizer)

    def encode(self, texts: Sequence[str], marked: bool = False) -> list[NDArray[np.int32]]:
        """The ids of each text, without those around a document."""
        return [placed.ids for placed in self._encoded(texts, marked, self._ids)]

    def encode_placed(self, texts: Sequence[str], marked: bool = False) -> list[Placed]:
        """The same ids, and the characters of each, by the tokenizer's own account."""
        return self._encoded(texts, marked, self._ids_placed)

    def _encoded(
        self, texts: Sequence[str], marked: bool, encode: Callable[[list[str], bool], list[Placed]]
    ) -> list[Placed]:
        if not marked:
            return encode(list(texts), True)
        parts = parts_of(texts, self._special)
        made: dict[int, Placed] = {}
        for literal in (False, True):
            chosen = [n for n, part in enumerate(parts) if part.literal == literal]
            bare = [parts[n].text.replace(QUOTED, "") for n in chosen]
            made |= dict(zip(chosen, encode(bare, literal) if bare else [], strict=True))
        found: list[list[Placed]] = [[] for _ in texts]
        for number, part in enumerate(parts):
            ids, characters = made[number]
            found[part.owner].append(Placed(ids, part.placed(characters)))
        return [Placed(*map(np.concatenate, zip(*placed, strict=True))) for placed in found]

    def _ids(self, texts: list[str], literal: bool) -> list[Placed]:
        if self._plain:
            backend = self._backend(literal)
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [Placed(np.asarray(e.ids, np.int32), _NOWHERE) for e in encodings]
        found = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False, split_special_tokens=literal,
        )  # fmt: skip
        return [Placed(np.asarray(ids, np.int32), _NOWHERE) for ids in found["input_ids"]]

    def _ids_placed(self, texts: list[str], literal: bool) -> list[Placed]:
        encodings = self._backend(literal).encode_batch(texts, add_special_tokens=False)
        return [
            Placed(np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2))
            for e in encodings
        ]

    def _backend(self, literal: bool) -> tokenizers.Tokenizer:
        backend: tokenizers.Tokenizer = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = literal
        return backend

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of such ids, special ones by name."""
        return str(self._tokenizer.decode(list(tokens)))

    def chat(self, messages: Sequence[Message]) -> str | None:
        """A conversation as its chat template writes it; None without a template.

        Raises RecordError when the template cannot write it.
        """
        if not self._tokenizer.chat_template:
            return None
        quoted = self._quoted(messages)
        try:
            return str(self._tokenizer.apply_chat_template(quoted, tokenize=False, **FIXED))
        except Exception as error:  # a template is a program: it may raise anything
            raise RecordError(
                f"the tokenizer's chat template cannot write it ({type(error).__name__}): "
                "the order of roles, or a role it does not know"
            ) from error

    def answers(self, messages: Sequence[Message], text: str) -> tuple[Span, ...]:
        """What of `text`, which `chat` wrote, the assistant says.

        Raises AnswersError when that cannot be told.
        """
        return answer_spans(self._tokenizer, self._quoted(messages), text)

    def _quoted(self, messages: Sequence[Message]) -> list[Message]:
        return [{**m, "content": with_quoted(m["content"], self._special)} for m in messages]

    def identity(self) -> str:
        """A digest of its vocabulary, its rules, its template and of the library's version."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else self._tokenizer.get_vocab()
        facts = [
            transformers.__version__, type(self._tokenizer).__name__, rules, self.start, self.end,
            self._tokenizer.chat_template,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether calling it is calling its backend, which is nearly twice as fast by itself."""
    fast = PreTrainedTokenizerFast
    return isinstance(tokenizer, fast) and all(
        getattr(type(tokenizer), name, None) is getattr(fast, name, None)
        for name in ("__call__", "_encode_plus")
    )


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that it puts before and after a text."""
    for probe in _PROBES:
        inner = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(inner) + 1 if inner else 0):
            if whole[start : start + len(inner)] == inner:
                return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    return (), ()


def load_tokenizer(directory: Path, gguf: str | None = None) -> HubTokenizer:
    """The tokenizer of a checkpoint's directory, or of a GGUF file in it.

    Raises TokenizerError when it cannot be had, or its vocabulary is empty.
    """
    try:
        # The directory is here, and nobody else need know its name. Code in it is never run.
        found = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False,
            **({"gguf_file": gguf} if gguf else {}),
        )  # fmt: skip
        vocabulary, special = found.get_vocab(), set(found.all_special_tokens)
    except Exception as error:  # of three libraries, down to bare ones
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        if not any((directory / name).exists() for name in _USUAL_FILES):
            why = f"there is no {', no '.join(_USUAL_FILES)}"
        raise TokenizerError(
            f"{directory}: no usable tokenizer ({why}); put its files there, tokenizer.json first "
            "of all"
        ) from error
    added = set(found.get_added_vocab())
    if len(set(vocabulary) - special - added) < _OF_ITS_OWN_LEAST:
        raise TokenizerError(
            f"{directory}: the tokenizer's vocabulary is empty: {missing_files(found, directory)}; "
            "put the tokenizer's files there, tokenizer.json first of all"
        )
    return HubTokenizer(found)


def missing_files(tokenizer: PreTrainedTokenizerBase, directory: Path) -> str:
    """Which of the files that its vocabulary could come from are not there."""
    names = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    missing = sorted(name for name in names if not (directory / name).exists())
    return f"there is no {', no '.join(missing)}" if missing else "its files hold no tokens"


@dataclass(frozen=True)
class RoundTrip:
    """What becomes of a sample that is encoded and decoded.

    unknown  share of its tokens that the vocabulary has not
    kept     share of its letters and signs that come back, in whatever case and with whatever
             accents and spaces: tokenizers may change those
    """

    unknown: float
    kept: float


def round_trip(tokenizer: Tokenizer, sample: Sequence[str]) -> RoundTrip:
    """Encode and decode texts that are not all white space."""
    tokens = unknown = there = back = 0
    for text, ids in zip(sample, tokenizer.encode(sample, marked=True), strict=True):
        known = ids[ids != tokenizer.unknown] if tokenizer.unknown is not None else ids
        tokens, unknown = tokens + ids.size, unknown + ids.size - known.size
        before, after = _folded(text), _folded(tokenizer.decode(known.tolist()))
        there, back = there + before.total(), back + (before & after).total()
    return RoundTrip(unknown / tokens if tokens else 1.0, back / there if there else 1.0)


def require_round_trip(tokenizer: Tokenizer, sample: Sequence[str], where: Path) -> str | None:
    """What to say of how the tokenizer treats the sample, if anything.

    Raises TokenizerError when little of it is left.
    """
    found = round_trip(tokenizer, sample)
    if found.unknown > UNKNOWN_MOST or found.kept < KEPT_LEAST:
        raise TokenizerError(
            f"{where}: this tokenizer is not for this text: {found.unknown:.0%} of the tokens of "
            f"a sample are unknown, {found.kept:.0%} of its letters come back; are all of the "
            "tokenizer's files there, and is the model for this language?"
        )
    if found.kept < KEPT_SAID:
        return f"of a sample's letters, {found.kept:.0%} come back from the tokenizer"
    return None


def _folded(text: str) -> Counter[str]:
    """Its letters and signs, without what a tokenizer may change."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(c for c in plain if not c.isspace() and unicodedata.category(c) != "Mn")
