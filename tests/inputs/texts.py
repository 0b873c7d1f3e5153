"""Texts that people bring: files, folders, datasets."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.inputs.table import Part, Row

LINE = "The owner keeps the text; Ünïcode, 日本 and 🙂 too.\n"


@dataclass
class Brought:
    """A file or folder, and what is to be read of it.

    own      what the run itself writes, by option
    summary  a regular expression that the summary must match, besides
    """

    path: Path
    documents: list[str] = field(default_factory=list)
    summary: str = ""
    own: dict[str, Path] = field(default_factory=dict)


def _file(
    name: str, content: bytes | str, documents: str | list[str] | None = None, summary: str = ""
) -> Callable[[Path], Brought]:
    def make(directory: Path) -> Brought:
        raw = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(raw)
        expected = [documents] if isinstance(documents, str) else documents or []
        return Brought(directory / name, expected, summary)

    return make


def _folder(
    files: dict[str, bytes | str], documents: list[str], summary: str = "", own: str = ""
) -> Callable[[Path], Brought]:
    def make(directory: Path) -> Brought:
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        places = {"--out": directory / own} if own else {}
        return Brought(directory, documents, summary, places)

    return make


def _lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "<w:document/>")
    return buffer.getvalue()


def _links(directory: Path) -> Brought:
    outside = directory / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("not mine\n")
    folder = directory / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(LINE)
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "out.txt").symlink_to(outside / "secret.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    return Brought(folder, [LINE], r"left out 4: 4 links \(not followed\)")


def _special(directory: Path) -> Brought:
    (directory / "a.txt").write_text(LINE)
    os.mkfifo(directory / "pipe.txt")
    _bind(directory / "socket.txt")
    return Brought(directory, [LINE], "left out 2: 2 neither file nor folder")


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the system's limit of such names is short


def _pipe(directory: Path) -> Brought:
    os.mkfifo(directory / "pipe.txt")
    return Brought(directory / "pipe.txt")


def _loop(directory: Path) -> Brought:
    (directory / "loop").symlink_to("loop")
    return Brought(directory / "loop")


def _own_is_the_text(directory: Path) -> Brought:
    (directory / "a.txt").write_text(LINE)
    return Brought(directory, own={"--out": directory})


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
SAFETENSORS = struct.pack("<Q", 2) + b"{}" + bytes(64)
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
SYSTEM = {"role": "system", "content": "Be kind."}
WRITTEN = "user: Hello?\n\nassistant: Yes."
ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
SURROGATE = '{"text": "half \\ud83d of it"}\n'

READ = (
    Row("UTF-8 with a byte order mark", "read without it", _file("a.txt", "\ufeff" + LINE, LINE)),
    Row("UTF-16 or UTF-32 with a byte order mark", "read",
        _file("a.txt", LINE.encode("utf-16"), LINE)),
    Row("big-endian UTF-32 with a byte order mark", "read",
        _file("a.txt", b"\0\0\xfe\xff" + LINE.encode("utf-32-be"), LINE)),
    Row("Windows line ends", "read as plain newlines",
        _file("a.txt", LINE.replace("\n", "\r\n"), LINE)),
    Row("a log with terminal colours, a page with form feeds", "read as it is",
        _file("run.log", "\x1b[31mred\x1b[0m\f\n", "\x1b[31mred\x1b[0m\f\n")),
    Row("`README`, `LICENSE`, `.TXT`, `.eml`, `.html`, `.tex`, `.org`, source code", "read",
        _folder({f"{i}{name}": LINE for i, name in enumerate(
            ("README", "LICENSE", "A.TXT", "a.eml", "a.html", "a.tex", "a.org", "a.c", "Makefile"))
            }, [LINE] * 9, "^read 9 files, [^;]*$")),
    Row("a table (`.csv`, `.tsv`) or notebook (`.ipynb`)", "read as plain text, and said",
        _file("a.CSV", "a,b\n1,2\n", "a,b\n1,2\n", "as plain text, as it is: 1 .csv")),
    Row("a `.json` that is no dataset", "read as plain text, and said",
        _file("a.json", '{"name": "x"}', '{"name": "x"}', "as plain text, as it is: 1 .json")),
)  # fmt: skip

DATASETS = (
    Row('lines of `{"text": ...}`', "one document a line",
        _file("a.jsonl", _lines({"text": "one"}, {"text": "two", "id": 3}) + "\n",
              ["one", "two"])),
    Row("the same as one array, with a mark, or as lines in a `.json`", "one document a record",
        _folder({"a.json": "\ufeff" + json.dumps([{"text": "one"}, {"text": "two"}]),
                 "b.json": _lines({"text": "three"}, {"text": "four"})},
                ["one", "two", "three", "four"])),
    Row('chats: `{"messages": [{"role", "content"}, ...]}`',
        "written by the tokenizer's chat template; without one as `role: content`",
        _file("a.jsonl", _lines({"messages": CHAT}), WRITTEN)),
    Row("content in parts of text", "joined",
        _file("a.jsonl", _lines({"messages": [
            CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]}),
            WRITTEN)),
    Row('ShareGPT: `{"conversations": [{"from", "value"}, ...]}`', "the same",
        _file("a.jsonl", _lines({"conversations": [
            {"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}), WRITTEN)),
    Row("`system` beside a conversation", "the turn before it, unless it has one",
        _file("a.jsonl", _lines({"messages": CHAT, "system": "Be kind."},
                                {"conversations": CHAT, "system_prompt": "Be kind."},
                                {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "Be kind."},
                                {"messages": [SYSTEM, *CHAT], "system": "Be terse."}),
              [f"system: Be kind.\n\n{WRITTEN}"] * 4)),
    Row("`prompt` and `completion`", "two turns; without a template joined as they are",
        _file("a.jsonl", _lines({"prompt": "Q: why?\nA:", "completion": " so"}),
              "Q: why?\nA: so")),
    Row("`prompt` and `completion` as lists of messages", "one conversation",
        _file("a.jsonl", _lines({"prompt": CHAT[:1], "completion": CHAT[1:]}), WRITTEN)),
    Row("`instruction`, `input`, `output` (or `context`, `response`)", "two turns",
        _file("a.jsonl", _lines(ALPACA), "user: Add.\n\n1 1\n\nassistant: 2")),
    Row("`text` or `content` beside a conversation or a pair", "the conversation, or the pair",
        _file("a.jsonl", _lines({"text": "other", "messages": CHAT},
                                {"text": "other"} | ALPACA, {"content": "other"} | ALPACA),
              [WRITTEN, *["user: Add.\n\n1 1\n\nassistant: 2"] * 2])),
    Row("keys that are null, or an empty list of messages, beside others",
        "as if they were not there",
        _file("a.jsonl", _lines({"messages": None, "prompt": None, "text": "one"},
                                {"text": None, "messages": CHAT}, {"messages": [], "text": "two"}),
              ["one", WRITTEN, "two"])),
    Row("roles of other names (`human`, `gpt`, `model`, `AI` ...), or capitalised",
        "`user`, `assistant`, `system`",
        _file("a.jsonl", _lines({"messages": [{"role": "User", "content": "Hello?"},
                                              {"role": "model", "content": "Yes."}]}), WRITTEN)),
    Row("lines of another form", "refused, naming the line and its keys, never its content",
        _file("a.jsonl", _lines({"text": "one"}, {"a": "secret", "secret words": 2})),
        r"a\.jsonl, line 2: .*its keys are a, \(\.\.\.\), where"),
    Row("preference pairs (`chosen`, `rejected`)", "refused the same way",
        _file("a.json", json.dumps([{"chosen": "secret", "rejected": "secret"}])),
        r"a\.json, record 1: .*its keys are chosen, rejected"),
    Row("a line that is no JSON, or no object", "refused, naming the line",
        _file("a.jsonl", _lines({"text": "one"}) + '{"text": "secr'), "line 2: it is no JSON"),
    Row("a line that is a bare string", "refused, naming the line",
        _file("a.jsonl", _lines("secret")), "line 1: it is no JSON object"),
    Row("half of a surrogate pair in a string", "refused, naming the line",
        _file("a.jsonl", SURROGATE), "line 1: .*half of a surrogate pair"),
    Row("a NUL in a string", "refused, naming the line",
        _file("a.jsonl", _lines({"text": "secret\0"})), "line 1: .*NUL"),
    Row("calls of tools", "refused, naming the line",
        _file("a.jsonl", _lines({"messages": [{"role": "assistant", "content": "secret",
              "tool_calls": [{}]}]})), "line 1: .*calls tools"),
    Row("what tools are asked and say (`function_call`, `observation`, `tool` ...)",
        "refused, naming the line",
        _file("a.jsonl", _lines({"conversations": [{"from": "human", "value": "Hello?"},
              {"from": "observation", "value": "secret"}]})), "line 1: .*calls tools, or is what"),
    Row("an image in a message", "refused, naming the line",
        _file("a.jsonl", _lines({"messages": [{"role": "user", "content": [
            {"type": "image", "url": "secret"}]}]})), "line 1: .*'content' of text"),
    Row("an array that was cut off", "refused",
        _file("a.json", '[{"text": "secret"}, {"te'), "damaged JSON"),
)  # fmt: skip

LEFT_OUT = (
    Row("pictures, PDF, archives, weights among the texts", "left out, counted, kinds named",
        _folder({"a.txt": LINE, "b.PNG": PNG, "c.pdf": b"%PDF-1.7\n", "d.docx": _zip("w.xml"),
                 "e.safetensors": SAFETENSORS}, [LINE],
                r"left out 4: 4 not text \(.docx, .pdf, .png, .safetensors\)")),
    Row("hidden files and folders", "left out, and said",
        _folder({"a.txt": LINE, ".b.txt": "x", ".git/c": "x", ".venv/d.py": "x"}, [LINE],
                "left out 3: 3 hidden")),
    Row("virtual environments, `__pycache__`, `node_modules`", "left out, and said",
        _folder({"a.txt": LINE, "env/pyvenv.cfg": "x", "env/b.py": "x", "__pycache__/c.pyc": "x",
                 "node_modules/d.js": "x", "conda/conda-meta/e.json": "{}"}, [LINE],
                "left out 4: 2 virtual environment, 1 (__pycache__|node_modules), 1")),
    Row("tokens, checkpoints and adapters of other runs among the texts", "left out, and said",
        _folder({"a.txt": LINE, "runs/1/adapter/adapter_config.json": "{}",
                 "runs/1/adapter/README.md": "x", "runs/1/corpus/data.key": "x",
                 "runs/1/corpus/corpus.json": "{}", "runs/1/checkpoints/data.key": "x",
                 "runs/1/checkpoints/step-000001/state.json": "{}"}, [LINE],
                "left out 3: 3 of another run")),
    Row("reports and losses of other runs beside these", "left out, and said",
        _folder({"report.html": LINE, "runs/1/adapter/adapter_config.json": "{}",
                 "runs/1/report.html": "x", "runs/1/held-out.json": "{}", "runs/1/notes.md": LINE,
                 "runs/2/checkpoints/data.key": "x", "runs/2/retired-workers.json": "{}",
                 "runs/2/run.lock": "{}", "runs/2/report.md": "x"}, [LINE, LINE],
                "left out 7: 7 of another run")),
    Row("the run's own `--out`, `--cache`, `--json`, `--trace`, `--tls`, `--config` among the "
        "texts", "left out, and said",
        _folder({"a.txt": LINE, "run/adapter/README.md": "x"}, [LINE],
                "left out 1: 1 under --out", own="run")),
    Row("links, within the folder or out of it, loops", "not followed, and said", _links),
    Row("pipes and sockets among the texts", "left out, and said; nothing waits for them",
        _special),
    Row("empty files", "left out, and said",
        _folder({"a.txt": LINE, "b.txt": "", "c.txt": " \n"}, [LINE],
                "left out 2: 2 empty")),
    Row("git-LFS pointers", "left out, and said",
        _folder({"a.txt": LINE, "b.txt": POINTER}, [LINE], "left out 1: 1 git-LFS pointers")),
    Row("a git-LFS pointer alone", "refused with `git lfs pull`",
        _file("a.txt", POINTER),
        "a git-LFS pointer.*git lfs pull"),
)  # fmt: skip

REFUSED = (
    Row("Latin-1 or Windows-1252", "refused with the `iconv` that converts it",
        _file("a.txt", "straße\n".encode("cp1252")), r"not UTF-8 text \(byte 4\).*iconv"),
    Row("the same anywhere in a folder", "refused, naming the first such file",
        _folder({"a.txt": LINE, "b.txt": "straße\n".encode("latin-1"),
                 "c.txt": "日本".encode("shift-jis")}, []), r"b\.txt: not UTF-8.*and 1 more"),
    Row("ISO-2022, as in Japanese mail: its bytes are all ASCII",
        "refused with the `iconv` that converts it",
        _file("a.eml", "日本語\n".encode("iso2022_jp")), r"ISO-2022.*iconv"),
    Row("a file cut off within a character", "refused",
        _file("a.txt", "straße"[:5].encode()[:-1]), r"not UTF-8 text \(byte 4\)"),
    Row("UTF-16 without a byte order mark", "refused with the `iconv` that converts it",
        _file("a.txt", "The owner keeps it.\n".encode("utf-16-le")), "UTF-16LE without.*iconv"),
    Row("big-endian UTF-16 without one", "refused with the `iconv` that converts it",
        _file("a.txt", "The owner keeps it.\n".encode("utf-16-be")), "UTF-16BE without.*iconv"),
    Row("UTF-16 that is cut off", "refused",
        _file("a.txt", LINE.encode("utf-16")[:-1]), "begins as UTF-16 text and is damaged"),
    Row("NUL bytes in a text", "refused with the `tr` that takes them out",
        _file("a.txt", LINE * 50 + "\0" + LINE), "NUL bytes.*tr -d"),
    Row("a PDF alone", "refused by its kind", _file("a.txt", b"%PDF-1.4\n"), "a PDF document"),
    Row("a Word document alone", "refused by its kind",
        _file("a.docx", _zip("w.xml")), "a Word document; save it as plain text"),
    Row("a zip archive alone", "refused by its kind",
        _file("a.zip", _zip("a.txt")), "a zip archive; unpack it"),
    Row("model weights", "refused by its kind",
        _file("a.safetensors", SAFETENSORS), "model weights in safetensors"),
    Row("a Parquet table", "refused by its kind",
        _file("train.parquet", b"PAR1" + bytes(range(256)) * 4), "a Parquet table.*JSON lines"),
    Row("other binary data alone", "refused",
        _file("a.dat", bytes(range(256)) * 8), "binary data of no known kind"),
    Row("an RTF document alone", "refused by its kind",
        _file("a.rtf", b"{\\rtf1 text}"), "an RTF document; save it as plain text"),
    Row("a pipe (also `<(...)`)", "refused; nothing waits for it", _pipe, "it is a pipe"),
    Row("a device", "refused", lambda directory: Brought(Path("/dev/zero")), "it is a device"),
    Row("a link to itself", "refused", _loop, "loop: .*give --data"),
    Row("what is not there", "refused",
        lambda directory: Brought(directory / "none"), "no such file or directory"),
    Row("a path through a file", "refused",
        lambda directory: Brought(_file("a.txt", LINE)(directory).path / "b"), "a.txt/b: "),
    Row("an empty file", "refused", _file("a.txt", " \n"), "no text found"),
    Row("a folder without any text", "refused with what was left out",
        _folder({"a.png": PNG, ".b": LINE}, []),
        r"no text found: left out 2: 1 (not text \(.png\)|hidden), 1"),
    Row("`--out` that is the folder of the texts", "refused", _own_is_the_text,
        "--out names the same place as the text"),
)  # fmt: skip

PART = Part(
    "Texts",
    "`--data` is a file, or a folder and all below. Whether a file is text is decided by what it "
    "holds, not by its name. What was read, what was left out and why is said in one line.",
    {
        "Read": READ,
        "Datasets": DATASETS,
        "Left out of a folder": LEFT_OUT,
        "Refused": REFUSED,
    },
)
