"""Sequences of one length that `packing` made of documents, and the order training takes them in.

They are kept in a file, mapped into memory:

    DIR/tokens.int32   the sequences, one after the other, little-endian; those held out come last
    DIR/corpus.json    how many there are, what became of the documents, and tags of what they were
                       made of and of themselves
    DIR/data.key       32 random bytes, without which nobody can try texts against the tags

It holds the private text. The directory and its files are for their owner alone.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from backends.files import (
    end_replacing,
    opened,
    read_bounded,
    replacing_directory,
    require_own,
    write_json,
)
from backends.nn.documents import Piece, pieces
from backends.nn.packing import Advance, Block, Facts, Plan, blocks
from backends.nn.texts import DataError, Texts
from backends.nn.tokenizer import Tokenizer

_FORMAT = 3
_TOKENS = "tokens.int32"
_TOKEN = np.dtype("<i4")
_KEY_BYTES = 32
_FACTS_BYTES_MAX = 1 << 16
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_FILES_MANY = 20
"""A hash splits so many texts well enough."""
_HELD_MOST = 4
"""Times the share that was wanted: more than that is a bad split."""
_BLOCK_TOKENS = 1 << 20
_CHUNK_BYTES = 1 << 20


class Sequences(Protocol):
    """int64[n, S] token ids, marked or not (`marks`), as a tensor or from a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, S)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> torch.Tensor: ...


class Corpus:
    """int64[n, S] from a mapped file: what is asked for is copied, by index, slice or list.

    held_out  how many of them, the last, are not to be trained on
    facts     what became of the documents
    """

    def __init__(
        self, path: Path, count: int, length: int, held_out: int = 0, facts: Facts | None = None
    ) -> None:
        """Raises OSError when it cannot be mapped, ValueError when it has another size."""
        wanted_bytes = count * length * _TOKEN.itemsize
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size != wanted_bytes or not wanted_bytes:
                raise ValueError(f"{path} is not {wanted_bytes} bytes long")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._rows = np.frombuffer(self._map, _TOKEN).reshape(count, length)
        self.held_out = held_out
        self.facts = Facts() if facts is None else facts

    def parts(self) -> tuple[Corpus, Corpus]:
        """The sequences to train on, and those that are held out, maybe none."""
        train, held = copy.copy(self), copy.copy(self)
        kept = len(self) - self.held_out
        train._rows, held._rows = self._rows[:kept], self._rows[kept:]
        train.held_out, held.held_out = 0, 0
        return train, held

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


def pack(
    documents: Iterable[Piece], tokenizer: Tokenizer, length: int, vocabulary: int | None = None
) -> torch.Tensor:
    """int64[n, length]: all documents one after the other, as one text, in memory.

    vocabulary  how many ids the model has

    Raises DataError when the text is too short for one sequence, or an id is beyond the vocabulary.
    """
    facts = Facts()
    found = [block.rows for block in blocks(documents, tokenizer, length, vocabulary, facts)]
    if not found:
        raise _too_short(facts, length)
    return torch.from_numpy(np.concatenate(found).astype(np.int64))


def corpus_of(
    texts: Texts, tokenizer: Tokenizer, length: int, vocabulary: int, directory: Path,
    advance: Advance = lambda done_bytes: None, plan: Plan | None = None,
    accept: Callable[[Corpus], None] = lambda corpus: None,
) -> Corpus:  # fmt: skip
    """The texts as sequences in `directory`, which takes the place of what is there.

    What is there is used when it was made of the same texts, by the same tokenizer, for the same
    length, vocabulary and plan, and is whole: all of it is read to know that.

    vocabulary  how many ids the model has
    advance     is told how many bytes of the texts are done
    plan        None: all documents as one text, all of it counted
    accept      is given the sequences before they take the place of others; what it raises keeps
                those

    Raises DataError when the text is too short for one sequence, an id is beyond the vocabulary,
    or the directory cannot be written.
    """
    made_of = [_FORMAT, tokenizer.identity(), length, vocabulary, plan]
    found = _found(directory, made_of, texts, length)
    if found is not None:
        accept(found)
        return found

    def make(path: Path, plan: Plan | None) -> tuple[Facts, int, int]:
        answers = tokenizer.answers if plan is not None and plan.completions else None
        documents = pieces(texts, tokenizer.chat, answers=answers)
        facts = Facts()
        found = blocks(documents, tokenizer, length, vocabulary, facts, plan, advance)
        return facts, *_write_rows(path, found, length)

    try:
        if directory.parent.is_dir():
            end_replacing(
                directory.parent, {directory.name}
            )  # what a run that was killed has left is private
        with replacing_directory(directory) as aside:
            key = os.urandom(_KEY_BYTES)
            _private_file(aside / "data.key", [key])
            facts, count, held = _split(texts, plan, lambda plan: make(aside / _TOKENS, plan))
            if not count:
                raise _too_short(facts, length)
            made = Corpus(aside / _TOKENS, count, length, held, facts)
            accept(made)
            described = {
                "made_of": _made_of_tag(key, made_of, texts), "tokens": made.tag(key),
                "count": count, "held": held, "facts": asdict(facts),
            }  # fmt: skip
            write_json(aside / "corpus.json", described)
            (aside / "corpus.json").chmod(0o600)
        return Corpus(directory / _TOKENS, count, length, held, facts)
    except OSError as error:
        raise DataError(
            f"{directory}: the tokens of the text cannot be kept there "
            f"({error.strerror or error}); they take 4 bytes each"
        ) from error


