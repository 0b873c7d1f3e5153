"""Files that are never half-written: write aside, fsync, rename."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` at the end of the `with`, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_directory(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


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


def write_array(
    path: Path, shape: tuple[int, ...], dtype: Any, parts: Iterable[NDArray[Any]]
) -> str:
    """Write an .npy file from arrays along axis 0; returns the SHA-256 of its elements."""
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

    Only its owner can look into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        sync_directory(aside)
        if path.exists():
            # A directory cannot be replaced in one step; the old one goes last.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
