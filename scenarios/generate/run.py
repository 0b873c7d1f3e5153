"""Prompts, and what becomes of them on ciphertexts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from backends.errors import UserError
from backends.files import read_bounded
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import preset
from backends.ledger import WorkerLedger
from backends.nn.adapters import load_adapter
from backends.nn.base import Checkpoint, open_base
from backends.nn.generate import complete
from backends.nn.sane import positions
from backends.nn.skeleton import Skeleton
from backends.nn.tokenizer import HubTokenizer, Tokenizer
from backends.options import TOKENS
from backends.session import Session, Workers, opened
from backends.units import human_bytes
from scenarios.preparation import chosen_skeleton, prepared_for
from scenarios.session import (
    chosen_workers,
    exactness_line,
    open_ledger,
)

_FILE_BYTES_MAX = 16 << 20
_PROMPTS_MAX = 10_000


class PromptError(UserError, ValueError):
    """A prompt cannot be completed; the text says which, why, and what to do. It never quotes."""


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    tokens    ids up to where the model ended
    ended     whether it did
    prompt_s  the pass over the prompt
    token_s   each pass over one token
    """

    text: str
    tokens: list[int]
    ended: bool
    prompt_s: float
    token_s: list[float]


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file, a line each.

    In a .jsonl file every line is a string, or a record with a string `prompt`.

    Raises PromptError when there is none, or the file cannot be read.
    """
    found = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = read_bounded(args.prompts, _FILE_BYTES_MAX).decode().split("\n")
        except OSError as error:
            raise PromptError(f"{args.prompts}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PromptError(f"{args.prompts} is not UTF-8; convert it, see iconv(1)") from error
        records = args.prompts.suffix.lower() in (".jsonl", ".ndjson")
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(
                    _recorded(args.prompts, number, line) if records else line.rstrip("\r")
                )
    if not found:
        raise PromptError("nothing to complete; give --prompt TEXT, or a line in --prompts FILE")
    require_text(found)
    if len(found) > _PROMPTS_MAX:
        raise PromptError(f"{len(found):,} prompts; at most {_PROMPTS_MAX:,} in one run")
    return found


def require_text(prompts: Sequence[str]) -> None:
    """Raise PromptError for a prompt that is no text: bytes of a shell, say."""
    for number, text in enumerate(prompts, 1):
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise PromptError(f"prompt {number} is not UTF-8; convert it, see iconv(1)")


def _recorded(file: Path, number: int, line: str) -> str:
    try:
        held = json.loads(line)
    except (ValueError, RecursionError):
        held = None
    text = held.get("prompt") if isinstance(held, dict) else held
    if not isinstance(text, str):
        raise PromptError(
            f'{file}, line {number}: neither a JSON string nor a record with a string "prompt"'
        )
    return text


def encoded(
    prompts: Sequence[str], tokenizer: HubTokenizer, model: torch.nn.Module, count: int,
    option: str = "--tokens",
) -> list[torch.Tensor]:  # fmt: skip
    """int64[1, S] of each prompt, with what the tokenizer puts before a text.

    count   tokens that are to follow
    option  that says how many

    Raises PromptError for one without tokens, or with more than the model, or a request, takes.
    """
    known = positions(model)
    most = min(TOKENS.most, known[0] - count if known else TOKENS.most)
    found = []
    for number, ids in enumerate(tokenizer.encode(prompts, marked=True), 1):
        whole = torch.tensor([[*tokenizer.start, *ids.tolist()]])
        size = whole.shape[1]
        if not size:
            raise PromptError(f"prompt {number} is empty; give it a word at least")
        if size > most:
            raise PromptError(
                f"prompt {number} has {size} tokens, and with {option} {count} this model takes "
                f"{max(0, most)}; shorten it, or give fewer {option}"
            )
        found.append(whole)
    return found


def stops_of(model: torch.nn.Module, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: the model's own, and what the tokenizer puts after a text."""
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = own if isinstance(own, list) else [] if own is None else [own]
    return frozenset([*named, *tokenizer.end])