def _split(
    texts: Texts, plan: Plan | None, make: Callable[[Plan | None], tuple[Facts, int, int]]
) -> tuple[Facts, int, int]:
    """What `make` makes: facts, how many sequences, and how many of them, the last, are held out.

    Of few documents, or of such as a hash splits badly, the last sequences are held out.
    """
    if plan is None or not plan.held_out:
        return make(plan)
    if len(texts.files) >= _FILES_MANY or any(file.form != "text" for file in texts.files):
        facts, count, held = make(plan)
        if 0 < held < count and held <= max(1, _HELD_MOST * plan.held_out * count):
            return facts, count, held
    facts, count, _ = make(plan._replace(held_out=0.0))
    return facts, count, min(max(0, count - 1), max(1, round(plan.held_out * count)))


def _write_rows(path: Path, found: Iterable[Block], length: int) -> tuple[int, int]:
    """Write sequences, those held out last; how many, and how many of those."""
    apart = path.with_name("held")
    for left in (path, apart):
        left.unlink(missing_ok=True)
    held_bytes = 0

    def trained() -> Iterator[bytes]:
        nonlocal held_bytes
        with os.fdopen(os.open(apart, _NEW_FILE, 0o600), "w+b") as held:
            for block in found:
                raw = block.rows.astype(_TOKEN, copy=False).tobytes()
                if block.held:
                    held_bytes += held.write(raw)
                else:
                    yield raw
            held.seek(0)
            while chunk := held.read(_CHUNK_BYTES):
                yield chunk

    size = _private_file(path, trained())
    apart.unlink()
    row_bytes = _TOKEN.itemsize * length
    return size // row_bytes, held_bytes // row_bytes


def _found(directory: Path, made_of: list[Any], texts: Texts, length: int) -> Corpus | None:
    """The corpus that is there, if it is of these texts and whole."""
    paths = [directory / name for name in ("data.key", "corpus.json", _TOKENS)]
    try:
        require_own(directory, *paths)
        key = read_bounded(paths[0], _KEY_BYTES)
        described = json.loads(read_bounded(paths[1], _FACTS_BYTES_MAX))
        count, held = int(described["count"]), int(described["held"])
        facts = Facts(**{name: int(value) for name, value in described["facts"].items()})
        if len(key) != _KEY_BYTES or not 0 <= held < max(1, count) or min(astuple(facts)) < 0:
            return None
        corpus = Corpus(paths[2], count, length, held, facts)
        same = hmac.compare_digest(described["made_of"], _made_of_tag(key, made_of, texts))
        whole = same and hmac.compare_digest(described["tokens"], corpus.tag(key))
        return corpus if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError):  # fmt: skip
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
    with os.fdopen(os.open(path, _NEW_FILE, 0o600), "wb") as file:
        for part in parts:
            file.write(part)
        return file.tell()


def _too_short(facts: Facts, length: int) -> DataError:
    if facts.empty:
        return DataError(
            f"no conversation has a token to predict within one sequence of {length}: the "
            "assistant says nothing, or not before that; look at --preview, or give a longer "
            "--sequence"
        )
    return DataError(
        f"the text has {facts.tokens} tokens, fewer than one sequence of {length}; give more "
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
