"""A little of `python -m benchmarks.inputs`, and that it would notice.

Cases are forked, so all of it runs in one process of its own: what other tests have started in this
one, threads above all, is not to be forked.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def apart() -> Iterator[Executor]:
    """A process that has started nothing yet."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        yield pool


def kinds_of(
    cases: list[Case], folders: tuple[Path, Path], at_once: int, limit_s: float
) -> dict[str, str]:
    """What was found of each case of the faulty command, by what it does."""
    found = verdicts(iter(cases), folders, at_once, limit_s)
    return {v.case.words[0].partition("=")[2]: v.kind for v in found}


def a_few() -> tuple[dict[str, Any], list[str]]:
    """The figures of a short run, and what was found."""
    figures, found = run(parse(["--cases", "40", "--seed", "3", "--limit-s", "60"]))
    return figures, [f"{v.case} {v.kind} {v.case.nonsense} {v.text[-500:]}" for v in found]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(an empty pool, where cases live)."""
    for name in ("pool", "cases"):
        (tmp_path / name).mkdir()
    return tmp_path / "pool", tmp_path / "cases"


def test_every_kind_of_fault_is_noticed(folders: tuple[Path, Path], apart: Executor) -> None:
    """Each for what it is; nothing of a case stays behind."""
    cases = [Case(number, FAULTY, [f"--do={what}"]) for number, what in enumerate(WHAT)]
    assert apart.submit(kinds_of, cases, folders, 4, 1.0).result(120) == KINDS
    assert list(folders[1].iterdir()) == []


def test_what_goes_on_with_nonsense_is_silent(folders: tuple[Path, Path], apart: Executor) -> None:
    """And what refuses it is not."""
    cases = [
        Case(number, FAULTY, [f"--do={what}"], ["--do"])
        for number, what in enumerate(("well", "refuse", "raise"))
    ]
    kinds = apart.submit(kinds_of, cases, folders, 2, 5.0).result(120)
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


def test_a_few_cases_of_every_command(apart: Executor) -> None:
    """None ends in a traceback, waits forever, or takes what can never be right."""
    figures, found = apart.submit(a_few).result(200)
    assert figures["cases"] == 40
    assert figures["refused"] > 10
    assert not found
