"""What a row of docs/inputs.md is: something a person brings, and what they see.

A part keeps its rows in a module `tests/inputs/NAME.py`, which makes what is brought and imports
nothing heavy at its top; `tests/inputs/test_NAME.py` tries every row; `docs/generate_inputs.py`
lists the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the page, and one test.

    brings   what a person brings, in Markdown
    sees     what happens, in Markdown; of what is refused: what the one line says
    make     makes it in an empty directory, and returns what the part's test takes
    refusal  what the line of a refusal must match (a regular expression); None: it works
    """

    brings: str
    sees: str
    make: Callable[[Path], Any]
    refusal: str | None = None


@dataclass(frozen=True)
class Part:
    """A section of the page.

    title    its heading
    opening  a sentence or two on what holds for every row
    groups   rows by what they have in common, in order
    """

    title: str
    opening: str
    groups: dict[str, tuple[Row, ...]]

    def rows(self) -> list[Row]:
        """All of them, in order."""
        return [row for group in self.groups.values() for row in group]
