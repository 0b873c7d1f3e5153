"""OpenFHE's Python module, where it can be had; who has it not is told how to get it."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from backends.errors import UserError


class OpenFheError(UserError, RuntimeError):
    """OpenFHE cannot be used here; the text says why, and what to do."""


@cache
def openfhe() -> Any:
    """The module. Raises OpenFheError when this interpreter cannot load it."""
    before = os.environ.get("OMP_NUM_THREADS")
    # With one modulus there is nothing that its threads could share: they would only wait for each
    # other, up to a hundred times as long as the work takes. Read when its OpenMP is loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return importlib.import_module("openfhe")
    except ImportError as error:
        first = str(error).partition("\n")[0]
        raise OpenFheError(
            f"OpenFHE does not load in this interpreter ({first}); its wheels are for CPython 3.10 "
            "(glibc++ of Debian 12 and later) and 3.12 (of Ubuntu 24.04 and later): install the "
            "extra `openfhe` in one of these, or leave --scheme at mlwe"
        ) from error
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
