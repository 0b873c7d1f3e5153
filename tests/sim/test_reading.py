"""Device profiles from files that nobody vouches for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sim.device import PROFILES, DeviceProfile, ProfileError

FACTS = json.loads((PROFILES / "cpu-2core.json").read_text())


def changed(keys: str, value: Any) -> str:
    """The profile as text, with one entry changed."""
    facts = json.loads(json.dumps(FACTS))
    *path, last = keys.split(".")
    at = facts
    for key in path:
        at = at[key]
    at[last] = value
    return json.dumps(facts)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("rates.int8", math.nan), ("rates.int8", math.inf), ("rates.int8", 0),
        ("rates.float", -1.0),
        ("rates.float", "fast"), ("rates.value", True), ("rates.value", None),
        ("rates.int8", 1e-300),
        ("rates", [1, 2]), ("bytes_per_s", math.nan), ("bytes_per_s", "1e9"), ("cores", 0),
        ("cores", 1e9), ("overhead_s.local", math.nan), ("overhead_s.local", 1e300),
        ("overhead_s", 5), ("width.local", "1"), ("name", 7), ("origin", "here"),
        ("origin.when", 2026),
        ("origin.assumed", "everything"), ("origin.assumed", [1]), ("speed", 1.0),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_named(tmp_path: Path, keys: str, value: Any) -> None:
    """With its file, in one line, before anything is simulated."""
    path = tmp_path / "mine.json"
    path.write_text(changed(keys, value))
    with pytest.raises(ProfileError) as error:
        DeviceProfile.load(path)
    said = str(error.value)
    assert "mine.json holds no device profile" in said
    assert keys.rpartition(".")[2] in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["null", "[]", "7", "{", "[" * 100_000, '"x"', "\x00", "1e400"])
def test_what_is_no_profile(tmp_path: Path, text: str) -> None:
    """However deep."""
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"mine\.json holds no device profile"):
        DeviceProfile.load(path)


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    """Nor reads a folder, or bytes that are no text."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    for name in ("pipe", "folder", "bytes", "none"):
        with pytest.raises(ProfileError, match=name):
            DeviceProfile.load(tmp_path / f"{name}.json")
