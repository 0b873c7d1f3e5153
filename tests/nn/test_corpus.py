"""Documents as token sequences: in memory and mapped, kept and found again, and their order."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends.nn import checkpoint, corpus, packing
from backends.nn.corpus import Corpus, batch_indices, corpus_of, pack
from backends.nn.documents import Piece, pieces
from backends.nn.packing import first_tokens
from backends.nn.texts import DataError, find_texts
from backends.nn.tokenizer import ByteTokenizer

TEXT = "".join(f"line {i} of some text, é\n" for i in range(200))


class Counting(ByteTokenizer):
    """Says how often it was asked."""

    calls = 0

    def encode(self, texts: Sequence[str], marked: bool = False) -> list[NDArray[np.int32]]:
        self.calls += 1
        return super().encode(texts)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of private text."""
    path = tmp_path / "private.txt"
    path.write_text(TEXT)
    return path


def kept(text: Path, length: int = 16, tokenizer: ByteTokenizer | None = None) -> Corpus:
    """The corpus of a text, in a directory beside it."""
    place = text.parent / "out" / "corpus"
    return corpus_of(find_texts([text]), tokenizer or ByteTokenizer((0,)), length, 256, place)


def in_memory(text: Path, length: int = 16) -> torch.Tensor:
    """The same, packed in memory."""
    found = pieces(find_texts([text]), ByteTokenizer().chat)
    return pack(found, ByteTokenizer((0,)), length)


def test_text_is_packed_without_loss(tmp_path: Path) -> None:
    """Sequences joined are the documents joined, with what ends each."""
    (tmp_path / "a.py").write_text("abcd")
    (tmp_path / "b.txt").write_text("éf")
    (tmp_path / "c.bin").write_bytes(b"\xff\0\xff")
    packed = in_memory(tmp_path, 3)
    assert packed.flatten().tolist() == [*b"abcd", 0, *"éf".encode(), 0]
    assert ByteTokenizer().decode(packed[0].tolist()) == "abc"


def test_sequences_do_not_depend_on_how_text_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces or whole, in one batch or many, in one block or many."""
    whole = pack([Piece(TEXT), Piece("b" * 50)], ByteTokenizer((0,)), 16)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(packing, "_BLOCK_TOKENS", 70)
    cut = [Piece(TEXT[i : i + 7], i == 0, i + 7 >= len(TEXT)) for i in range(0, len(TEXT), 7)]
    assert torch.equal(pack([*cut, Piece("b" * 50)], ByteTokenizer((0,)), 16), whole)
    assert first_tokens(cut, ByteTokenizer((0,)), 40) == whole.flatten()[:40].tolist()


def test_a_mapped_corpus_is_the_one_in_memory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence for sequence, and in its tag."""
    mapped, plain = kept(text), in_memory(text)
    assert mapped.shape == tuple(plain.shape)
    assert len(mapped) == len(plain) > 10
    for chosen in ([3, 1, 3], slice(2, 9), torch.tensor([0, len(plain) - 1]), slice(None)):
        assert mapped[chosen].dtype == torch.int64
        assert torch.equal(mapped[chosen], plain[chosen])
    monkeypatch.setattr(checkpoint, "_BLOCK_TOKENS", 50)
    assert checkpoint.data_tag(tmp_path, mapped) == checkpoint.data_tag(tmp_path, plain)
    other = plain.clone()
    other[-1, -1] += 1
    assert checkpoint.data_tag(tmp_path, other) != checkpoint.data_tag(tmp_path, plain)


def test_a_corpus_is_its_owners_alone(text: Path) -> None:
    """Whatever the process's mask, and its tags cannot be tried without the key."""
    before = os.umask(0)
    try:
        kept(text)
    finally:
        os.umask(before)
    place = text.parent / "out" / "corpus"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {path.name for path in place.iterdir()} == {"data.key", "corpus.json", "tokens.int32"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in place.iterdir())
    corpus_of(find_texts([text]), ByteTokenizer((0,)), 16, 256, text.parent / "again")
    facts, again = (
        json.loads((found / "corpus.json").read_text()) for found in (place, text.parent / "again")
    )
    assert facts["made_of"] != again["made_of"]
    assert facts["tokens"] != again["tokens"]


