"""These run where OpenFHE loads, with or without torch: `make openfhe` makes such a place."""

from __future__ import annotations

import pytest

from backends.he.openfhe.library import OpenFheError, openfhe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `library` where there is none."""
    try:
        openfhe()
    except OpenFheError:
        why = (
            "OpenFHE does not load here; after `make openfhe`, `make test` runs it in .venv-openfhe"
        )
        for item in items:
            if item.get_closest_marker("library"):
                item.add_marker(pytest.mark.skip(reason=why))
