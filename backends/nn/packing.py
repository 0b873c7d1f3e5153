"""From documents to sequences of one length, marked as `marks` says.

Plain texts follow each other and are cut wherever a sequence ends. A conversation is kept whole:
it goes into the sequence that it fills best, of those that are still open; what is longer than a
sequence loses its end, which is counted, and what has then nothing to predict is left out. What is
left of such a sequence is filled with tokens that are not counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.nn.documents import Piece
from backends.nn.marks import APART, ID_MOST, UNCOUNTED, counted
from backends.nn.records import Span
from backends.nn.texts import DataError
from backends.nn.tokenizer import Placed, Tokenizer, end_of_text

Advance = Callable[[int], None]
Tokens = NDArray[np.int32]

_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 1024
_BLOCK_TOKENS = 1 << 20
_OPEN_ROWS = 128


class Plan(NamedTuple):
    """How documents become sequences.

    completions  of conversations only what the assistant says is counted in the loss
    apart        documents do not see each other: the model can do that
    held_out     share of the documents that are not trained on, chosen by a hash of their text, so
                 that it is the same ones every time, and copies are on one side
    """

    completions: bool = False
    apart: bool = True
    held_out: float = 0.0


@dataclass
class Facts:
    """What became of the documents, in both parts together.

    tokens      of all documents, before anything was cut off
    unknown     of these, unknown to the tokenizer
    counted     predictions that are part of the loss
    cut         tokens that were cut off conversations longer than a sequence
    padding     tokens that fill sequences
    documents   how many, and of these `talks` are conversations or pairs, `held` are held out,
                `empty` are conversations without a token to predict, which are left out
    """

    tokens: int = 0
    unknown: int = 0
    counted: int = 0
    cut: int = 0
    padding: int = 0
    documents: int = 0
    talks: int = 0
    held: int = 0
    empty: int = 0


class Block(NamedTuple):
    """Sequences int32[k, length], to be trained on or held out."""

    rows: Tokens
    held: bool


def blocks(
    documents: Iterable[Piece], tokenizer: Tokenizer, length: int, vocabulary: int | None,
    facts: Facts, plan: Plan | None = None, advance: Advance = lambda done_bytes: None,
) -> Iterator[Block]:  # fmt: skip
    """All sequences, some at a time; `facts` are counted on the way.

    vocabulary  how many ids the model has
    plan        None: plain ids, all documents as one text, as whoever packs them by hand has it

    Raises DataError when an id is beyond the vocabulary.
    """
    fill = end_of_text(tokenizer)
    sides = [_Side(length, fill, held, facts, plan) for held in (False, True)]
    side = sides[0]
    for batch in _batches(documents):
        for piece, ids in encoded(batch, tokenizer, plan):
            _require_ids(ids, vocabulary)
            plain = ids & (ID_MOST - 1)
            facts.tokens += ids.size
            if tokenizer.unknown is not None and tokenizer.unknown not in tokenizer.end:
                facts.unknown += int(np.count_nonzero(plain == tokenizer.unknown))
            if piece.begins:
                held = plan is not None and _is_held_out(piece.text, plan.held_out)
                side = sides[held]
                facts.documents, facts.held = facts.documents + 1, facts.held + held
                facts.talks += piece.talk
            side.add(piece, ids)
            advance(piece.done_bytes)
        for each in sides:
            yield from each.full()
    for each in sides:
        yield from each.rest()


def encoded(
    batch: Sequence[Piece], tokenizer: Tokenizer, plan: Plan | None
) -> Iterator[tuple[Piece, Tokens]]:
    """Tokens of each piece with the tokenizer's marks around its document."""
    for piece, placed in zip(batch, _placed(batch, tokenizer), strict=True):
        ids = placed.ids
        start = tokenizer.start if piece.begins and not piece.marked else ()
        end = tokenizer.end if piece.ends else ()
        if piece.marked:
            # Its template has written its own; only the end of text may be missing.
            end = () if set(end[-1:]) & set(ids[-2:].tolist()) else end[-1:]
        tokens = np.concatenate([np.asarray(start, np.int32), ids, np.asarray(end, np.int32)])
        if plan is not None:
            if piece.answers is not None:
                inner = slice(len(start), len(start) + len(ids))
                counts = np.zeros(tokens.size, bool)
                counts[inner] = within(placed.characters, piece.answers)
                said = len(piece.text.rstrip())
                counts[inner.stop :] = any(last >= said > 0 for _, last in piece.answers)
                tokens[~counts] |= UNCOUNTED
            if piece.begins and tokens.size:
                tokens[0] |= UNCOUNTED | (APART if plan.apart else 0)
        yield piece, tokens


