"""What the simulator is asked on the command line and in study files: refused by key and file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.inputs.bring import GOOD_STUDIES, STUDIES
from benchmarks.inputs.values import NO_COUNTS, NO_QUANTITIES
from scenarios.whatif import __main__ as whatif
from scenarios.whatif.__main__ import parse, study_from
from scenarios.whatif.answers import answer
from scenarios.whatif.checks import require_sound
from scenarios.whatif.knobs import Prices, Setting, SettingError, changed, values_of
from scenarios.whatif.study import Study, load_study, study_names
from scenarios.whatif.sweep import Sweep
from sim.trace import PARTS
from sim.world import WorldError

KEY = {
    "nan-price": "gpu-hour", "infinite-price": "gb-out", "true-price": "gb-out",
    "text-price": "gb-out",
    "nan-knob": "lanes", "infinite-knob": "rtt", "overflowing-knob": "bandwidth",
    "no-values": "lanes",
    "factor-nan": "factor", "factor-text": "factor", "until-without": "knob", "knob-still": "knob",
    "kind-list": "kind", "value-unknown": "value", "at-number": "at", "cheaper-alone": "one",
    "cheaper-words": "other", "plot-strange": "x", "plot-show": "show", "plot-against": "against",
    "too-many": "settings", "deep": "", "cut": "", "date-knob": "lanes", "unknown-knob": "lane",
}  # fmt: skip
"""What of a bad study its refusal names, beside its file."""


@pytest.mark.parametrize("knob", ["bandwidth", "rtt", "jitter", "loss", "site-bandwidth"])
def test_no_quantity_is_read(knob: str) -> None:
    """Not numbers, not finite, negative, in units of another thing, or beyond all lines."""
    for text in NO_QUANTITIES:
        with pytest.raises(SettingError, match=f"^{knob}: ") as error:
            values_of(knob, text)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("knob", ["lanes", "owners", "workers", "tokens", "steps"])
def test_no_count_is_read(knob: str) -> None:
    """Zero among them."""
    for text in NO_COUNTS:
        with pytest.raises(SettingError, match=f"{knob}"):
            values_of(knob, text)


@pytest.mark.parametrize(
    "changes",
    [
        {"owners": 1000, "lanes": 1000, "steps": 2}, {"workers": 100_000},
        {"lanes": 1 << 20, "steps": 3},
    ],
)  # fmt: skip
def test_a_world_that_nobody_can_simulate_is_refused(changes: dict[str, int]) -> None:
    """By its numbers."""
    with pytest.raises(SettingError, match="at most"):
        changed(Setting(), dict(changes))


@pytest.mark.parametrize("text", ["1..1000000000", "1..9 x99999999999", "1," * 20_000])
def test_a_knob_has_no_end_of_values(text: str) -> None:
    """It is refused before they are made."""
    with pytest.raises(SettingError, match="lanes: "):
        values_of("lanes", text)


@pytest.mark.parametrize("name", sorted(set(STUDIES) - set(GOOD_STUDIES)))
def test_a_bad_study_is_refused_before_it_runs(tmp_path: Path, name: str) -> None:
    """In one line with its file and what is wrong in it."""
    path = tmp_path / "mine.toml"
    path.write_text(STUDIES[name])
    with pytest.raises(SettingError) as error:
        study_from(parse(["--study", str(path)]))
    said = str(error.value)
    assert "mine.toml" in said
    assert KEY.get(name, "") in said
    assert len(said.splitlines()) == 1


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    """Nor reads what is no text."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe[sweep]")
    (tmp_path / "folder.toml").mkdir()
    for name in ("pipe", "bytes", "folder", "none"):
        with pytest.raises(SettingError, match=f"{name}.toml"):
            load_study(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize("name", study_names())
def test_the_studies_that_come_along_are_sound(name: str) -> None:
    """As they are."""
    require_sound(load_study(name))


def test_a_study_whose_answer_needs_what_the_command_line_fixed() -> None:
    """Is refused before it is simulated."""
    with pytest.raises(SettingError, match=r"one='lanes': it is a knob that varies"):
        study_from(parse(["--study", "lanes-or-bandwidth", "--set", "lanes=2"]))


@pytest.mark.parametrize("price", ["nan", "inf", "-1", "1e400", "cheap", "1e7"])
def test_a_price_that_cannot_be(price: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By its option."""
    with pytest.raises(SystemExit, match="2"):
        parse(["--sweep", "lanes=1,2", f"--price-gb={price}"])
    assert "--price-gb" in capsys.readouterr().err.splitlines()[-1]


def failing(setting: Setting, prices: Prices, run: object) -> dict[str, object]:
    """A world in which nothing can be trained."""
    raise WorldError("the line loses everything")


def test_nothing_that_could_be_trained_is_an_answer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows are written; there is no picture of nothing, and it is said."""
    monkeypatch.setattr("scenarios.whatif.running.measure", failing)
    words = ["--sweep=lanes=1,2", "--set=model=gpt2", "--set=tokens=8", "--set=steps=1"]
    monkeypatch.setattr(
        sys, "argv", ["whatif", *words, "--processes=1", f"--out={tmp_path / 'out'}"]
    )
    whatif.main()
    said = capsys.readouterr().out
    assert "nothing could be trained" in said
    assert "no picture: 2 of 2 settings could not be trained" in said
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert [row["error"] for row in rows] == ["the line loses everything"] * 2


def test_an_answer_of_too_few_rows_is_none(tmp_path: Path) -> None:
    """And no traceback; one of all rows would be a mistake of ours."""
    study = Study("t", "", {}, {"lanes": [1, 2], "bandwidth": [1e8, 1e9]}, answer={
        "kind": "cheaper", "one": "lanes", "other": "bandwidth"})  # fmt: skip
    sweep = Sweep(study, Prices(), 1, tmp_path)
    rows = [
        {"lanes": s.lanes, "bandwidth_bps": s.bandwidth_bps, "error": "no"} for s in sweep.settings
    ]
    whole = {"cost_per_million_tokens": 1.0} | dict.fromkeys(
        (f"path_{part}" for part in PARTS), 0.2
    )
    del rows[0]["error"]
    assert answer(study, [rows[0] | whole, *rows[1:]]).headline == (
        "no answer: 3 of 4 settings could not be trained, and too few are left"
    )
