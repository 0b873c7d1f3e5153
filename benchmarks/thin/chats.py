"""A chat set of real text: what Python's library says of itself, asked and answered."""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from pathlib import Path

import torch

from backends.nn.base import Checkpoint
from backends.nn.corpus import corpus_of
from backends.nn.packing import Plan
from backends.nn.selfcheck import keeps_apart
from backends.nn.skeleton import build_skeleton
from backends.nn.texts import find_texts

MODULES = (
    "argparse", "asyncio", "base64", "collections", "concurrent.futures", "contextlib", "csv",
    "datetime", "decimal", "difflib", "email.message", "fractions", "functools", "heapq",
    "html.parser", "http.client", "inspect", "io", "ipaddress", "itertools", "json", "logging",
    "math", "os", "pathlib", "queue", "random", "re", "shutil", "socket", "sqlite3", "ssl",
    "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "tokenize",
    "unittest", "urllib.parse", "urllib.request", "uuid", "weakref", "xml.etree.ElementTree",
    "zipfile",
)  # fmt: skip
_LEAST_LETTERS, _MOST_LETTERS = 60, 1200
_HELD_OUT = 0.05


def records() -> list[dict[str, list[dict[str, str]]]]:
    """What does this do? And its own documentation, once each."""
    known: set[str] = set()
    found = []
    for module in MODULES:
        for name, text in _documented(module):
            if text not in known and _LEAST_LETTERS <= len(text) <= _MOST_LETTERS:
                known.add(text)
                asked = {"role": "user", "content": f"What does `{name}` of Python do?"}
                found.append({"messages": [asked, {"role": "assistant", "content": text}]})
    return found


def _documented(module: str) -> list[tuple[str, str]]:
    """(name, documentation) of what a module has in public, and of its classes' methods."""
    holder = importlib.import_module(module)
    found = []
    for name, thing in sorted(vars(holder).items()):
        if name.startswith("_") or not callable(thing):
            continue
        members = sorted(vars(thing).items()) if inspect.isclass(thing) else []
        for part, each in [("", thing), *((f".{n}", m) for n, m in members if n[0] != "_")]:
            found.append((f"{module}.{name}{part}", inspect.getdoc(each) or ""))
    return found


def sequences(base: Checkpoint, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(to train on, held out), int64[n, length] marked: as `scenarios.finetune` reads them."""
    skeleton = build_skeleton(base)
    apart = keeps_apart(skeleton.model, skeleton.remote, skeleton.groups)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "chats.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records()))
        corpus = corpus_of(
            find_texts([file]), base.tokenizer(), length, vocabulary, Path(directory) / "corpus",
            plan=Plan(completions=True, apart=apart, held_out=_HELD_OUT),
        )  # fmt: skip
        train, held_out = corpus.parts()
        return train[list(range(len(train)))], held_out[list(range(len(held_out)))]
