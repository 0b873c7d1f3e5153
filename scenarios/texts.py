"""The owner's text, as a scenario takes it: found, said, tokenised, shown."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backends.defaults import HELD_OUT
from backends.nn.base import Checkpoint
from backends.nn.corpus import Corpus, Sequences, corpus_of
from backends.nn.documents import Piece, pieces, sample
from backends.nn.gates import require_counted, require_little_cut
from backends.nn.marks import ID_MOST, UNCOUNTED
from backends.nn.packing import Facts, Plan, first_tokens
from backends.nn.records import Answers, AnswersError, Message, Span
from backends.nn.sources import Base
from backends.nn.texts import DataError, Texts, find_texts
from backends.nn.tokenizer import (
    UNKNOWN_SAID,
    ByteTokenizer,
    Tokenizer,
    require_round_trip,
)

DEFAULT_TEXT = ("asyncio", "json", "email", "http")  # packages of Python's own library
PREVIEW_TOKENS = 200  # of each sample
SAMPLES = 3
_NO_TALKS = "--loss-on completions: this text holds no conversations and no answers"
_FILES_TRIED, _RECORDS_TRIED = 16, 64
_BAR_AFTER_S = 2.0
_TOKENS_OF_A_SIGN = 8


@dataclass(frozen=True)
class Data:
    """The private text, as a run takes it.

    train     sequences to train on
    held_out  sequences of other documents; None when none were asked for, or there is too little
    said      the lines that were printed: what is counted, what was cut off, what is held out
    """

    train: Sequences
    held_out: Sequences | None = None
    facts: Facts = field(default_factory=Facts)
    said: tuple[str, ...] = ()


def load_texts(
    args: argparse.Namespace, base: Base, apart: bool, held_out: float = HELD_OUT,
    fits: Callable[[Corpus], None] = lambda corpus: None,
) -> Data:  # fmt: skip
    """The private text as sequences int64[n, args.sequence], marked, kept in `args.out`.

    apart     whether the model can keep documents apart (`selfcheck.keeps_apart`)
    held_out  share of the documents that are not trained on; 0 for none
    fits      raises for sequences that the run is not for; what an earlier one has kept stays then

    Raises DataError or TokenizerError when it cannot be had, when no token of it is counted, or
    when too much of it would be cut off.
    """
    texts, tokenizer = _read(args, base)
    completions, why = _counts_completions(texts, tokenizer, args.loss_on)
    plan = Plan(completions, apart, held_out)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size

    def accept(corpus: Corpus) -> None:
        if args.loss_on == "completions" and not corpus.facts.talks:
            raise DataError(_NO_TALKS)
        require_counted(corpus.facts)
        require_little_cut(corpus.facts)
        fits(corpus)

    with tqdm(
        total=texts.size_bytes, unit="B", unit_scale=True, dynamic_ncols=True, desc="tokenise",
        delay=_BAR_AFTER_S,
    ) as bar:  # fmt: skip
        corpus = corpus_of(
            texts, tokenizer, args.sequence, vocabulary, args.out / "corpus",
            lambda done_bytes: bar.update(done_bytes - bar.n), plan, accept,
        )  # fmt: skip
    facts = corpus.facts
    said = (_loss_said(facts, why), *_packing_said(facts, apart), *_held_out_said(corpus, held_out))
    print("\n".join(said))
    if facts.unknown > UNKNOWN_SAID * facts.tokens:
        share = facts.unknown / facts.tokens
        print(f"warning: {share:.1%} of the tokens are unknown to the tokenizer")
    train, held = corpus.parts()
    return Data(train, held if len(held) else None, facts, said)


def to_do(steps: int, batch: int, length: int, sequences: int) -> str:
    """What a training will do, for before it; `batch` sequences of `length` tokens a step."""
    times = f"{steps * batch / sequences:.3g} times through {sequences:,} sequences"
    return f"to do: {steps} step{'s' * (steps != 1)} of {batch * length:,} tokens, {times}"


def text_figures(data: Data, steps: int, batch: int) -> dict[str, Any]:
    """Of the text, and how often so many steps went through it; for a report."""
    return {
        "documents": data.facts.documents,
        "text_tokens": data.facts.tokens,
        "sequences": len(data.train),
        "epochs": steps * batch / len(data.train),
    }


def text_line(f: Mapping[str, Any]) -> str:
    """The same for people."""
    documents, steps = f["documents"], len(f["losses"])
    return (
        f"text                   {documents:,} document{'s' * (documents != 1)}, "
        f"{f['text_tokens']:,} tokens; {steps} step{'s' * (steps != 1)}, {f['epochs']:.3g} times "
        f"through {f['sequences']:,} sequences"
    )


def preview(args: argparse.Namespace, base: Base) -> None:
    """Show what would be trained on: what was read, what was not, and three samples."""
    texts, tokenizer = _read(args, base)
    completions, why = _counts_completions(texts, tokenizer, args.loss_on)
    answers = tokenizer.answers if completions else None
    samples = _samples(texts, tokenizer, answers)
    print(_loss_said(Facts(talks=int(completions)), why))
    colour = sys.stdout.isatty()
    print(f"what is counted is {'green' if colour else 'in [[ ]]'}; | stands between tokens")
    for number, piece in enumerate(samples, 1):
        tokens = first_tokens([piece], tokenizer, PREVIEW_TOKENS, Plan(completions))
        print(f"\nthe first {len(tokens)} tokens of sample {number} of {len(samples)}:")
        _print_any(_coloured(_decoded(tokens, tokenizer), colour))


def _counts_completions(
    texts: Texts, tokenizer: Tokenizer, asked: str | None
) -> tuple[bool, str | None]:
    """Whether only what assistants say is counted, and why not, where one might expect it.

    Raises DataError when that was asked for and cannot be.
    """
    datasets = [file for file in texts.files if file.form != "text"]
    if asked == "completions" and not datasets:
        raise DataError(_NO_TALKS)
    if asked == "all" or not datasets:
        return False, "as --loss-on all says" if asked == "all" else None
    why = None if tokenizer.places else "the tokenizer does not say which characters a token is of"
    refused: list[AnswersError] = []

    def tried(messages: Sequence[Message], text: str) -> tuple[Span, ...]:
        try:
            return tokenizer.answers(messages, text)
        except AnswersError as error:
            refused.append(error)
            return ()

    for file in [] if why else datasets[:: -(-len(datasets) // _FILES_TRIED)]:
        for _ in islice(pieces(Texts([file]), tokenizer.chat, answers=tried), _RECORDS_TRIED):
            if refused:
                why = str(refused[0])
                break
    if why and asked == "completions":
        raise DataError(f"--loss-on completions: {why}")
    return why is None, why


def _loss_said(facts: Facts, why: str | None) -> str:
    if why:
        return f"loss: on all tokens ({why})"
    if not facts.talks:
        return "loss: on all tokens (the text holds no conversations and no answers)"
    return "loss: on what the assistant says; on all of plain texts"


def _packing_said(facts: Facts, apart: bool) -> list[str]:
    said = [
        f"{facts.documents:,} document{'s' * (facts.documents != 1)}, {facts.tokens:,} tokens; "
        f"{facts.counted:,} are counted in the loss"
    ]
    if facts.talks:
        said.append(
            f"conversations: {facts.cut / max(1, facts.tokens):.1%} of all tokens are cut off, "
            f"{facts.empty:,} conversations have nothing to predict and are left out, "
            f"{facts.padding:,} tokens fill sequences up"
        )
    if not apart:
        said.append(
            "this model cannot keep documents apart: those in one sequence see what comes before"
        )
    return said


def _held_out_said(corpus: Corpus, asked: float) -> list[str]:
    if not asked:
        return []
    if not corpus.held_out:
        return ["held out: nothing, the text is too short; there will be no held-out loss"]
    what = f"the last {corpus.held_out:,} of {len(corpus):,} sequences"
    if corpus.facts.held:
        what = (
            f"{corpus.facts.held:,} of {corpus.facts.documents:,} documents, chosen by a hash of "
            f"their text: {corpus.held_out:,} of {len(corpus):,} sequences"
        )
    return [f"held out: {what}"]


def _samples(texts: Texts, tokenizer: Tokenizer, answers: Answers | None) -> list[Piece]:
    """The beginnings of a few documents, of files all over the texts."""
    files = texts.files[:: max(1, -(-len(texts.files) // SAMPLES))]
    each = -(-SAMPLES // max(1, len(files)))
    found: list[Piece] = []
    for file in files:
        all_pieces = pieces(Texts([file]), tokenizer.chat, answers=answers)
        found += islice((piece for piece in all_pieces if piece.begins), each)
    return found[:SAMPLES]


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
        "--tls": args.tls, "--weights": directory, "--config": vars(args).get("config"),
    }  # fmt: skip
    return {option: place for option, place in places.items() if place is not None}


def _decoded(tokens: list[int], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of each token, of several together where only they make a sign, and if it counts."""
    found: list[tuple[str, bool]] = []
    held: list[int] = []
    counts = False
    for token in tokens:
        held.append(token & (ID_MOST - 1))
        counts |= not token & UNCOUNTED
        text = tokenizer.decode(held)
        if "\ufffd" not in text or len(held) == _TOKENS_OF_A_SIGN:
            found.append((text, counts))
            held, counts = [], False
    return found + [(tokenizer.decode(held), counts)] * bool(held)


def _coloured(tokens: list[tuple[str, bool]], colour: bool) -> str:
    """With those that count in green, or in brackets."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    runs = []
    for counts, run in groupby(tokens, lambda token: token[1]):
        shown = "|".join(_shown(text) for text, _ in run)
        runs.append(f"{begin}{shown}{end}" if counts else shown)
    return "|".join(runs)


def _shown(text: str) -> str:
    """With line ends that can be seen, and nothing that a terminal would obey."""
    signs = (sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return "".join("\\n\n" if sign == "\\n" else sign for sign in signs)


def _print_any(text: str) -> None:
    """Print what the terminal's encoding may not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
