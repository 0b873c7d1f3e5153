"""Finding the private text: which files are text, and what was left out and why.

Whether a file is text is decided by what it holds, not by its name: it decodes, has no NULs, and
next to no control characters. In a folder other files are left out and counted; so are hidden ones,
links, what a run itself writes, and what programs keep for themselves. What is probably text but
cannot be read with certainty (another encoding) is an error, so that nothing is lost in silence.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from backends.errors import UserError
from backends.files import opened
from backends.nn.filekinds import HEAD_BYTES, kind_like_text, kind_of_binary
from backends.nn.records import is_json_lines, is_record
from backends.units import human_bytes

JSON_BYTES_MAX = 100_000_000
"""A .json file is parsed whole; JSON lines have no such limit."""

_CHUNK_BYTES = 1 << 20
_LINE_BYTES_MAX = 64 << 20
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Besides white space, text has: backspaces, escapes (terminal colours), and DOS's end of file.
_CONTROLS = bytes({*range(1, 32), 127} - {*b"\b\t\n\v\f\r\x1a\x1b"})
# What switches to two bytes a sign in ISO-2022, whose bytes are all ASCII; no terminal is told so.
_SHIFTED = re.compile(rb"\x1b\$[@AB]|\x1b\$[()][A-D]")
_CONTROLS_FEW = 8
_CONTROLS_SHARE = 0.01
_AS_IT_IS = (".csv", ".tsv", ".ipynb")
_LINES = (".jsonl", ".ndjson")
_MACHINES = ("__pycache__", "node_modules")
_ENVIRONMENTS = ("pyvenv.cfg", "conda-meta")
_RUNS = ("data.key", "adapter_config.json")  # tokens and checkpoints; adapters
RUN_FOLDERS = (
    "corpus", "checkpoints", "checkpoints-private", "checkpoints-clear", "adapter",
    "adapter-comparison",
)  # fmt: skip
RUN_FILES = ("report.md", "report.html", "losses.png", "held-out.json", "retired-workers.json")
"""What a run has in its directory. Files of these names are its own where such a folder is, too."""
_SUFFIX = re.compile(r"\.[A-Za-z0-9_+~-]{1,12}")
_SUFFIXES_SHOWN = 4
_KINDS_OF_FILE = (
    (stat.S_ISFIFO, "a pipe; write what it gives into a file first"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device; write what it gives into a file first"),
    (stat.S_ISBLK, "a device"),
)


class DataError(UserError, ValueError):
    """The text to train on cannot be used."""


class _LeftOutError(Exception):
    """A file that is not for training: why in a word or two, and why in a sentence."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(reason)
        self.reason, self.why = reason, why


class _EncodingError(Exception):
    """A file that is probably text, and cannot be read with certainty; says what to do."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that was looked through, and is text.

    encoding     a codec that takes off a byte order mark
    form         'text', 'json' (records in one array or object) or 'jsonl' (one a line)
    modified_ns  with the size: whether it is still the file that was looked through
    """

    path: Path
    encoding: str
    form: str
    size_bytes: int
    modified_ns: int

    def changed(self, file: BinaryIO) -> bool:
        """Whether the open file is another than the one that was looked through."""
        status = os.fstat(file.fileno())
        return (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.modified_ns)


