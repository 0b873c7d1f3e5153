"""The owner's text, as a scenario takes it: found, said, tokenised, shown."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

from tqdm import tqdm

from backends.nn.base import Checkpoint
from backends.nn.corpus import Corpus, corpus_of, first_tokens
from backends.nn.documents import pieces, sample
from backends.nn.sources import Base
from backends.nn.texts import Texts, find_texts
from backends.nn.tokenizer import (
    UNKNOWN_SAID,
    ByteTokenizer,
    Tokenizer,
    require_round_trip,
)

DEFAULT_TEXT = ("asyncio", "json", "email", "http")  # packages of Python's own library
PREVIEW_TOKENS = 200
_BAR_AFTER_S = 2.0
_TOKENS_OF_A_SIGN = 8


def load_sequences(args: argparse.Namespace, base: Base) -> Corpus:
    """The private text as int64[n, sequence], kept in `--out` for the next run.

    Raises DataError or TokenizerError when it cannot be had.
    """
    texts, tokenizer = _read(args, base)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    with tqdm(
        total=texts.size_bytes, unit="B", unit_scale=True, dynamic_ncols=True, desc="tokenise",
        delay=_BAR_AFTER_S,
    ) as bar:  # fmt: skip
        corpus = corpus_of(
            texts, tokenizer, args.sequence, vocabulary, args.out / "corpus",
            lambda done_bytes: bar.update(done_bytes - bar.n),
        )  # fmt: skip
    if corpus.unknown > UNKNOWN_SAID:
        print(f"warning: {corpus.unknown:.1%} of the tokens are unknown to the tokenizer")
    return corpus


def preview(args: argparse.Namespace, base: Base) -> None:
    """Show what would be trained on: what was read, what was not, and the first tokens."""
    texts, tokenizer = _read(args, base)
    tokens = first_tokens(pieces(texts, tokenizer.chat), tokenizer, PREVIEW_TOKENS)
    print(f"the first {len(tokens)} tokens, with | between them:")
    _print_any("|".join(_shown(text) for text in _decoded(tokens, tokenizer)))


def _read(args: argparse.Namespace, base: Base) -> tuple[Texts, Tokenizer]:
    """The texts and a tokenizer that can be trusted with them, said in a line or two."""
    tokenizer: Tokenizer
    directory = base.directory if isinstance(base, Checkpoint) else None
    if not isinstance(base, Checkpoint):
        print("no tokenizer without --weights: one token a byte")
        tokenizer = ByteTokenizer()
    else:
        tokenizer = base.tokenizer()
    if args.data is not None:
        roots = [args.data]
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        roots = [library / name for name in DEFAULT_TEXT]
        print("no --data: training on sources of Python's own library")
    texts = find_texts(roots, _own(args, directory))
    print(texts.summary())
    begun = sample(texts, tokenizer.chat)
    if directory is not None and begun:
        remark = require_round_trip(tokenizer, begun, directory)
        if remark:
            print(f"warning: {remark}")
    return texts, tokenizer


def _own(args: argparse.Namespace, directory: Path | None) -> dict[str, Path]:
    """What this run reads and writes itself, by option."""
    places = {
        "--out": args.out, "--cache": args.cache, "--json": args.json, "--trace": args.trace,
        "--tls": args.tls, "--weights": directory,
    }  # fmt: skip
    return {option: place for option, place in places.items() if place is not None}


def _decoded(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of several together where only they make a sign."""
    found: list[str] = []
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if "\ufffd" not in text or len(held) == _TOKENS_OF_A_SIGN:
            found.append(text)
            held = []
    return found + [tokenizer.decode(held)] * bool(held)


def _shown(text: str) -> str:
    """With line ends that can be seen, and nothing that a terminal would obey."""
    signs = (sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return "".join("\\n\n" if sign == "\\n" else sign for sign in signs)


def _print_any(text: str) -> None:
    """Print what the terminal's encoding may not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
