"""The middle is pure: it imports a few pure modules and itself, so it runs in any world."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import protocol

ALLOWED = {"__future__", "collections.abc", "dataclasses", "enum", "struct", "typing"}
FILES = sorted(Path(protocol.__file__).parent.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules a file imports, wherever in the file it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_pure(path: Path) -> None:
    """No clock, thread, socket, randomness or torch: nothing but the allow-list."""
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    foreign = {name for name in names - ALLOWED if name.split(".")[0] != "protocol"}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_imported_or_run_behind_our_back(path: Path) -> None:
    """The ways around the check above are closed too."""
    names = {
        node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name)
    }  # fmt: skip
    assert not names & {"__import__", "exec", "eval", "open", "input", "print", "globals"}


def test_the_walk_sees_every_form_of_import() -> None:
    """The checker itself: plain, dotted, from, relative, and inside a function."""
    source = "import a, b.c\nfrom d import e\nfrom . import f\ndef g():\n    import time\n"
    assert set(imported(ast.parse(source))) == {"a", "b.c", "d", ".", "time"}
