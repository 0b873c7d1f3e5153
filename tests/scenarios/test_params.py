"""The command that says what parameters are worth."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest

from backends.he.estimate import verdict
from backends.he.params import PRESETS
from scenarios.params import Shape, count, exactness, main, table, traffic
from tests.scenarios.commands import run


def test_the_whole_of_it(tmp_path: Path) -> None:
    """What is printed is what is written: attacks, worst, guideline, error, bytes."""
    file = tmp_path / "params.json"
    text = run(
        "scenarios.params", "--preset", "conservative", "--in", "1024", "--out", "512",
        "--tokens", "300", "--owners", "4", "--blocks", "2^20", "--json", str(file),
    )  # fmt: skip
    found = json.loads(file.read_text())
    security = found["security"]
    assert security["blocks"] == 4 * 2**20
    assert table(security["attacks"], security["attacks_rounding_counted"]) in text
    worst = security["worst"]
    assert worst["bits"] >= verdict.FLOOR_BITS
    assert worst in security["attacks"]
    assert f"{worst['bits']:.1f} core-SVP bits: {worst['attack']}" in text
    assert security["log2_modulus"] <= security["guideline_max_log2_modulus"]
    for one, other in zip(
        security["attacks"], security["attacks_rounding_counted"], strict=True
    ):  # fmt: skip
        assert other["bits"] > one["bits"]
    assert found["traffic"]["blocks_per_request"] == 2
    assert found["traffic"]["up_bytes_per_block"] == 3 * 1024 * 256
    assert found["traffic"]["down_bytes_per_block"] == 2 * 512 * 256
    assert f"{found['exactness']['predicted_error']:.2%} predicted" in text
    assert "scenarios.params" in found["origin"]["command"]


def said(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    """Runs the command here, to its refusal: what it says, or argparse's exit status."""
    monkeypatch.setattr(sys, "argv", ["params", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("rank", ["1", "4"])
def test_what_is_insecure_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """In one line, which names what to choose."""
    text = str(said(monkeypatch, "--rank", rank))
    assert text.startswith("error: ")
    assert "\n" not in text
    assert "over the 128-bit line" in text
    assert re.search(r"the nearest secure choice is --preset \w+$", text)


def test_a_weak_estimate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the floor and under the guideline's line: another preset, or none, is named."""
    monkeypatch.setattr(verdict, "FLOOR_BITS", 200.0)
    text = str(said(monkeypatch, "--preset", "conservative", "--blocks", "2^20"))
    assert "below the floor of 200; the nearest secure choice is --" in text
    monkeypatch.setattr(verdict, "FLOOR_BITS", 1000.0)
    text = str(said(monkeypatch, "--preset", "conservative", "--blocks", "2^20"))
    assert text.endswith("no rank is secure")


def test_what_cannot_be_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither can it be asked."""
    assert "rank must be 1..8" in str(said(monkeypatch, "--rank", "9"))
    wide = said(monkeypatch, "--preset", "paranoid", "--in", "1000000", "--out", "2")
    assert "leaves no room" in str(wide)
    assert said(monkeypatch, "--rank", "6", "--preset", "paranoid") == 2
    assert said(monkeypatch, "--blocks", "1") == 2
    assert "is at least 2" in capsys.readouterr().err


def test_counts_are_written_as_people_do() -> None:
    """A number, or a power."""
    assert [count("12"), count("2^30"), count("10^3")] == [12, 2**30, 1000]
    for wrong in ("2^", "2^-1", "two", "0", "11^2", "2^61", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            count(wrong)


def test_shapes() -> None:
    """Wider is less exact; a short request fills a part of a block."""
    known = PRESETS["paranoid"]
    narrow, wide = (exactness(known, Shape(k, 64, 10)) for k in (512, 4096))
    assert 0 < narrow["predicted_error"] < wide["predicted_error"] < 0.05
    assert 0 < narrow["margin"] < wide["margin"] < 0.1
    sent = traffic(known, Shape(100, 7, 10))
    assert sent["up_bytes_per_block"] == known.up_bytes_per_value * 1000
    assert sent["tokens_per_block"] == 10
