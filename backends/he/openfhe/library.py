"""OpenFHE's Python module, where it can be had; who has it not is told how to get it."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from backends.errors import UserError


class OpenFheError(UserError, RuntimeError):
    """OpenFHE cannot be used here; the text says why, and what to do."""


@cache
def openfhe() -> Any:
    """The module. Raises OpenFheError when this interpreter cannot load it."""
    try:
        return importlib.import_module("openfhe")
    except ImportError as error:
        first = str(error).partition("\n")[0]
        raise OpenFheError(
            f"OpenFHE does not load in this interpreter ({first}); its wheels are for CPython 3.10 "
            "(glibc++ of Debian 12 and later) and 3.12 (of Ubuntu 24.04 and later): install the "
            "extra `openfhe` in one of these, or leave --scheme out"
        ) from error


@cache
def _openmp() -> Any:
    """The OpenMP that OpenFHE runs on: its own, or torch's where that was loaded before."""
    return ctypes.CDLL(importlib.import_module("openfhe.openfhe").__file__)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, what this thread asks of OpenFHE is computed in it.

    With one modulus there is nothing to share. OpenMP's other threads would only be waited for, on
    busy cores a hundred times as long as the work takes.
    """
    library = _openmp()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
