"""From documents to token sequences of one length, and the order training takes them in.

All documents follow each other, each with the tokenizer's marks around it, cut into sequences; the
rest is dropped. A large corpus is a file, mapped into memory:

    DIR/tokens.int32   the sequences, one after the other, little-endian
    DIR/corpus.json    how many there are, and tags of what they were made of and of themselves
    DIR/data.key       32 random bytes, without which nobody can try texts against the tags

It holds the private text. The directory and its files are for their owner alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from backends.files import (
    end_replacing,
    opened,
    read_bounded,
    replacing_directory,
    require_own,
    write_json,
)
from backends.nn.documents import Piece, pieces
from backends.nn.texts import DataError, Texts
from backends.nn.tokenizer import Tokenizer

Advance = Callable[[int], None]

_FORMAT = 1
_TOKEN = np.dtype("<i4")
_KEY_BYTES = 32
_FACTS_BYTES_MAX = 1 << 16
_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 1024
_BLOCK_TOKENS = 1 << 20
_CHUNK_BYTES = 1 << 20


class Sequences(Protocol):
    """int64[n, S] token ids, as a tensor or from a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, S)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> torch.Tensor: ...


class Corpus:
    """int64[n, S] from a mapped file: what is asked for is copied, by index, slice or list.

    unknown  share of all tokens that the tokenizer did not know
    """

    def __init__(self, path: Path, count: int, length: int, unknown: float = 0.0) -> None:
        """Raises OSError when it cannot be mapped, ValueError when it has another size."""
        wanted_bytes = count * length * _TOKEN.itemsize
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size != wanted_bytes or not wanted_bytes:
                raise ValueError(f"{path} is not {wanted_bytes} bytes long")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._rows = np.frombuffer(self._map, _TOKEN).reshape(count, length)
        self.unknown = unknown

    @property
    def shape(self) -> tuple[int, int]:
        """(n, S)."""
        return self._rows.shape[0], self._rows.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any, /) -> torch.Tensor:
        found = self._rows[np.asarray(chosen) if isinstance(chosen, torch.Tensor) else chosen]
        copied = torch.from_numpy(found.astype(np.int64))
        self._let_go()
        return copied

    def tag(self, key: bytes) -> str:
        """HMAC-SHA256 of the file, in hex digits."""
        tag = hmac.new(key, digestmod=hashlib.sha256)
        rows = max(1, _BLOCK_TOKENS // self.shape[1])
        for start in range(0, len(self), rows):
            tag.update(self._rows[start : start + rows].tobytes())
            self._let_go()
        return tag.hexdigest()

    def _let_go(self) -> None:
        """What was looked at, and the system's guess at what comes next, would stay in memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


@dataclass
class _Tally:
    """Tokens so far, and how many of them were unknown."""

    tokens: int = 0
    unknown: int = 0


def pack(
    documents: Iterable[Piece], tokenizer: Tokenizer, length: int, vocabulary: int | None = None
) -> torch.Tensor:
    """int64[n, length]: all documents one after the other, in memory.

    vocabulary  how many ids the model has

    Raises DataError when the text is too short for one sequence, or an id is beyond the vocabulary.
    """
    tally = _Tally()
    blocks = list(_blocks(documents, tokenizer, length, vocabulary, tally, lambda done: None))
    if not blocks:
        raise _too_short(tally, length)
    return torch.from_numpy(np.concatenate(blocks).astype(np.int64))


def first_tokens(documents: Iterable[Piece], tokenizer: Tokenizer, count: int) -> list[int]:
    """The first so many tokens, or all there are."""
    found: list[int] = []
    for batch in _batches(documents, characters=1):
        for ids, _ in _encoded(batch, tokenizer):
            found += ids.tolist()
        if len(found) >= count:
            break
    return found[:count]


def corpus_of(
    texts: Texts,
    tokenizer: Tokenizer,
    length: int,
    vocabulary: int,
    directory: Path,
    advance: Advance = lambda done_bytes: None,
) -> Corpus:
    """The texts as sequences in `directory`, which takes the place of what is there.

    What is there is used when it was made of the same texts, by the same tokenizer, for the same
    length and vocabulary, and is whole: all of it is read to know that.

    vocabulary  how many ids the model has
    advance     is told how many bytes of the texts are done

    Raises DataError when the text is too short for one sequence, an id is beyond the vocabulary,
    or the directory cannot be written.
    """
    made_of = [_FORMAT, tokenizer.identity(), length, vocabulary]
    found = _found(directory, made_of, texts, length)
    if found is not None:
        return found
    tally = _Tally()
    try:
        if directory.parent.is_dir():
            end_replacing(
                directory.parent, {directory.name}
            )  # what a run that was killed has left is private
        with replacing_directory(directory) as aside:
            key = os.urandom(_KEY_BYTES)
            _private_file(aside / "data.key", [key])
            tokens = hmac.new(key, digestmod=hashlib.sha256)
            blocks = _blocks(
                pieces(texts, tokenizer.chat), tokenizer, length, vocabulary, tally, advance
            )
            size = _private_file(aside / "tokens.int32", _updating(tokens, blocks))
            count = size // _TOKEN.itemsize // length
            if not count:
                raise _too_short(tally, length)
            unknown = tally.unknown / tally.tokens
            facts = {
                "made_of": _made_of_tag(key, made_of, texts), "tokens": tokens.hexdigest(),
                "count": count, "unknown": unknown,
            }  # fmt: skip
            write_json(aside / "corpus.json", facts)
            (aside / "corpus.json").chmod(0o600)
        return Corpus(directory / "tokens.int32", count, length, unknown)
    except OSError as error:
        raise DataError(
            f"{directory}: the tokens of the text cannot be kept there "
            f"({error.strerror or error}); they take 4 bytes each"
        ) from error


def _found(directory: Path, made_of: list[Any], texts: Texts, length: int) -> Corpus | None:
    """The corpus that is there, if it is of these texts and whole."""
    paths = [directory / name for name in ("data.key", "corpus.json", "tokens.int32")]
    try:
        require_own(directory, *paths)
        key = read_bounded(paths[0], _KEY_BYTES)
        facts = json.loads(read_bounded(paths[1], _FACTS_BYTES_MAX))
        count, unknown = int(facts["count"]), float(facts["unknown"])
        if len(key) != _KEY_BYTES or not 0 <= unknown <= 1:
            return None
        corpus = Corpus(paths[2], count, length, unknown)
        same = hmac.compare_digest(facts["made_of"], _made_of_tag(key, made_of, texts))
        return corpus if same and hmac.compare_digest(facts["tokens"], corpus.tag(key)) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # it is made anew


def _made_of_tag(key: bytes, made_of: list[Any], texts: Texts) -> str:
    """HMAC-SHA256 of all that decides the tokens. Raises DataError when a text has changed."""
    files = [(file.form, file.encoding, file.size_bytes) for file in texts.files]
    tag = hmac.new(key, json.dumps([made_of, files]).encode(), hashlib.sha256)
    for text in texts.files:
        try:
            with opened(text.path) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    tag.update(chunk)
                if text.changed(file):
                    raise DataError(f"{text.path}: it has changed since it was looked through")
        except OSError as error:
            raise DataError(f"{text.path}: cannot be read ({error.strerror or error})") from error
    return tag.hexdigest()


def _private_file(path: Path, parts: Iterable[bytes]) -> int:
    """Write a new file that only its owner can read; returns its size."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for part in parts:
            file.write(part)
        return file.tell()


def _updating(tag: hmac.HMAC, blocks: Iterable[NDArray[np.int32]]) -> Iterator[bytes]:
    for block in blocks:
        raw = block.astype(_TOKEN, copy=False).tobytes()
        tag.update(raw)
        yield raw


def _blocks(
    documents: Iterable[Piece],
    tokenizer: Tokenizer,
    length: int,
    vocabulary: int | None,
    tally: _Tally,
    advance: Advance,
) -> Iterator[NDArray[np.int32]]:
    """int32[k, length], several times."""
    held: list[NDArray[np.int32]] = []
    waiting = 0
    for batch in _batches(documents):
        for ids, done_bytes in _encoded(batch, tokenizer):
            if vocabulary is not None and ids.size and int(ids.max()) >= vocabulary:
                raise DataError(
                    f"the tokenizer gives ids beyond the {vocabulary:,} of the model's "
                    "vocabulary; they are not of one checkpoint"
                )
            tally.tokens += ids.size
            if tokenizer.unknown is not None and tokenizer.unknown not in tokenizer.end:
                tally.unknown += int(np.count_nonzero(ids == tokenizer.unknown))
            held.append(ids)
            waiting += ids.size
            advance(done_bytes)
        if waiting >= max(length, _BLOCK_TOKENS):
            stream = np.concatenate(held)
            whole = waiting - waiting % length
            yield stream[:whole].reshape(-1, length)
            held, waiting = [stream[whole:]], waiting - whole
    if waiting >= length:
        stream = np.concatenate(held)
        yield stream[: waiting - waiting % length].reshape(-1, length)


def _batches(
    documents: Iterable[Piece], characters: int = _BATCH_CHARACTERS
) -> Iterator[list[Piece]]:
    """Pieces to encode together: a fast tokenizer takes one a core."""
    batch: list[Piece] = []
    size = 0
    for piece in documents:
        batch.append(piece)
        size += len(piece.text)
        if size >= characters or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[Piece], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Ids of each piece with the marks around its document, and bytes done."""
    found = tokenizer.encode([piece.text for piece in batch])
    for piece, ids in zip(batch, found, strict=True):
        start = tokenizer.start if piece.begins and not piece.marked else ()
        end = tokenizer.end if piece.ends else ()
        if piece.marked:
            # Its template has written its own; only the end of text may be missing.
            end = () if set(end[-1:]) & set(ids[-2:].tolist()) else end[-1:]
        parts = [np.asarray(start, np.int32), ids, np.asarray(end, np.int32)]
        yield np.concatenate(parts), piece.done_bytes


def _too_short(tally: _Tally, length: int) -> DataError:
    return DataError(
        f"the text has {tally.tokens} tokens, fewer than one sequence of {length}; give more "
        "text or shorter sequences"
    )


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which sequences step `step` (from 0) trains on: a fresh permutation every epoch.

    A pure function of its arguments, so a resumed run goes on with exactly the same data.
    """
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        chosen.append(int(_permutation(count, seed, epoch)[place]))
    return chosen


def order_seed(seed: int, epoch: int) -> int:
    """Of the order of one epoch, for a torch generator, which takes 63 bits.

    seed  from 0 to 2^63 - 1
    """
    mixed = (seed << 20) + epoch
    if mixed < 1 << 63:
        return mixed
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:7], "big")


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    """int64[count]; the same for all steps of an epoch, and drawn once for them."""
    generator = torch.Generator().manual_seed(order_seed(seed, epoch))
    return torch.randperm(count, generator=generator)
