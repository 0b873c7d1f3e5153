"""Where prepared models are kept, by the options that say so."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from scenarios.options import add_cache_option


def asked(*arguments: str) -> Path:
    """The place that a command line means."""
    parser = argparse.ArgumentParser()
    add_cache_option(parser)
    place: Path = parser.parse_args(arguments).cache
    return place


def homeless(cls: type[Path]) -> Path:
    """`Path.home` of a user whom the system does not know and who has no HOME."""
    raise RuntimeError("Could not determine home directory.")


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As named; else in the cache of the user."""
    assert asked("--cache", str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert asked() == tmp_path / "private-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert asked() == Path.home() / ".cache" / "private-lora"


def test_a_user_without_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Must name a place, is told so in a line, and may ask for help before."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with pytest.raises(SystemExit, match="2"):
        asked()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "argument --cache: this user has no home directory" in said
    with pytest.raises(SystemExit, match="0"):
        asked("--help")
    assert asked("--cache", str(tmp_path)) == tmp_path


def test_a_place_that_cannot_be_looked_into(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Is refused before anything runs."""
    with pytest.raises(SystemExit, match="2"):
        asked("--cache", str(tmp_path / ("x" * 300) / "deep"))
    assert "File name too long" in capsys.readouterr().err.splitlines()[-1]
