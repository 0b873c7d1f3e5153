"""A little of `python -m benchmarks.inputs`, and that it would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.inputs import bring
from benchmarks.inputs.__main__ import parse, run, verdicts
from benchmarks.inputs.cases import Case, Drawer
from benchmarks.inputs.entries import Entry
from tests.inputs.faulty_command import WHAT

FAULTY = Entry("tests.inputs.faulty_command", "tests.inputs.faulty_command", ())
KINDS = {
    "well": "ended", "refuse": "refused", "raise": "traceback", "thread": "traceback",
    "mute": "unsaid", "wait": "hang", "work": "long", "die": "traceback", "memory": "traceback",
    "other-status": "unsaid",
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(an empty pool, where cases live)."""
    for name in ("pool", "cases"):
        (tmp_path / name).mkdir()
    return tmp_path / "pool", tmp_path / "cases"


def test_every_kind_of_fault_is_noticed(folders: tuple[Path, Path]) -> None:
    """Each for what it is; nothing of a case stays behind."""
    cases = [Case(number, FAULTY, [f"--do={what}"]) for number, what in enumerate(WHAT)]
    found = {v.case.words[0][5:]: v.kind for v in verdicts(iter(cases), folders, 4, 1.0)}
    assert found == KINDS
    assert list(folders[1].iterdir()) == []


def test_what_goes_on_with_nonsense_is_silent(folders: tuple[Path, Path]) -> None:
    """And what refuses it is not."""
    cases = [
        Case(number, FAULTY, [f"--do={what}"], ["--do"])
        for number, what in enumerate(("well", "refuse", "raise"))
    ]
    kinds = {v.case.words[0][5:]: v.kind for v in verdicts(iter(cases), folders, 2, 5.0)}
    assert kinds == {"well": "silent", "refuse": "refused", "raise": "traceback"}


def test_the_same_seed_draws_the_same_cases() -> None:
    """In another process too: a finding can be seen again."""
    first, again, other = (
        [str(case) for case in Drawer(seed).cases(60)] for seed in (1, 1, 2)
    )  # fmt: skip
    assert first == again != other
    assert len({case.split()[2] for case in first}) > 8


def test_what_people_bring_can_be_made(tmp_path: Path) -> None:
    """With every damage in it."""
    bring.make(tmp_path / "pool")
    for name in bring.DAMAGE:
        assert (tmp_path / "pool" / "weights" / name).is_dir()
    assert (tmp_path / "pool" / "data" / "fifo.txt").is_fifo()


def test_a_few_cases_of_every_command() -> None:
    """None ends in a traceback, waits forever, or takes what can never be right."""
    figures, found = run(parse(["--cases", "40", "--seed", "6", "--limit-s", "60"]))
    assert figures["cases"] == 40
    assert figures["refused"] > 10
    assert not found, [(str(v.case), v.kind, v.case.nonsense, v.text[-500:]) for v in found]
