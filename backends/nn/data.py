"""From private text to fixed-length token sequences, and the order training takes them in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from backends.errors import UserError

TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst", ".json", ".jsonl", ".csv")


class DataError(UserError, ValueError):
    """The text to train on cannot be used."""


class Tokenizer(Protocol):
    """The little of a tokenizer that is needed here."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token a byte: for models without a tokenizer (random weights)."""

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes as token ids."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of such ids; ids above 255 are left out."""
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


def read_texts(path: Path, suffixes: Iterable[str] = TEXT_SUFFIXES) -> list[str]:
    """The text of a file, or of every text file below a directory, sorted by path.

    Raises DataError for a missing path, a file that is not UTF-8, or no text at all.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in tuple(suffixes) and f.is_file())
    else:
        raise DataError(f"{path}: no such file or directory; give --data a text file or a folder")
    texts = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: not UTF-8 text (byte {error.start}); convert it or leave it out"
            ) from error
        if text.strip():
            texts.append(text)
    if not texts:
        raise DataError(f"{path}: no text found (looked for {', '.join(suffixes)})")
    return texts


def pack(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, separator: int | None
) -> torch.Tensor:
    """int64[n, length]: all texts one after the other, cut into sequences; the rest is dropped.

    Raises DataError when the text is too short for one sequence.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text)
        if separator is not None:
            stream.append(separator)
    count = len(stream) // length
    if count == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, fewer than one sequence of {length}; give more "
            "text or shorter sequences"
        )
    return torch.tensor(stream[: count * length]).reshape(count, length)


def order_seed(seed: int, epoch: int) -> int:
    """Of the order of one epoch, for a torch generator, which takes 63 bits.

    seed  from 0 to 2^63 - 1
    """
    mixed = (seed << 20) + epoch
    if mixed < 1 << 63:
        return mixed
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:7], "big")


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which sequences step `step` (from 0) trains on: a fresh permutation every epoch.

    A pure function of its arguments, so a resumed run goes on with exactly the same data.
    """
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(order_seed(seed, epoch))
        chosen.append(int(torch.randperm(count, generator=generator)[place]))
    return chosen