def answered(
    model: torch.nn.Module, prompt: torch.Tensor, count: int, tokenizer: HubTokenizer,
    stops: Collection[int], on_token: Callable[[], object] = lambda: None,
) -> Answer:  # fmt: skip
    """Complete int64[1, S] by up to `count` tokens, in `count` passes whatever they say."""
    times = [time.perf_counter()]

    def timed(token: int) -> None:
        times.append(time.perf_counter())
        on_token()

    found = complete(model, prompt, count, None, timed)
    end = next((place for place, token in enumerate(found) if token in stops), count)
    took = [after - before for before, after in pairwise(times)]
    text = tokenizer.decode(found[:end])
    return Answer(text, found[:end], end < count, took[0], took[1:])


class Generation:
    """One run: everything is looked at first, then prepared, then completed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.workers: Workers = chosen_workers(args)
        self.ledger: WorkerLedger = open_ledger(args.out, args.out / "checkpoints", self.workers)
        self.prompts = prompts_of(args)
        base: Checkpoint = open_base(args.weights)
        print(f"weights: {base.describe()}")
        self.tokenizer = base.tokenizer()
        self.skeleton: Skeleton = chosen_skeleton(args, base)
        self.model: torch.nn.Module = self.skeleton.model
        self.inputs = encoded(self.prompts, self.tokenizer, self.model, args.tokens)
        self.stops = stops_of(self.model, self.tokenizer)
        if args.adapter is not None:
            self.model = load_adapter(self.model, args.adapter)

    def run(self) -> dict[str, Any]:
        """Complete all prompts and print them; returns the figures, the texts among them."""
        args = self.args
        prepared, prepare_s = prepared_for(
            self.skeleton, preset(args.preset), args.cache, owner_tag=args.owner_tag
        )
        advice = "what is printed above: do not rely on it; run it again without that worker"
        with (
            self.ledger.untainted(advice),
            opened(self.skeleton, prepared, ledger=self.ledger, workers=self.workers) as session,
        ):
            before = session.usage()
            answers = self._answers()
            used, products = session.usage().since(before), _products(session)
        tokens = args.tokens * len(answers)
        later = [seconds for answer in answers for seconds in answer.token_s]
        return {
            "kernel": chosen_kernel().name,
            "weights": str(args.weights),
            "adapter": None if args.adapter is None else str(args.adapter),
            "preset": args.preset,
            "lm_head": args.lm_head,
            "worker_elsewhere": bool(self.workers.addresses),
            "prepare_s": prepare_s,
            "tokens_asked": args.tokens,
            "prompt_s": median(answer.prompt_s for answer in answers),
            "token_s": median(later) if later else None,
            "bytes_up": used.bytes_up,
            "bytes_down": used.bytes_down,
            "bytes_per_token": (used.bytes_up + used.bytes_down) / tokens,
            "blocks_encrypted": used.blocks,
            **products,
            "answers": [
                {"prompt": prompt, "completion": a.text, "tokens": len(a.tokens), "ended": a.ended}
                for prompt, a in zip(self.prompts, answers, strict=True)
            ],
        }

    def _answers(self) -> list[Answer]:
        found = []
        total = self.args.tokens * len(self.inputs)
        with tqdm(total=total, unit="tok", dynamic_ncols=True, desc="private", leave=False) as bar:
            for prompt, ids in zip(self.prompts, self.inputs, strict=True):
                found.append(
                    answered(
                        self.model, ids, self.args.tokens, self.tokenizer, self.stops, bar.update
                    )
                )  # fmt: skip
                bar.write(_shown(f"\n{prompt}|{found[-1].text}"))
        return found


def _products(session: Session) -> dict[str, Any]:
    found = session.exactness()
    return {} if found is None else {"products": asdict(found)}


def _shown(text: str) -> str:
    """Without what a terminal would obey, or cannot show."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def print_report(f: dict[str, Any]) -> None:
    """What it cost."""
    later = "" if f["token_s"] is None else f", then {1e3 * f['token_s']:.1f} ms a token"
    print(f"\nfirst token after {1e3 * f['prompt_s']:.1f} ms{later} (medians)")
    print(
        f"traffic: {human_bytes(f['bytes_up'])} up, {human_bytes(f['bytes_down'])} down, "
        f"{human_bytes(f['bytes_per_token'])} for each of {f['tokens_asked']} tokens a prompt"
    )
    if "products" in f:
        print(exactness_line(f["products"]))
