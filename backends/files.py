"""Files that are never half-written: write aside, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from backends.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK_BYTES = 1 << 24
_ASIDE = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)")
"""A name that `replacing` and `replacing_directory` make."""


class WriteError(UserError, OSError):
    """A file or directory cannot be written: what was there before is whole.

    Has the `errno` and `strerror` of its cause.
    """

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause))
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.strerror}; mend that, or name another place"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses is a WriteError of `path`, within a `with` for writing it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


def _claim(descriptor: int) -> None:
    """Show by a lock that a living process is at work on an aside, where there are locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _claimed(aside: Path) -> bool:
    """Whether a living process is at work on it, as far as a lock can tell."""
    try:
        descriptor = os.open(aside, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` at the end of the `with`, or never.

    It has the permissions of the one it replaces, or those of a new file. Its own name until then
    is new and nobody's guess: what somebody else has put there is not written through.

    Raises WriteError when it cannot be written; `path` is then as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            mode = None
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(aside, flags, 0o666)  # less the process's mask
        try:
            with os.fdopen(descriptor, "wb") as file:
                _claim(descriptor)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync_directory(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among processes that change `path`, by a lock file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def require_own(*paths: Path) -> None:
    """Raise OSError when one that is there can be changed by everybody, or is another user's.

    What is mapped is used where it lies, for as long as a run takes.
    """
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mode & stat.S_IWOTH:
            raise PermissionError(f"{path} can be changed by every user of this machine")
        if os.geteuid() and found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} belongs to another user, who can change it at any time")


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises ValueError for NaN and infinities: JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def write_secret(path: Path, value: bytes) -> None:
    """Write a file that only its owner can read, atomically."""
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(value)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file of untrusted origin, open for reading.

    Raises OSError for anything else: a directory, a device, a pipe (which is not waited for).
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """All of a regular file. Raises OSError when it cannot be read or is longer than that."""
    with opened(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(f"it is longer than {limit_bytes} bytes")
    return content


def _array_header(shape: tuple[int, ...], dtype: Any) -> bytes:
    """How `write_array` begins a file."""
    import numpy as np  # here and below: whoever only asks for --help should not wait for it

    buffer = io.BytesIO()
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def map_array(path: Path, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The array of an .npy file of untrusted origin, mapped and read-only.

    The file must be, but for its elements, what `write_array` makes of that shape and dtype: the
    header byte by byte, so that nothing in it is interpreted, and the size.

    Raises OSError when it cannot be read, ValueError when it is another file.
    """
    import numpy as np

    header = _array_header(shape, dtype)
    name = f"{np.dtype(dtype)}{list(shape)}"
    with opened(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        wanted_bytes = len(header) + math.prod(shape) * np.dtype(dtype).itemsize
        if size_bytes != wanted_bytes:
            raise ValueError(f"it has {size_bytes} bytes; {name} has {wanted_bytes}")
        if file.read(len(header)) != header:
            raise ValueError(f"it does not begin as an .npy file of {name} in C order does")
        return np.asarray(np.memmap(file, np.dtype(dtype), "r", len(header), shape))


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 of files' bytes, one after the other, in hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def write_array(
    path: Path, shape: tuple[int, ...], dtype: Any, parts: Iterable[NDArray[Any]]
) -> str:
    """Write an .npy file from arrays along axis 0; returns the SHA-256 of its elements."""
    import numpy as np

    digest = hashlib.sha256()
    with replacing(path) as file:
        file.write(_array_header(shape, dtype))
        for part in parts:
            raw = np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` at the end of the `with`, or never.

    Only its owner can look into it. Raises WriteError when it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        aside.mkdir(mode=0o700)
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            _claim(descriptor)
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            sync_directory(aside)
            _take_place(aside, path)
            sync_directory(path.parent)
        finally:
            os.close(descriptor)
            shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, path: Path) -> None:
    """Rename onto a directory, which cannot be done in one step; the old one goes last.

    Whoever else does so at the same time may come between the steps: the last one stays.
    """
    former = []
    while True:
        try:
            aside.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")
        with suppress(FileNotFoundError):
            path.rename(old)
            former.append(old)
    for old in former:
        shutil.rmtree(old)


def remove_directory(path: Path) -> None:
    """Delete a directory, if it is there. To whoever looks for its name it is whole, or gone.

    A crash leaves the rest of it to `end_replacing`. Raises WriteError when it cannot be deleted.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)


def end_replacing(directory: Path, names: Collection[str] | None = None) -> None:
    """Clear up in `directory` after a crash within `replacing` or `replacing_directory`.

    What was moved aside to be replaced, and was not, comes back; what was never finished is
    deleted. What a living process is at work on stays, where the file system has locks to tell it
    by; where it has none, this is only for whoever alone writes there.

    names  of what was to be replaced; None takes all
    """
    found = {path: _ASIDE.fullmatch(path.name) for path in directory.iterdir()}
    # Old ones first: they are worth more than what was to replace them.
    for path, name in sorted(found.items(), key=lambda item: item[0].suffix != ".old"):
        if name is None or not (names is None or name[1] in names) or _claimed(path):
            continue
        target = directory / name[1]
        if name[2] == "old" and not target.exists():
            path.rename(target)
            sync_directory(directory)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
