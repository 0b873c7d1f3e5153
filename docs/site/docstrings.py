"""Docstrings of this project as Markdown: `name  what it is` lines become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\w[\w, ]*?)  +(\S.*)$")


class Fields(griffe.Extension):
    """Runs over every object that griffe has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The text, its lines of fields as list items with what goes on below them."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _FIELD.match(line)
        if found is not None:
            lines += [] if inside else [""]
            lines.append(f"- `{found[1]}`: {found[2]}")
            inside = True
        elif inside and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)