def within(characters: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """bool[n]: which tokens have a character in one of the spans.

    spans  in order, none into another
    """
    first, last = characters[:, 0], np.maximum(characters[:, 1], characters[:, 0] + 1)
    starts, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
    # More spans begin before its end than end before its beginning.
    return np.searchsorted(starts, last, "left") > np.searchsorted(ends, first, "right")


def _placed(batch: Sequence[Piece], tokenizer: Tokenizer) -> list[Placed]:
    """Ids of each piece; their characters only where somebody asks."""
    nowhere = np.empty((0, 2), np.int64)
    found: dict[int, Placed] = {}
    for marked, asked in product((False, True), repeat=2):
        chosen = [
            n for n, piece in enumerate(batch)
            if piece.marked == marked and (piece.answers is not None) == asked
        ]  # fmt: skip
        texts = [batch[n].text for n in chosen]
        if asked and texts:
            found |= dict(zip(chosen, tokenizer.encode_placed(texts, marked), strict=True))
        elif texts:
            ids = tokenizer.encode(texts, marked)
            found |= {n: Placed(each, nowhere) for n, each in zip(chosen, ids, strict=True)}
    return [found[n] for n in range(len(batch))]


def _require_ids(tokens: Tokens, vocabulary: int | None) -> None:
    most = ID_MOST if vocabulary is None else min(vocabulary, ID_MOST)
    if tokens.size and int((tokens & (ID_MOST - 1)).max()) >= most:
        raise DataError(
            f"the tokenizer gives ids beyond the {most:,} of the model's vocabulary; they are not "
            "of one checkpoint"
        )


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


class _Side:
    """The sequences of one part of the documents, as they fill."""

    def __init__(self, length: int, fill: int, held: bool, facts: Facts, plan: Plan | None) -> None:
        self._length, self._held, self._facts, self._plan = length, held, facts, plan
        first = fill | UNCOUNTED | (APART if plan is not None and plan.apart else 0)
        self._fill = np.full(length, fill | UNCOUNTED, np.int32)
        self._fill[0] = first
        self._stream: list[Tokens] = []
        self._waiting = 0
        self._talk: list[Tokens] = []
        self._open: list[list[Tokens]] = []
        self._room: list[int] = []
        self._closed: list[Tokens] = []

    def add(self, piece: Piece, tokens: Tokens) -> None:
        if self._plan is None or not piece.talk:
            self._stream.append(tokens)
            self._waiting += tokens.size
            return
        self._talk.append(tokens)
        if piece.ends:
            whole, self._talk = np.concatenate(self._talk), []
            self._place(whole)

    def _place(self, talk: Tokens) -> None:
        kept = talk[: self._length]
        empty = not counted(kept[None])
        self._facts.empty += empty
        if kept.size < talk.size:
            self._facts.cut += talk.size - (0 if empty else kept.size)
        if empty:
            return
        fits = [(room, row) for row, room in enumerate(self._room) if room >= kept.size]
        if fits:
            row = min(fits)[1]
        else:
            if len(self._open) == _OPEN_ROWS:
                self._close(min(range(_OPEN_ROWS), key=self._room.__getitem__))
            self._open.append([])
            self._room.append(self._length)
            row = len(self._open) - 1
        self._open[row].append(kept)
        self._room[row] -= kept.size
        if not self._room[row]:
            self._close(row)

    def _close(self, row: int) -> None:
        room, parts = self._room.pop(row), self._open.pop(row)
        self._facts.padding += room
        self._closed.append(np.concatenate([*parts, self._fill[:room]]))

    def full(self) -> Iterator[Block]:
        """What is full, once there is enough of it."""
        if self._waiting >= max(self._length, _BLOCK_TOKENS):
            yield from self._streamed()
        if len(self._closed) * self._length >= _BLOCK_TOKENS:
            yield from self._packed()

    def rest(self) -> Iterator[Block]:
        """What is left; less than a sequence of plain text is dropped."""
        yield from self._streamed()
        while self._open:
            self._close(0)
        yield from self._packed()

    def _streamed(self) -> Iterator[Block]:
        if self._waiting >= self._length:
            stream = np.concatenate(self._stream)
            whole = self._waiting - self._waiting % self._length
            yield self._block(stream[:whole].reshape(-1, self._length))
            self._stream, self._waiting = [stream[whole:]], self._waiting - whole

    def _packed(self) -> Iterator[Block]:
        if self._closed:
            rows, self._closed = np.stack(self._closed), []
            yield self._block(rows)

    def _block(self, rows: Tokens) -> Block:
        self._facts.counted += counted(rows)
        return Block(rows, self._held)


def first_tokens(
    documents: Iterable[Piece], tokenizer: Tokenizer, count: int, plan: Plan | None = None
) -> list[int]:
    """The first so many tokens, or all there are: ids, or marked with a plan."""
    found: list[int] = []
    for batch in _batches(documents, characters=1):
        for _, tokens in encoded(batch, tokenizer, plan):
            found += tokens.tolist()
        if len(found) >= count:
            break
    return found[:count]


def _batches(documents: Iterable[Piece], characters: int | None = None) -> Iterator[list[Piece]]:
    """Pieces to encode together: a fast tokenizer takes one a core."""
    batch: list[Piece] = []
    size = 0
    for piece in documents:
        batch.append(piece)
        size += len(piece.text)
        if size >= (characters or _BATCH_CHARACTERS) or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
