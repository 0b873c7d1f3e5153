"""Every small change of protocol/ that a test should notice, made from its present text.

    cell       a cell of a table: another state, another action, or nothing
    compare    < to <=, == to !=, `in` to `not in`, and back
    constant   plus one, minus one, doubled, zero
    boolean    a condition the other way round, `and` to `or`, True to False
    statement  deleted

Not changed: words for a person, types, and the defaults of a configuration, which are choices of
ours and no promise: tests of what they lead to set their own.

A mutator of our own, for the tables: they are where the protocol is, and a cell that mutmut or
cosmic-ray can change is one literal, while half of ours come from `_ignored(...)` and `**`. Here a
cell is changed by a line that comes after the table, whatever made it. The rest is a page of `ast`.
"""

from __future__ import annotations

import ast
import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_DELETED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Return, ast.Continue)


@dataclass(frozen=True)
class Mutant:
    """One change: `before` at a place of a file becomes `after`.

    where  the function, or the table
    text   the line that it is in
    span   (first, one past last) byte of what is replaced
    """

    file: str
    where: str
    kind: str
    line: int
    text: str
    before: str
    after: str
    span: tuple[int, int]

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What it is known by, wherever in its function it moves."""
        return self.file, self.where, self.text, self.before, self.after

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.where}: {self.before!r} -> {self.after!r}"

    def apply(self, text: bytes) -> bytes:
        """The changed file."""
        return text[: self.span[0]] + self.after.encode() + text[self.span[1] :]


def all_mutants(package: Path) -> list[Mutant]:
    """Of every module of the package, in order of files and places; each is still Python."""
    found = []
    for path in sorted(package.glob("*.py")):
        text = path.read_bytes()
        finder = _Finder(f"{package.name}/{path.name}", text)
        finder.visit(ast.parse(text))
        cells = _cells(f"{package.name}/{path.name}", f"{package.name}.{path.stem}", text)
        for mutant in [*finder.found, *cells]:
            try:
                compile(mutant.apply(text), path.name, "exec")
            except SyntaxError:
                continue
            found.append(mutant)
    return found


def sample(mutants: list[Mutant], seed: int, count: int) -> list[Mutant]:
    """So many of them, drawn from the seed; all of them for 0."""
    if not count or count >= len(mutants):
        return mutants
    rng = random.Random(f"mutants:{seed}")
    return [mutants[index] for index in sorted(rng.sample(range(len(mutants)), count))]


# --- tables -----------------------------------------------------------------------------------


def _cells(file: str, module: str, text: bytes) -> Iterator[Mutant]:
    """Changes of (Enum, Enum) -> anything tables of a module, by lines put after its last one."""
    loaded = importlib.import_module(module)
    end = (len(text), len(text))
    for name, table in vars(loaded).items():
        if not _is_table(table, module):
            continue
        line = text[: text.find(name.encode() + b":")].count(b"\n") + 1
        for cell, value in table.items():
            rng = random.Random(f"{name}{cell}")
            place = f"{name}[{', '.join(map(_source, cell))}]"
            before = f"{place} = {_source(value)}"
            for other in _others(value, list(table.values()), rng):
                after = f"{place} = {_source(other)}"
                yield Mutant(file, name, "cell", line, place, before, f"\n{after}\n", end)
            yield Mutant(file, name, "cell", line, place, before, f"\ndel {place}\n", end)


def _is_table(thing: object, module: str) -> bool:
    return isinstance(thing, dict) and all(
        isinstance(key, tuple)
        and len(key) == 2
        and all(isinstance(part, Enum) and type(part).__module__ == module for part in key)
        for key in thing
    ) and bool(thing)  # fmt: skip


def _others(value: Any, values: list[Any], rng: random.Random) -> list[Any]:
    """Another next state; and where a cell has an action as well, another action."""
    states = sorted({v[0] if isinstance(v, tuple) else v for v in values}, key=str)
    if not isinstance(value, tuple):
        return [rng.choice([state for state in states if state is not value])]
    actions = sorted({v[1] for v in values})
    return [
        (rng.choice([state for state in states if state is not value[0]]), value[1]),
        (value[0], rng.choice([action for action in actions if action != value[1]])),
    ]


def _source(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))})"
    return f"{type(value).__name__}.{value.name}" if isinstance(value, Enum) else repr(value)


# --- everything else --------------------------------------------------------------------------


class _Finder(ast.NodeVisitor):
    """Collects the changes of one file."""

    def __init__(self, file: str, text: bytes) -> None:
        self._file, self._text = file, text
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self.found: list[Mutant] = []

    def _span(self, node: Any) -> tuple[int, int]:
        first = self._starts[node.lineno - 1] + node.col_offset
        return first, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _add(self, node: Any, kind: str, after: str) -> None:
        span = self._span(node)
        before = self._text[span[0] : span[1]].decode()
        where = ".".join(self._scope) or "module"
        if before != after:
            line = self._text.splitlines()[node.lineno - 1].decode().strip()
            self.found.append(
                Mutant(self._file, where, kind, node.lineno, line, before, after, span)
            )

    def _changed(self, node: ast.expr, kind: str, other: ast.expr) -> None:
        self._add(node, kind, f"({ast.unparse(other)})")

    def _scoped(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self._scope.append(node.name)
        for field, part in ast.iter_fields(node):
            if field in ("body", "args"):  # no decorators, bases, return types
                for one in part if isinstance(part, list) else [part]:
                    self.visit(one)
        self._scope.pop()

    visit_ClassDef = _scoped  # noqa: N815
    visit_FunctionDef = _scoped  # noqa: N815

    def visit_arg(self, node: ast.arg) -> None:
        """Types are not run."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Only what is assigned, and no default of a configuration."""
        chosen = self._scope[-1:] and self._scope[-1].endswith("Config")
        if node.value is not None and not chosen:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Says what cannot happen."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Words for a person."""

    def visit_Compare(self, node: ast.Compare) -> None:
        """The operator, where there is one."""
        if len(node.ops) == 1:
            other = _SWAPPED[type(node.ops[0])]()
            self._changed(node, "compare", ast.Compare(node.left, [other], node.comparators))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Numbers and truth values."""
        value = node.value
        if isinstance(value, bool):
            self._add(node, "boolean", repr(not value))
        elif isinstance(value, int | float):
            for other in sorted({value + 1, value - 1, value * 2, value * 0} - {value}):
                self._add(node, "constant", f"({other!r})")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """`not` goes."""
        if isinstance(node.op, ast.Not):
            self._changed(node, "boolean", node.operand)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """`and` to `or`."""
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._changed(node, "boolean", ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """The other way round, unless another change of it is the same."""
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self._changed(node.test, "boolean", ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """The same."""
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self._changed(node.test, "boolean", ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Statements of functions are deleted; texts and types are left alone."""
        inside = bool(self._scope) and self._scope[-1][:1] != self._scope[-1][:1].upper()
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, _DELETED) and not words and (inside or self._private()):
            self._add(node, "statement", "pass")
        super().generic_visit(node)

    def _private(self) -> bool:
        return bool(self._scope) and self._scope[-1].startswith("_")
