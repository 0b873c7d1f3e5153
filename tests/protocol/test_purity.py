"""The middle is pure: it imports a few pure modules and itself, so it runs in any world."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import protocol

ALLOWED = {
    "__future__", "collections.abc", "dataclasses", "enum", "heapq", "math", "struct", "typing"
}  # fmt: skip
WORLDS = ("sim", "backends", "scenarios", "simpy", "torch", "numpy", "asyncio", "random", "socket")
"""What would tie the machines to one world, or make two runs differ."""
CLOCKS_AND_THREADS = ("time", "threading", "os")
"""The same; but the interpreter itself always loads these."""
PACKAGE = Path(protocol.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules a file imports, wherever in the file it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def foreign(source: str) -> set[str]:
    """Modules a file imports that the middle may not."""
    names = set(imported(ast.parse(source)))
    return {name for name in names - ALLOWED if name.split(".")[0] != "protocol"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_pure(path: Path) -> None:
    """No clock, thread, socket, randomness or torch: nothing but the allow-list."""
    assert not foreign(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_imported_or_run_behind_our_back(path: Path) -> None:
    """The ways around the check above are closed too."""
    names = {
        node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name)
    }  # fmt: skip
    assert not names & {"__import__", "exec", "eval", "open", "input", "print", "globals"}


def test_importing_the_middle_loads_no_world() -> None:
    """In a fresh interpreter, not even by way of something else."""
    modules = [f"protocol.{path.stem}" for path in FILES if path.stem != "__init__"]
    program = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {', '.join(modules)}; "
        f"print(sorted(set(sys.modules) & set({WORLDS!r})))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*WORLDS, *CLOCKS_AND_THREADS])
def test_the_walk_would_notice(name: str) -> None:
    """The checker itself: each of the forbidden modules, however it is imported."""
    for source in (
        f"import {name}",
        f"import {name}.part as harmless",
        f"from {name} import something",
        f"def late():\n    from {name}.part import something\n",
    ):
        assert foreign(source)


def test_the_walk_sees_every_form_of_import() -> None:
    """The checker itself: plain, dotted, from, relative, and inside a function."""
    source = "import a, b.c\nfrom d import e\nfrom . import f\ndef g():\n    import time\n"
    assert set(imported(ast.parse(source))) == {"a", "b.c", "d", ".", "time"}
