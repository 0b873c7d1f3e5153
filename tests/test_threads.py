"""Splitting ranges over cores."""

from __future__ import annotations

import threading

import pytest

from backends import threads
from backends.threads import run_split


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 64])
def test_every_index_is_done_once(size: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are disjoint and complete, whatever the number of cores."""
    monkeypatch.setattr(threads, "core_count", lambda: cores)
    lock, done = threading.Lock(), []

    def work(first: int, last: int) -> None:
        with lock:
            done.extend(range(first, last))

    run_split(work, size)
    assert sorted(done) == list(range(size))


def test_an_error_in_any_part_is_raised() -> None:
    """Also one on a pool thread."""

    def work(first: int, last: int) -> None:
        if first == 0:
            raise RuntimeError("broken part")

    with pytest.raises(RuntimeError, match="broken part"):
        run_split(work, 100)
