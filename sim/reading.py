"""Device profiles in files of unknown origin: every key and no other, numbers within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.files import read_bounded

_BYTES_MAX = 1 << 20
_RATE = (1.0, 1e24)
_CORES = (1e-3, 1e6)
_NUMBERS = {"cores": _CORES, "bytes_per_s": _RATE}
_TABLES = {"rates": _RATE, "overhead_s": (0.0, 3600.0), "width": (1e-6, _CORES[1])}
_TEXTS = ("kind", "where", "when", "commit")
_LISTS = ("assumed", "published")
_OPTIONAL = {"width", "commit", *_LISTS}


def read_profile(path: Path) -> dict[str, Any]:
    """The entries of a profile's file.

    Raises OSError when it cannot be read, ValueError when it is no profile; the text names the key.
    """
    try:
        facts = json.loads(read_bounded(path, _BYTES_MAX))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _require_keys("the profile", facts, ("name", "origin", *_NUMBERS, *_TABLES))
    _require_keys("origin", facts["origin"], (*_TEXTS, *_LISTS))
    for name, value in (("name", facts["name"]), *_texts(facts["origin"])):
        if not isinstance(value, str):
            raise ValueError(f"{name} is a text, not {_shown(value)}")
    for name in _NUMBERS:
        _require_number(name, facts[name], *_NUMBERS[name])
    for name, bounds in _TABLES.items():
        table = facts.get(name, {})
        if not isinstance(table, Mapping):
            raise ValueError(f"{name} is a table of numbers, not {_shown(table)}")
        for kind, value in table.items():
            _require_number(f"{name}.{kind}", value, *bounds)
    return dict(facts)


def _texts(origin: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = [(f"origin.{name}", origin[name]) for name in _TEXTS if name in origin]
    for name in _LISTS:
        lines = origin.get(name, [])
        if not isinstance(lines, list):
            raise ValueError(f"origin.{name} is a list of texts, not {_shown(lines)}")
        found += [(f"origin.{name}", line) for line in lines]
    return found


def _require_keys(what: str, facts: Any, known: tuple[str, ...]) -> None:
    if not isinstance(facts, Mapping):
        raise ValueError(f"{what} is a table, not {_shown(facts)}")
    missing = [name for name in known if name not in facts and name not in _OPTIONAL]
    if missing:
        raise ValueError(f"{what} has no {missing[0]!r}")
    unknown = [name for name in facts if name not in known]
    if unknown:
        raise ValueError(f"{what} has {_shown(unknown[0])}, which is none of {', '.join(known)}")


def _require_number(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # a NaN is in no range
        raise ValueError(f"{name} is a number from {least:g} to {most:g}, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
