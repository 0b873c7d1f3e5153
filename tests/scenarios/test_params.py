"""The command that says what parameters are worth."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest

from backends.defaults import MAX_INPUTS, SHARED_BLOCKS
from backends.he.estimate import verdict
from backends.he.estimate.attacks import dual_hypothesis, primal_any_of
from backends.he.estimate.reduction import CLASSICAL
from backends.he.estimate.verdict import judged
from backends.he.params import PRESETS
from backends.he.quantise import quantise
from backends.options import Whole
from scenarios.params import run as params
from scenarios.params.__main__ import MOST_BLOCKS, main
from scenarios.params.run import Shape, exactness, table, traffic
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
    """Neither can it be asked; a width that is refused is told one that is not."""
    wide = str(said(monkeypatch, "--preset", "paranoid", "--in", "1000000", "--out", "2"))
    assert "leaves no room" in wide
    assert "\n" not in wide
    fits = re.search(r"; --in (\d+) fits$", wide)
    assert fits
    assert 100_000 < int(fits[1]) < 1_000_000
    assert exactness(PRESETS["paranoid"], Shape(int(fits[1]), 2, 1))["margin"] < 1
    assert said(monkeypatch, "--rank", "6", "--preset", "paranoid") == 2
    assert said(monkeypatch, "--blocks", "1") == 2
    assert "is at least 2" in capsys.readouterr().err
    assert said(monkeypatch, "--owners", "2^60", "--blocks", "2^5") == 2
    assert "is at most 18446744073709551616 (2^64)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "text", "nearest"),
    [
        ("--rank", "9", "at most 8"),
        ("--in", "1048577", "at most 1048576"),
        ("--in", "9" * 20, "at most 1048576"),
        ("--in", "²", "from 1 to 1048576"),
        ("--out", "9" * 5000, "at most 1048576"),
        ("--tokens", "9" * 401, "at most 1099511627776"),
        ("--owners", "9" * 401, "at most 18446744073709551616"),
        ("--blocks", "10^60", "at most 18446744073709551616"),
        ("--blocks", "10^" + "9" * 19, "at most 18446744073709551616"),
        ("--blocks", "0", "from 1 to 18446744073709551616"),
    ],
)
def test_every_number_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    text: str,
    nearest: str,
) -> None:
    """Before anything is allocated or computed, in one short line that says what is possible."""
    assert said(monkeypatch, option, text) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert nearest in last
    assert len(last) < 200


def test_the_largest_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most blocks cost an attack less, by a little; the widest weight takes little room."""
    for known in PRESETS.values():
        luck, tests = (
            [
                attack(judged(known), CLASSICAL, blocks).bits
                for blocks in (SHARED_BLOCKS, MOST_BLOCKS)
            ]
            for attack in (primal_any_of, dual_hypothesis)
        )
        assert 0 <= luck[0] - luck[1] < 3
        assert 0 <= tests[0] - tests[1] < 3
    shape = Shape(MAX_INPUTS, MAX_INPUTS, 1)
    sizes = []
    monkeypatch.setattr(
        params, "quantise", lambda w, limit: sizes.append(w.numel()) or quantise(w, limit)
    )
    shape.plan(PRESETS["exact"])
    assert sizes == [1 << 24]


def test_blocks_are_counted_in_whole_numbers() -> None:
    """A float has no room for them."""
    sent = traffic(PRESETS["exact"], Shape(1, 1, 256 * (2**53 + 1)))
    assert sent["blocks_per_request"] == 2**53 + 1
    assert traffic(PRESETS["exact"], Shape(1, 1, 257))["blocks_per_request"] == 2


def test_counts_are_written_as_people_do() -> None:
    """A number, or a power."""
    count = Whole(1, 1 << 64, powers=True)
    assert [count(text) for text in ("12", "2^30", "10^3", "11^2", "2^64", "5^0", "007")] == [
        12, 2**30, 1000, 121, 2**64, 1, 7,
    ]  # fmt: skip
    for wrong in ("2^", "2^-1", "two", "0", "0^3", "2^65", "1e9", "", "2^3^4"):
        with pytest.raises(argparse.ArgumentTypeError):
            count(wrong)


def test_shapes() -> None:
    """Wider is less exact; a short request fills a part of a block."""
    known = PRESETS["paranoid"]
    narrow, wide = (exactness(known, Shape(k, 64, 10)) for k in (512, 4096))
    assert 0 < narrow["predicted_error"] < wide["predicted_error"] < 0.05
    assert 0 < narrow["margin"] < wide["margin"] < 0.1
    sent = traffic(known, Shape(100, 7, 10))
    assert (sent["up_bits_per_value"], sent["up_bytes_per_block"]) == (24, 3000)
    assert sent["tokens_per_block"] == 10