@dataclass
class Texts:
    """The files to train on, in the order of their paths, and what was left out."""

    files: list[TextFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    suffixes: dict[str, set[str]] = field(default_factory=dict)
    as_it_is: Counter[str] = field(default_factory=Counter)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def summary(self) -> str:
        """'read 132 files, 2.1 MB; left out 4: 2 not text (.png), 1 hidden, 1 under --out'."""
        count = len(self.files)
        said = f"read {count:,} file{'s' * (count != 1)}, {human_bytes(self.size_bytes)}"
        parts = [said]
        if self.left_out:
            parts.append(self.what_was_left_out())
        if self.as_it_is:
            found = ", ".join(f"{n:,} {what}" for what, n in self.as_it_is.most_common())
            parts.append(f"as plain text, as it is: {found}")
        return "; ".join(parts)

    def what_was_left_out(self) -> str:
        """The second part of the summary."""
        reasons = []
        for reason, count in self.left_out.most_common():
            suffixes = sorted(self.suffixes.get(reason, ()))
            more = ["..."] * (len(suffixes) > _SUFFIXES_SHOWN)
            shown = ", ".join(suffixes[:_SUFFIXES_SHOWN] + more)
            reasons.append(f"{count:,} {reason}" + f" ({shown})" * bool(shown))
        return f"left out {self.left_out.total():,}: {', '.join(reasons)}"

    def leave_out(self, reason: str, name: str | None = None) -> None:
        """Count a file or folder; with a name, its suffix is told."""
        self.left_out[reason] += 1
        if name is not None:
            suffix = os.path.splitext(name)[1].lower()
            known = suffix if _SUFFIX.fullmatch(suffix) else "no suffix"
            self.suffixes.setdefault(reason, set()).add(known)


def find_texts(roots: Sequence[Path], own: Mapping[str, Path] | None = None) -> Texts:
    """The texts of files, and of folders with all below, looked through once.

    own  what the run itself reads and writes, by the name of its option: left out of folders

    Raises DataError for what is missing, a file that is named and is no text, a file anywhere that
    is text in an unknown encoding, an option that names the text itself, and no text at all.
    """
    texts = Texts()
    refused: list[str] = []
    owned = {os.path.realpath(path): f"under {option}" for option, path in (own or {}).items()}
    for root in roots:
        place = Path(os.path.realpath(root))
        if str(place) in owned:
            option = owned[str(place)].removeprefix("under ")
            raise DataError(f"{root}: {option} names the same place as the text; name another one")
        if _is_folder(root, place):
            for path in _below(place, owned, texts):
                _add(texts, path, refused)
        else:
            try:
                _take(texts, place)
            except (_LeftOutError, _EncodingError) as error:
                why = error.why if isinstance(error, _LeftOutError) else error
                raise DataError(f"{root}: {why}") from error
    if refused:
        more = f" (and {len(refused) - 1} more such files)" * (len(refused) > 1)
        raise DataError(refused[0] + more)
    if not texts.files:
        named = ", ".join(str(root) for root in roots)
        reasons = f": {texts.what_was_left_out()}" if texts.left_out else ""
        raise DataError(f"{named}: no text found{reasons}")
    return texts


def _is_folder(root: Path, place: Path) -> bool:
    """Whether it is a folder. Raises DataError when it is neither that nor a regular file."""
    try:
        mode = place.stat().st_mode
    except FileNotFoundError as error:
        raise DataError(
            f"{root}: no such file or directory; give --data a text file or a folder"
        ) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{root}: {why}; give --data a text file or a folder") from error
    for is_kind, what in _KINDS_OF_FILE:
        if is_kind(mode):
            raise DataError(f"{root}: it is {what}")
    return stat.S_ISDIR(mode)


def _add(texts: Texts, path: Path, refused: list[str]) -> None:
    """A file of a folder: taken, left out, or remembered as refused."""
    try:
        _take(texts, path)
    except _LeftOutError as error:
        texts.leave_out(error.reason, path.name if error.reason == "not text" else None)
    except _EncodingError as error:
        refused.append(f"{path}: {error}")


def _below(root: Path, owned: Mapping[str, str], texts: Texts) -> Iterator[Path]:
    """All files of a folder that may be text, in the order of their paths."""
    waiting = _sorted_entries(str(root), texts)
    while waiting:
        entry = waiting.pop()
        reason = _reason_to_skip(entry, owned)
        if reason is not None:
            texts.leave_out(reason)
        elif entry.is_dir(follow_symlinks=False):
            waiting += _sorted_entries(entry.path, texts)
        else:
            yield Path(entry.path)


def _sorted_entries(folder: str, texts: Texts) -> list[os.DirEntry[str]]:
    """What is in a folder, the first one last."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name, reverse=True)
    except OSError:
        texts.leave_out("not readable")
        return []


def _reason_to_skip(entry: os.DirEntry[str], owned: Mapping[str, str]) -> str | None:
    """Why an entry of a folder is left out before it is opened; None for what is not."""
    if entry.path in owned:
        return owned[entry.path]
    if entry.is_symlink():
        # What it leads to is read where it lies, or is outside of what was named.
        return "links (not followed)"
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        if entry.name in _MACHINES:
            return entry.name
        if _has_any(entry.path, _ENVIRONMENTS):
            return "virtual environment"
        return "of another run" if _has_any(entry.path, _RUNS) else None
    if entry.name in (*RUN_FILES, "run.lock"):
        beside = (os.path.join(os.path.dirname(entry.path), name) for name in RUN_FOLDERS)
        if any(_has_any(folder, _RUNS) for folder in beside):
            return "of another run"
    return None if entry.is_file(follow_symlinks=False) else "neither file nor folder"


def _has_any(folder: str, names: Sequence[str]) -> bool:
    return any(os.path.lexists(os.path.join(folder, name)) for name in names)


def _take(texts: Texts, path: Path) -> None:
    """Look a file through, and add it. Raises _LeftOutError or _EncodingError."""
    try:
        with opened(path) as file:
            found = _looked_through(path, file)
    except OSError as error:
        why = error.strerror or str(error)
        raise _LeftOutError("not readable", f"it cannot be read ({why})") from error
    texts.files.append(found)
    suffix = path.suffix.lower()
    if found.form == "text" and suffix in (*_AS_IT_IS, ".json"):
        texts.as_it_is[suffix] += 1


def _looked_through(path: Path, file: BinaryIO) -> TextFile:
    status = os.fstat(file.fileno())
    head = file.read(HEAD_BYTES)
    kind = kind_like_text(head)
    if kind is not None:
        raise _LeftOutError(kind.reason, f"it is {kind.name}; {kind.advice}")
    file.seek(0)
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), "utf-8")
    blank = _read_through(file, encoding, head, path.suffix)
    if blank:
        raise _LeftOutError("empty", "no text found: it is empty")
    form = _form(file, encoding, path.suffix.lower(), status.st_size)
    return TextFile(path, encoding, form, status.st_size, status.st_mtime_ns)


def _read_through(file: BinaryIO, encoding: str, head: bytes, suffix: str) -> bool:
    """Read all of it; whether there is nothing but white space.

    Raises _LeftOutError when it is no text, _EncodingError when it is but of unknown encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    place = controls = 0
    blank, final = True, False
    while not final:
        chunk = file.read(_CHUNK_BYTES)
        final = not chunk
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise _not_decoded(encoding, place - held + error.start, chunk, head, suffix) from None
        place += len(chunk)
        plain = chunk if encoding == "utf-8" else text.encode()
        if b"\0" in plain:
            raise _with_nuls(plain, head, suffix)
        if _SHIFTED.search(plain):
            raise _EncodingError(
                "it looks like ISO-2022 (Japanese mail); convert it "
                "(iconv -f ISO-2022-JP -t UTF-8 FILE > NEW) or leave it out"
            )
        controls += _controls(plain)
        blank = blank and not text.strip()
    if controls > max(_CONTROLS_FEW, place * _CONTROLS_SHARE):
        raise _binary(head, suffix)
    return blank


def _controls(plain: bytes) -> int:
    return len(plain) - len(plain.translate(None, _CONTROLS))


def _binary(head: bytes, suffix: str) -> _LeftOutError:
    kind = kind_of_binary(head, suffix)
    return _LeftOutError(kind.reason, f"it is {kind.name}; {kind.advice}")


def _not_decoded(
    encoding: str, place: int, chunk: bytes, head: bytes, suffix: str
) -> _LeftOutError | _EncodingError:
    """Of a file whose byte `place`, in `chunk`, is not of this encoding."""
    if encoding != "utf-8":
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        return _EncodingError(
            f"it begins as {name} text and is damaged at byte {place}; mend it or leave it out"
        )
    sample = chunk or head
    few = max(_CONTROLS_FEW, len(sample) * _CONTROLS_SHARE)
    if b"\0" in sample or _controls(sample) > few:
        return _binary(head, suffix)
    return _EncodingError(
        f"not UTF-8 text (byte {place}); convert it (if it is Windows-1252 or Latin-1: "
        "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW) or leave it out"
    )


def _with_nuls(plain: bytes, head: bytes, suffix: str) -> _LeftOutError | _EncodingError:
    """Of a file that decodes, and has NULs in it."""
    pairs = len(plain) // 2
    for name, nuls, others in (
        ("UTF-16LE", plain[1::2], plain[::2]),
        ("UTF-16BE", plain[::2], plain[1::2]),
    ):
        # Of most letters one byte is zero, always the same one; no other format looks so.
        if nuls.count(0) > 0.7 * pairs > 0 and not others.count(0):
            return _EncodingError(
                f"it looks like {name} without a byte order mark; convert it "
                f"(iconv -f {name} -t UTF-8 FILE > NEW) or leave it out"
            )
    odd = plain.count(0) + _controls(plain)
    if odd > max(_CONTROLS_FEW, len(plain) * _CONTROLS_SHARE):
        return _binary(head, suffix)
    return _EncodingError(
        "text with NUL bytes in it; take them out (tr -d '\\000' < FILE > NEW) or leave it out"
    )


def _form(file: BinaryIO, encoding: str, suffix: str, size_bytes: int) -> str:
    """Whether it holds records. Raises _EncodingError for damaged or too large JSON."""
    if suffix in _LINES:
        return "jsonl"
    if suffix != ".json":
        return "text"
    file.seek(0)
    whole = size_bytes <= JSON_BYTES_MAX
    content = file.read() if whole else file.readline(_LINE_BYTES_MAX)
    text = content.decode(encoding, "replace").strip()
    first, _, more = text.partition("\n")
    if (more or not whole) and is_json_lines(first):
        return "jsonl"
    if not whole:
        raise _EncodingError(
            f"JSON of more than {human_bytes(JSON_BYTES_MAX)} is not read whole; make it JSON "
            "lines (jq -c '.[]' FILE > FILE.jsonl), or name it .txt to train on it as it is"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.startswith("["):
            return "text"  # a configuration with comments in it, perhaps
        raise _EncodingError("damaged JSON; mend it, or leave it out") from error
    records = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
    return "json" if records or is_record(value) else "text"
