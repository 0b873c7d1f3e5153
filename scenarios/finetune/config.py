"""`--config FILE.yaml`: options of a command from a file, as if they were typed before the others.

So each is checked by its own type, and what is typed wins.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from backends.files import read_bounded
from backends.options import Parser, shown

_TAG = "tag:yaml.org,2002:"
_BYTES_MAX = 1 << 16
_NAME = "--config"


class ConfigError(ValueError):
    """A file of options cannot be used; the text says why in one line."""


def with_config(words: Sequence[str], parser: Parser) -> list[str]:
    """The words of a command line after those of the file that its --config names.

    Ends the process, as argparse does, when that file cannot be used.
    """
    place = _named(words)
    if place is None:
        return list(words)
    try:
        return [*_as_words(place, _read(Path(place)), words, parser), *words]
    except ConfigError as error:
        parser.error(f"argument {_NAME}: {shown(place)}: {error}")


def _named(words: Sequence[str]) -> str | None:
    """The last file that is named; None for none, or for an option without its value."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, equals, value = word.partition("=")
        if name == _NAME:
            found = value if equals else following
    return found or None


class _Words(yaml.SafeLoader):  # type: ignore[misc]
    """Values stay as they are written, but for true, false and nothing; a name is there once."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, form) for tag, form in found if tag in (f"{_TAG}bool", f"{_TAG}null")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a name that is there twice."""
        names = [name.value for name, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, "a name is there twice", node.value[place][0].start_mark
                )
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


for _kind_of_value in ("int", "float", "timestamp", "binary", "set", "pairs", "omap"):
    _Words.add_constructor(f"{_TAG}{_kind_of_value}", yaml.SafeLoader.construct_yaml_str)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.load(read_bounded(path, _BYTES_MAX).decode(), _Words)
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}it is no YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("it is no YAML in UTF-8") from error
    if not isinstance(found, dict):
        raise ConfigError("it holds no `name: value` lines")
    return found


def _as_words(
    place: str, settings: Mapping[Any, Any], typed: Sequence[str], parser: Parser
) -> list[str]:
    options = parser.options()
    del options[_NAME]
    given = {options[n] for n in (word.partition("=")[0] for word in typed) if n in options}
    decided = given | {rival for action in given for rival in parser.rivals(action)}
    words: list[str] = []
    seen: set[argparse.Action] = set()
    for key, value in settings.items():
        action = options.get(f"--{key}")
        if action is None or not isinstance(key, str):
            raise ConfigError(f"no option is called {shown(str(key))}{_meant(str(key), options)}")
        if action in seen:
            raise ConfigError(f"{shown(key)} is there under two names")
        seen.add(action)
        found = _option(key, value, action)
        if action not in decided:
            words += found
    return words


def _meant(key: str, options: Mapping[str, argparse.Action]) -> str:
    names = [name.removeprefix("--") for name in options]
    close = difflib.get_close_matches(key[:40].replace("_", "-"), names, 1)
    return f"; did you mean {close[0]!r}?" if close else "; --help has all of them"


def _option(key: str, value: Any, action: argparse.Action) -> list[str]:
    """The words of one line of the file."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is true or false, not {_kind(value)}")
        return [f"--{key}"] * value
    several = isinstance(action.default, list) or action.metavar == "NAMES"
    values = value if several and isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            one = "one value, or a list of them" if several else "one value"
            raise ConfigError(f"{key} takes {one}, not {_kind(each)}")
    if action.metavar == "NAMES":
        values = [",".join(str(each) for each in values)]
    return [f"--{key}={each}" for each in values]


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), f"{shown(str(value))}")
