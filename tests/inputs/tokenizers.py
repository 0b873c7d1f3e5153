"""The tokenizers that people bring beside a model: the table, tried by test_tokenizers.py."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.inputs.table import Part, Row

TINY = Path(__file__).parents[2] / "scenarios" / "assets" / "tiny-llama"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9085657\n"
_FIRST = r"tokenizer\.json"


def files(model_type: str, **contents: bytes) -> Callable[[Path], Path]:
    """A directory of a model of that type, with these files; `__` stands for a dot in a name."""

    def make(place: Path) -> Path:
        (place / "config.json").write_text(json.dumps({"model_type": model_type}))
        for name, content in contents.items():
            (place / name.replace("__", ".")).write_bytes(content)
        return place

    return make


def whole(place: Path) -> Path:
    """The repository's tiny Llama's."""
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, place)
    return place


def without_settings(place: Path) -> Path:
    """tokenizer.json alone, beside a config."""
    files("llama")(place)
    shutil.copy(TINY / "tokenizer.json", place)
    return place


def cut(place: Path) -> Path:
    """The first half of tokenizer.json."""
    whole(place)
    content = (TINY / "tokenizer.json").read_bytes()
    (place / "tokenizer.json").write_bytes(content[: len(content) // 2])
    return place


def sentencepiece() -> bytes:
    """A SentencePiece model of a few pieces: github.com/google/sentencepiece, ModelProto."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("▁", 1), ("a", 1), ("b", 1), ("▁a", 1)]
    out = b""
    for rank, (piece, kind) in enumerate(pieces):
        score = struct.pack("<f", -float(rank))
        out += field(1, field(1, piece.encode()) + b"\x15" + score + bytes([0x18, kind]))
    return out + field(2, bytes([0x18, 2]))  # trainer_spec: BPE


PART = Part(
    "Tokenizers",
    "Beside the model, or in the directory of a checkpoint. The error comes before the text is "
    "read.",
    {
        "Tokenizers": (
            Row("`tokenizer.json` and its settings", "as transformers has it", whole),
            Row("`tokenizer.json` alone", "as transformers has it", without_settings),
            Row("no tokenizer beside a Llama", "which files there should be", files("llama"),
                _FIRST),
            Row("no tokenizer beside a GPT-2", "which files there should be", files("gpt2"),
                r"(?i)vocab\.json|merges\.txt"),
            Row("no tokenizer beside a Qwen", "which files there should be", files("qwen2"),
                _FIRST),
            Row("a GPT-2 with `vocab.json`, without `merges.txt`", "which files there should be",
                files("gpt2", vocab__json=b'{"a": 0}'), r"merges\.txt|" + _FIRST),
            Row("SentencePiece's `tokenizer.model` alone, without the package that reads it",
                "no usable tokenizer; put `tokenizer.json` there",
                files("llama", tokenizer__model=sentencepiece()), _FIRST),
            Row("a git-LFS pointer for `tokenizer.json`", "no usable tokenizer",
                files("llama", tokenizer__json=_POINTER), _FIRST),
            Row("`tokenizer.json` cut in the middle", "no usable tokenizer", cut, _FIRST),
            Row("`tokenizer.json` with no tokens in it", "its vocabulary is empty",
                files("llama", tokenizer__json=json.dumps(
                    {"version": "1.0", "added_tokens": [], "normalizer": None,
                     "pre_tokenizer": None, "post_processor": None, "decoder": None,
                     "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}
                ).encode()), r"(?i)empty"),
        ),
    },
)  # fmt: skip
