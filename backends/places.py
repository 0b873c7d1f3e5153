"""Places that a command is told to write to: looked at before anything long is begun.

What is found only at the end of a run has cost the run. So that no kind of refusal has to be known
in advance (permissions, a file system that is read-only or full, names that are too long), each
place is tried: something is written there and taken away again.

The functions that take an option's text are an option's type: a PlaceError is what `argparse` shows
of it, and what `clean_exit` does.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from backends.errors import UserError
from backends.files import end_replacing, replacing

_SHOWN = 120
_PROBE = bytes(4096)
_LONGEST = 2048  # bytes; the systems here end at 4096, what is below it included


class PlaceError(UserError, argparse.ArgumentTypeError):
    """Nothing can be written where it was to be; the text says why, and what to do."""


def cache_directory() -> Path:
    """Where prepared models are kept: $XDG_CACHE_HOME/private-lora, or ~/.cache/private-lora.

    Raises PlaceError for a user without a home.
    """
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise PlaceError(
            "this user has no home directory to keep prepared models in; name another place, or "
            "set XDG_CACHE_HOME"
        ) from error
    return place / "private-lora"


def output_directory(text: str | Path) -> Path:
    """A directory to write into, there or not yet. It is as it was afterwards."""
    path = named(text)
    if os.path.exists(path) and not os.path.isdir(path):
        raise PlaceError(f"{_shown(path)} is a file; name a directory")
    made: list[Path] = []
    try:
        _make(path, made)
        # Without a name where the system can, so that a kill leaves nothing.
        with tempfile.TemporaryFile(dir=path) as file:
            _try(file)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        _take_away(made)
    return path


def replaced_directory(text: str | Path) -> Path:
    """A directory that will be put in its place as a whole, from beside it."""
    path = named(text)
    if os.path.exists(path) and not os.path.isdir(path):
        raise PlaceError(f"{_shown(path)} is a file; name a directory")
    if path.name in ("", ".."):
        raise PlaceError(f"{_shown(path)} cannot be replaced; name a directory of its own")
    made: list[Path] = []
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _make(path.parent, made)
        aside.mkdir(mode=0o700)
        with tempfile.TemporaryFile(dir=aside) as file:
            _try(file)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _take_away(made)
    return path


def output_file(text: str | Path) -> Path:
    """A file to write, there or not yet. What it holds stays; what is left of a dead process that
    was writing it goes."""
    path = named(text)
    if os.path.isdir(path) or str(text).endswith(os.sep):
        raise PlaceError(f"cannot write to {_shown(path)}: it is a directory; name a file in it")
    existed = os.path.exists(path)
    if existed and not os.path.isfile(path):
        raise PlaceError(f"cannot write to {_shown(path)}: it is no regular file; name another")
    made: list[Path] = []
    try:
        _make(path.parent, made)
        with suppress(OSError):  # of another user, perhaps
            end_replacing(path.parent, {path.name})
        # Replaced by itself, as it will be: permissions tell only half of what can go wrong.
        held = path.read_bytes() if existed else b""
        with replacing(path) as file:
            file.write(held or _PROBE)
            if not held:
                file.flush()
                file.truncate(0)
        if not existed:
            path.unlink()
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        _take_away(made)
    return path


def require_room(place: Path, needed_bytes: int, what: str, mend: str) -> None:
    """Raise PlaceError when the disk of `place`, which need not be there, has less than that free.

    what  will take it, for the message; `mend` says what can be done beside making room
    """
    there = place.absolute()
    while not os.path.exists(there) and there != there.parent:
        there = there.parent
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise PlaceError(
            f"{what} needs {_size(needed_bytes)} more in {_shown(place)}, which has "
            f"{_size(free_bytes)} free; make room, or {mend}"
        )


def taken_bytes(place: Path) -> int:
    """What the files in a directory take, those below it too; 0 without one."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def named(text: str | Path) -> Path:
    """The path that a text means. Raises PlaceError for one that means none."""
    name = str(text)
    if not name or name.isspace():
        raise PlaceError("an empty name is no place")
    if "\0" in name:
        raise PlaceError("a name cannot hold a NUL character")
    try:
        if len(name.encode()) > _LONGEST:
            raise PlaceError(f"{_shown(name)}: File name too long; name another place")
        return Path(name).expanduser()
    except UnicodeEncodeError as error:
        raise PlaceError(f"{_shown(name)} is no name in UTF-8; name another place") from error
    except RuntimeError as error:  # ~ of nobody
        raise PlaceError(
            f"{_shown(name)}: the home directory that ~ stands for is not known here; write the "
            "path out"
        ) from error


def _make(path: Path, made: list[Path]) -> None:
    """Make a directory and what it lies in; what was not there is added to `made`."""
    missing = []
    while not os.path.lexists(path) and path != path.parent:
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        made.append(each)


def _take_away(made: list[Path]) -> None:
    for path in reversed(made):
        with suppress(OSError):  # another process has put something there
            path.rmdir()


def _try(file: IO[bytes]) -> None:
    """Write what a disk must really have room for."""
    file.write(_PROBE)
    file.flush()
    os.fsync(file.fileno())


def _refused(path: Path, error: OSError) -> PlaceError:
    why = error.strerror or str(error)
    places = [p for p in path.parents if os.path.lexists(p) and not os.path.isdir(p)]
    if places:
        link = os.path.islink(places[-1]) and not os.path.exists(places[-1])
        why = f"{_shown(places[-1])} is {'a link to nothing' if link else 'a file'}"
    elif os.path.islink(path) and not os.path.exists(path):
        why = "it is a link to nothing"
    return PlaceError(f"cannot write to {_shown(path)}: {why}; name a place that you can write to")


def _shown(path: str | Path) -> str:
    """In one line, and not longer than it helps."""
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
