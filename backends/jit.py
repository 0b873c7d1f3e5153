"""Numba kernels made from one text for several cases, cached on disk between processes.

Numba's own cache knows a function by its file's date, its name and its code. A kernel that calls
intrinsics or constants of other files, or that one text makes for several instruction sets, would
be mistaken for another one, or outlive its meaning. Here the name carries the case, and a digest of
every file that the kernel's meaning lies in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from numba import njit


@cache
def _digest(files: tuple[str, ...]) -> str:
    """12 hex digits of the files' contents."""
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return found.hexdigest()[:12]


def specialised(
    text: Callable[..., Any], case: str, meaning: Sequence[ModuleType], **names: Any
) -> Callable[..., Any]:
    """`text` compiled by numba with `names` as its globals, beside those that it has.

    case     tells this one from others of the same text; part of a file's name
    meaning  the modules, beside the text's own, whose change must compile it anew
    """
    assert isinstance(text, FunctionType)
    made = FunctionType(text.__code__, text.__globals__ | names, text.__name__)
    files = tuple(str(module.__file__) for module in meaning)
    made.__qualname__ = f"{text.__qualname__}-{case}-{_digest(files)}"
    made.__module__ = text.__module__
    compiled: Callable[..., Any] = njit(nogil=True, cache=True)(made)
    return compiled
