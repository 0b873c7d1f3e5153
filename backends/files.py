"""Files that are never half-written: write aside, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
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


def write_array(path: Path, shape: tuple[int, ...], dtype: Any, parts: Callable[[], Any]) -> str:
    """Write an .npy file from the arrays `parts()` yields along axis 0; returns its SHA-256."""
    digest = hashlib.sha256()
    with replacing(path) as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts():
            raw = np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of an array's elements."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


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
