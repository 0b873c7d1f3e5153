"""Users whom the system does not know, without a home, on an install that nobody can write to."""

from __future__ import annotations

import logging
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import InTreeCacheLocator

from backends import jit
from backends.he.verdict import owner_verdicts
from backends.places import PlaceError, cache_directory
from scenarios.endpoint import __main__ as endpoint
from scenarios.finetune import __main__ as finetune
from scenarios.generate import __main__ as generate
from scenarios.llama1b import __main__ as llama1b
from scenarios.prepare import __main__ as prepare


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with no name and no home, in a directory that can be written to."""

    def unknown(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PARSERS = {
    "llama1b": lambda words: llama1b.parse(["--real-cpu", *words]),
    "generate": generate.parse,
    "finetune": lambda words: finetune.parse(["--model", "m", "--data", "text.txt", *words]),
    "endpoint": endpoint.parse,
}


@pytest.mark.parametrize("command", PARSERS)
def test_help_needs_no_home(nobody: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a run that names its places."""
    with pytest.raises(SystemExit, match=r"^0$"):
        PARSERS[command](["--help"])
    assert "--cache" in capsys.readouterr().out
    (nobody / "text.txt").write_text("text")
    PARSERS[command](["--cache", "here", "--out", "out"])


@pytest.mark.parametrize("command", PARSERS)
def test_without_a_home_a_place_is_asked_for(
    nobody: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is loaded; the environment may name it, too."""
    (nobody / "text.txt").write_text("text")
    with pytest.raises(SystemExit, match="2"):
        PARSERS[command](["--out", "out"])
    said = capsys.readouterr().err.splitlines()
    assert "this user has no home directory" in said[-1]
    assert "XDG_CACHE_HOME" in said[-1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(nobody / "own"))
    PARSERS[command](["--out", "out"])
    assert not (nobody / "~").exists()


def test_from_python_it_is_a_line_too(nobody: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For prepared models; verdicts can be done without, which is said."""
    with pytest.raises(PlaceError, match="name another place, or set XDG_CACHE_HOME"):
        cache_directory()
    assert owner_verdicts() is None
    assert "XDG_STATE_HOME names another place" in caplog.text
    assert prepare.__doc__ is not None


def made() -> Any:
    def twice(x: int) -> int:
        return 2 * x

    return jit.kernel(twice)


def test_kernels_need_no_place(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are compiled anew, which is said once; and nothing is made in a directory named `~`."""
    monkeypatch.setattr(InTreeCacheLocator, "from_function", lambda function, file: None)
    jit._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [made()(n) for n in (3, 4)] == [6, 8]
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1
    assert list(nobody.iterdir()) == []


@pytest.mark.parametrize("place", ["home", "named"])
def test_kernels_are_kept_where_there_is_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On an install that nobody can write to: the home's, or the one that is named."""
    monkeypatch.setattr(InTreeCacheLocator, "from_function", lambda function, file: None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "named":
        monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "own"))
    jit._say_once.cache_clear()
    assert made()(3) == 6
    kept = list(tmp_path.rglob("*.nbi"))
    assert kept
    assert all(("own" in path.parts) == (place == "named") for path in kept)
    assert caplog.text == ""
    assert os.path.isabs(kept[0])
