"""What a file is that holds no plain text, by its first bytes, and what to do about it."""

from __future__ import annotations

import codecs
from typing import NamedTuple


class Kind(NamedTuple):
    """In words, as in 'it is NAME; ADVICE'; `reason` is what is counted when it is left out."""

    name: str
    advice: str
    reason: str = "not text"


HEAD_BYTES = 1 << 16
"""So much of a file's beginning is enough to tell."""

_UNPACK = "unpack it, and give the texts in it"
_CONVERT = "save it as plain text"
_ROWS = "write its rows as JSON lines"
_WEIGHTS = "give the text to train on, not a model"
_GIVE = "give plain text"

_LIKE_TEXT = (
    (b"%PDF-", Kind("a PDF document", "take its text out, e.g. with pdftotext")),
    (b"{\\rtf", Kind("an RTF document", _CONVERT)),
    (b"%!PS", Kind("a PostScript document", "take its text out, e.g. with ps2ascii")),
    (b"%FDF-", Kind("data of a PDF form", _GIVE)),
    (
        b"version https://git-lfs.github.com/spec/",
        Kind(
            "a git-LFS pointer to a file that is elsewhere",
            "fetch it with `git lfs pull`",
            "git-LFS pointers",
        ),
    ),
)
_BEFORE = codecs.BOM_UTF8 + b" \t\r\n\f\x04"
"""Readers of these formats pass over such bytes, and files have them: a mark, white space, a
printer's end of job."""
_BINARY = (
    (b"\x1f\x8b", Kind("gzip-compressed", _UNPACK)),
    (b"BZh", Kind("bzip2-compressed", _UNPACK)),
    (b"\xfd7zXZ\0", Kind("xz-compressed", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("zstd-compressed", _UNPACK)),
    (b"\x04\x22\x4d\x18", Kind("lz4-compressed", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (b"\xd0\xcf\x11\xe0", Kind("an old Office document", _CONVERT)),
    (b"PAR1", Kind("a Parquet table", _ROWS)),
    (b"ARROW1", Kind("an Arrow table", _ROWS)),
    (b"SQLite format 3\0", Kind("an SQLite database", _ROWS)),
    (b"\x89HDF", Kind("an HDF5 file", _ROWS)),
    (b"\x93NUMPY", Kind("a NumPy array", "give the text to train on, not tokens")),
    (b"GGUF", Kind("a GGUF model", _WEIGHTS)),
    (b"\x80\x02", Kind("a Python pickle", _GIVE)),
    (b"\x80\x03", Kind("a Python pickle", _GIVE)),
    (b"\x80\x04", Kind("a Python pickle", _GIVE)),
    (b"\x80\x05", Kind("a Python pickle", _GIVE)),
    (b"\x89PNG", Kind("a PNG image", _GIVE)),
    (b"\xff\xd8\xff", Kind("a JPEG image", _GIVE)),
    (b"GIF8", Kind("a GIF image", _GIVE)),
    (b"RIFF", Kind("a RIFF file (an image, sound or film)", _GIVE)),
    (b"OggS", Kind("an Ogg file", _GIVE)),
    (b"\x7fELF", Kind("a program", _GIVE)),
    (b"MZ", Kind("a program", _GIVE)),
)
_ZIPPED = {
    ".docx": Kind("a Word document", _CONVERT),
    ".xlsx": Kind("an Excel workbook", _CONVERT),
    ".pptx": Kind("a PowerPoint presentation", _CONVERT),
    ".odt": Kind("an OpenDocument text", _CONVERT),
    ".epub": Kind("an EPUB book", _CONVERT),
    ".pt": Kind("a PyTorch file", _WEIGHTS),
    ".pth": Kind("a PyTorch file", _WEIGHTS),
    ".bin": Kind("a zip archive, as PyTorch saves", _WEIGHTS),
    ".npz": Kind("NumPy arrays", "give the text to train on, not tokens"),
}
_UNKNOWN = Kind("binary data of no known kind", _GIVE)


def kind_like_text(head: bytes) -> Kind | None:
    """A format whose files may pass as text, or None.

    head  the first HEAD_BYTES
    """
    begun = head.lstrip(_BEFORE)
    return next((kind for start, kind in _LIKE_TEXT if begun.startswith(start)), None)


def kind_of_binary(head: bytes, suffix: str) -> Kind:
    """What a file is that is no text; its suffix matters for zip archives alone."""
    if head.startswith(b"PK\x03\x04"):
        return _ZIPPED.get(suffix.lower(), Kind("a zip archive", _UNPACK))
    if head[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    if head[4:8] == b"ftyp":
        return Kind("a film or sound", _GIVE)
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return Kind("model weights in safetensors", _WEIGHTS)
    return next((kind for start, kind in _BINARY if head.startswith(start)), _UNKNOWN)
