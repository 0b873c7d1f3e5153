"""Numba kernels, cached on disk between processes under names that say what they mean.

Numba's own cache knows a function by its file's date, its name and its code. It takes a kernel that
uses constants or intrinsics of other files for the same when those have changed; it takes two
functions made of one text for one; and two processes that fill it at once may leave the code of one
under the signature of the other. A wrong kernel of a cipher is a quiet disaster, so here a name
carries the case and a digest of every source file that kernels are made of, and files are written
one process at a time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from numba import njit
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)

try:
    import fcntl
except ImportError:  # Windows: two first runs at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

_HERE = Path(__file__).resolve().parent


def _digest() -> str:
    """12 hex digits of the source files below this folder that may reach a CPU kernel."""
    found = hashlib.sha256()
    for file in sorted([Path(__file__), *(_HERE / "he").rglob("*.py")]):
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:12]


_DIGEST = _digest()  # when this module is imported, hence of the code that this process runs


log = logging.getLogger(__name__)


class _AtHome(UserWideCacheLocator):  # type: ignore[misc]
    """Numba's place in the home directory, where there is one: else it would make one named `~`."""

    @classmethod
    def from_function(cls, function: Any, file: Any) -> Any:
        known = os.path.isabs(os.path.expanduser("~"))
        return super().from_function(function, file) if known else None


class _Places(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (UserProvidedCacheLocator, InTreeCacheLocator, _AtHome)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache, filled by one process at a time."""

    _impl_class = _Places

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        self._impl.locator.ensure_cache_path()
        with (Path(self.cache_path) / "private-lora.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._alone():
            super().save_overload(sig, data)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function by numba, without the interpreter's lock, and keep it on disk."""
    return specialised(function, "")


def reassociating(function: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` whose floating-point sums may be taken in any order, hence in vectors."""
    return _compiled(function, {"reassoc", "contract"})


def specialised(function: Callable[..., Any], case: str, **names: Any) -> Callable[..., Any]:
    """`function` compiled with `names` as its globals, beside those that it has.

    case  tells this one from others of the same text; part of a file's name
    """
    assert isinstance(function, FunctionType)
    made = function
    if names:
        space = function.__globals__ | names
        made = FunctionType(function.__code__, space, function.__name__)
    made.__qualname__ = "-".join(filter(None, (function.__qualname__, case)))
    made.__module__ = function.__module__
    return _compiled(made)


def _compiled(function: Callable[..., Any], fast: set[str] | None = None) -> Callable[..., Any]:
    function.__qualname__ = f"{function.__qualname__}-{_DIGEST}"
    compiled: Any = njit(nogil=True, fastmath=fast or False)(function)
    try:
        compiled._cache = _Cache(function)
    except RuntimeError:  # neither this install nor a home can be written to
        _say_once()
    result: Callable[..., Any] = compiled
    return result


@cache
def _say_once() -> None:
    log.warning(
        "no place is found to keep compiled kernels, so that each start compiles them anew; name a "
        "directory of your own with NUMBA_CACHE_DIR"
    )
