"""What a part said, which may be more than memory holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import BinaryIO

from backends.he.cuda.tiling import SKIP_VARIABLE, TILINGS

_ADVICE = re.compile(rf"{SKIP_VARIABLE}=([\w-]+)".encode())  # as the tuner's has it
_TAIL = 4000  # characters that tell why a part failed
_CHUNK = 1 << 20
_OVERLAP = 200  # bytes; more than an advice has


class Log:
    """The output of a part, in an open file.

    hidden  paths of this machine, which figures do not hold
    """

    def __init__(self, file: BinaryIO, hidden: Sequence[str]) -> None:
        self._file = file
        self._hidden = hidden

    def tail(self) -> str:
        """Its last words."""
        size = self._file.seek(0, 2)
        self._file.seek(max(0, size - 4 * _TAIL))  # what is hidden may be most of it
        said = self._file.read(4 * _TAIL).decode(errors="replace")
        for path in self._hidden:
            said = said.replace(path, "")
        return said[-_TAIL:]

    def blamed(self, skipped: str) -> str:
        """The first tiling that it names as one to do without, and that was not skipped; or ''.

        Only tilings that there are count: a part's output can say anything.
        """
        names = {t.name.encode() for t in TILINGS if not t.matches(skipped)}
        self._file.seek(0)
        before = b""
        while chunk := self._file.read(_CHUNK):
            text = before + chunk
            for found in _ADVICE.finditer(text):
                if found[1] in names:
                    return found[1].decode()
            before = text[-_OVERLAP:]
        return ""
