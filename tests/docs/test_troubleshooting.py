"""Each error text of docs/troubleshooting.md is one that the code says."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.docs.markdown import DOCS, ROOT

VALUE = "..."
"""Stands where a message has one."""


@cache
def said_by_the_code() -> str:
    """Every text in the sources, of several pieces as one, a line each."""
    found = []
    for room in ("backends", "protocol", "scenarios", "sim"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    found.append(text_of(node).replace("\n", " "))
    return "\n".join(found)


def text_of(node: ast.AST) -> str:
    """A literal's text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return VALUE


def quoted() -> list[str]:
    """The page's headings that are code."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.*)`$", page, re.MULTILINE)


def test_quoted_errors_are_in_the_code() -> None:
    """Word for word, in one message each; `...` is a value, and no words that were left out."""
    code = said_by_the_code()
    assert [text for text in quoted() if text not in code] == []
    assert len(quoted()) >= 25


def test_an_error_that_nobody_says_is_noticed() -> None:
    """Another word, words left out, or words of two messages."""
    code = said_by_the_code()
    for text in (
        "holds no config.yaml",
        "no worker ... start it",
        "no worker can be reached; make",
    ):
        assert text not in code