def test_a_corpus_is_found_again_and_only_then(text: Path) -> None:
    """The same text, tokenizer and length; anything else, or any damage, makes it anew."""
    place = text.parent / "out" / "corpus"
    tokenizer = Counting((0,))
    first = kept(text, tokenizer=tokenizer)
    calls = tokenizer.calls
    assert torch.equal(kept(text, tokenizer=tokenizer)[:], first[:])
    assert tokenizer.calls == calls
    text.rename(text.with_name("renamed.txt"))
    text = text.with_name("renamed.txt")
    kept(text, tokenizer=tokenizer)
    assert tokenizer.calls == calls

    def made_anew(length: int = 16) -> bool:
        before = tokenizer.calls
        assert torch.equal(kept(text, length, tokenizer)[:], in_memory(text, length))
        return tokenizer.calls > before

    text.write_text(TEXT.replace("7", "8"))
    assert made_anew()
    assert made_anew(length=8)
    assert not made_anew(length=8)
    kept(text, 8, ByteTokenizer((0, 0)))
    assert made_anew(length=8)
    for name, content in (
        ("tokens.int32", None), ("corpus.json", b"{}"), ("corpus.json", b"["), ("data.key", b"x"),
        ("tokens.int32", b""), ("corpus.json", b'{"count": 1e400, "unknown": 0}'),
    ):  # fmt: skip
        raw = bytearray((place / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (place / name).write_bytes(raw if content is None else content)
        assert made_anew(8), name
        assert not made_anew(8), name
    (place / "tokens.int32").chmod(0o666)
    assert made_anew(8)


def test_what_cannot_be_a_corpus_is_said_and_leaves_nothing(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids beyond the vocabulary, too little text, a full disk."""
    with pytest.raises(DataError, match="ids beyond the 100 of the model's vocabulary"):
        corpus_of(find_texts([text]), ByteTokenizer(), 16, 100, text.parent / "out" / "corpus")
    with pytest.raises(DataError, match="tokens, fewer than one sequence of 100000"):
        kept(text, length=100000)
    with pytest.raises(DataError, match="fewer than one sequence"):
        pack([Piece("ab")], ByteTokenizer(), 10)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus, "_private_file", full)
    with pytest.raises(DataError, match=r"corpus: .*cannot be kept there.*No space left"):
        kept(text)
    assert not list((text.parent / "out").iterdir())


def test_what_a_killed_run_has_left_goes(text: Path) -> None:
    """It is private, and large."""
    aside = text.parent / "out" / ".corpus.0123456789abcdef.tmp"
    aside.mkdir(parents=True)
    (aside / "tokens.int32").write_bytes(TEXT.encode())
    kept(text)
    assert [path.name for path in (text.parent / "out").iterdir()] == ["corpus"]


def test_every_epoch_sees_every_sequence_once() -> None:
    """And the order is a function of seed and step alone."""
    seen = [i for step in range(5) for i in batch_indices(step, 4, 10, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert batch_indices(2, 4, 10, seed=3) == seen[8:12]


@pytest.mark.parametrize(("batch", "count", "seed"), [(4, 10, 0), (3, 1, 5), (7, 3, 1), (2, 64, 9)])
def test_the_order_is_that_of_a_permutation_drawn_for_each_position(
    batch: int, count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was always defined; but drawn once an epoch."""
    expected = []
    for position in range(20 * batch):
        generator = torch.Generator().manual_seed((seed << 20) + position // count)
        expected.append(int(torch.randperm(count, generator=generator)[position % count]))
    drawn = 0
    really = torch.randperm

    def counted(*arguments: int, **more: torch.Generator) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return really(*arguments, **more)

    monkeypatch.setattr(torch, "randperm", counted)
    corpus._permutation.cache_clear()
    assert [i for step in range(20) for i in batch_indices(step, batch, count, seed)] == expected
    assert drawn == -(-20 * batch // count)
