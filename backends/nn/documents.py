"""The text of the files that `texts` found, as documents in pieces of bounded size.

A file is one document; of a dataset in JSON each record is one. Lines end in a plain newline,
however they end in the file.

Long documents come in pieces, so that nothing needs them whole. A piece ends before a single space,
so the next one begins with it, or after a single newline where there is no such space. Tokenizers
that split text before anything else (byte-level ones as of GPT-2, Llama 3 and Qwen, WordPiece, most
SentencePiece ones) split there too, so the tokens are those of the whole document; others may have
a token more for every PIECE characters.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from backends.files import opened
from backends.nn.records import Answers, Chat, RecordError, Span, rendered
from backends.nn.texts import DataError, TextFile, Texts

PIECE = 1 << 18
"""Characters of a piece, at most."""

LINE_CHARACTERS_MAX = 1 << 26
"""Of one line of JSON."""


class Piece(NamedTuple):
    """A part of a document, or a whole one.

    begins, ends  a document begins or ends with it
    marked        written by a chat template, special tokens included
    done_bytes    of all files, read up to here
    talk          of a conversation, or of a question and its answer
    answers       the characters that are counted in the loss; None for all
    """

    text: str
    begins: bool = True
    ends: bool = True
    marked: bool = False
    done_bytes: int = 0
    talk: bool = False
    answers: tuple[Span, ...] | None = None


def pieces(
    texts: Texts, chat: Chat, size: int = PIECE, answers: Answers | None = None
) -> Iterator[Piece]:
    """All documents of all files, in order; those of white space alone are left out.

    chat     writes conversations
    size     characters of a piece, at most
    answers  finds what of a conversation is counted; None counts all

    Raises DataError for a record of no known form, and for a file that has changed since it was
    looked through; the text of neither is quoted.
    """
    before = 0
    for file in texts.files:
        with _reading(file) as (binary, text):
            whole = file.form == "text"
            found = _cut(text, size) if whole else _records(file, text, chat, size, answers)
            for piece in found:
                yield piece._replace(done_bytes=before + min(binary.tell(), file.size_bytes))
        before += file.size_bytes


@contextmanager
def _reading(file: TextFile) -> Iterator[tuple[BinaryIO, io.TextIOWrapper]]:
    """The file, open and decoded. Raises DataError when it has changed, also in the meantime."""
    changed = f"{file.path}: it has changed since it was looked through; run again"
    try:
        with opened(file.path) as binary:
            if file.changed(binary):
                raise DataError(changed)
            text = io.TextIOWrapper(binary, file.encoding)
            try:
                yield binary, text
            finally:
                text.detach()
            if file.changed(binary):
                raise DataError(changed)
    except UnicodeDecodeError as error:
        raise DataError(changed) from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror or error})") from error


def _cut(text: io.TextIOWrapper, size: int) -> Iterator[Piece]:
    """One document, read to the end."""
    begins, held = True, text.read(size)
    while True:
        more = text.read(size)
        if not more:
            break
        held += more
        while len(held) > size:
            end = _place_to_cut(held, size)
            yield Piece(held[:end], begins, ends=False)
            begins, held = False, held[end:]
    if held.strip() or not begins:
        yield Piece(held, begins)


def _place_to_cut(text: str, size: int) -> int:
    """1 to `size`, where `text` is longer than that."""
    for between in (" ", "\n"):
        place = text.rfind(between, size // 2, size)
        while place > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place + (between == "\n")
            place = text.rfind(between, size // 2, place)
    return size


def _records(
    file: TextFile, text: io.TextIOWrapper, chat: Chat, size: int, answers: Answers | None
) -> Iterator[Piece]:
    """The documents of a dataset."""
    for number, record in _json_lines(file, text) if file.form == "jsonl" else _json(file, text):
        try:
            found = rendered(record, chat, answers)
        except RecordError as error:
            unit = "line" if file.form == "jsonl" else "record"
            raise DataError(f"{file.path}, {unit} {number}: {error}") from error
        if found.text.strip():
            for piece in _cut_text(found.text, size, found.answers):
                yield piece._replace(marked=found.marked, talk=found.talk)


def _cut_text(text: str, size: int, answers: tuple[Span, ...] | None) -> Iterator[Piece]:
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > size:
            end = start + _place_to_cut(text[start : start + size + 1], size)
        within = None if answers is None else _within(answers, start, end)
        yield Piece(text[start:end], start == 0, end == len(text), answers=within)
        start = end


def _within(spans: tuple[Span, ...], start: int, end: int) -> tuple[Span, ...]:
    """What of them is in a piece, by its own characters."""
    cut = ((max(first, start) - start, min(last, end) - start) for first, last in spans)
    return tuple((first, last) for first, last in cut if first < last)


def _json_lines(file: TextFile, text: io.TextIOWrapper) -> Iterator[tuple[int, object]]:
    """(number of the line, value) of each line that is not blank."""
    number = 0
    while line := text.readline(LINE_CHARACTERS_MAX + 1):
        number += 1
        if len(line) > LINE_CHARACTERS_MAX:
            raise DataError(
                f"{file.path}, line {number}: longer than {LINE_CHARACTERS_MAX:,} characters; "
                "JSON lines have one record a line"
            )
        if line.strip():
            yield number, _parsed(line, f"{file.path}, line {number}")


def _json(file: TextFile, text: io.TextIOWrapper) -> Iterator[tuple[int, object]]:
    value = _parsed(text.read(), str(file.path))
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: it is no JSON; mend it, or leave it out") from error


def sample(texts: Texts, chat: Chat, count: int = 16, size: int = 1 << 12) -> list[str]:
    """About `count` pieces of up to `size` characters, of files all over the texts, and of places
    all over each.

    Raises DataError as `pieces` does.
    """
    chosen = texts.files[:: -(-len(texts.files) // count)]
    found = []
    for file in chosen:
        spread = _spread(file, chat, -(-count // len(chosen)), size)
        found += [piece.text for piece in spread if piece.text.strip()]
    return found


def _spread(file: TextFile, chat: Chat, count: int, size: int) -> Iterator[Piece]:
    """So many pieces of a file at most: the first, and one after each such part of its bytes."""
    taken = 0
    for piece in pieces(Texts([file]), chat, size):
        if piece.done_bytes * count >= file.size_bytes * taken:
            yield piece
            taken += 1
            if taken == count:
                break
