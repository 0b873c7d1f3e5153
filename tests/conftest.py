"""What holds for every test: nobody's own state is read or written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with what takes long first: begun last, one would keep a process busy when the others
    have ended."""
    slow, all_of = Counter[Path](), Counter[Path]()
    for item in items:
        slow[item.path] += item.get_closest_marker("slow") is not None
        all_of[item.path] += 1
    items.sort(key=lambda item: (-slow[item.path], -all_of[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Verdicts on prepared models go to a directory of the test run, of processes it starts too."""
    former = os.environ.get("XDG_STATE_HOME")
    state = tmp_path_factory.mktemp("state")
    os.environ["XDG_STATE_HOME"] = str(state)
    yield state
    if former is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = former
