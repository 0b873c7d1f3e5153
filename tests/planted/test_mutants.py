"""Mutants: that they cover the tables, that each is a change, and that what judges them judges."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from protocol.owner_tables import CALLS, SESSIONS
from protocol.worker import TRANSITIONS
from scenarios.chaos import mutants
from scenarios.chaos.mutation import Mutant, all_mutants, sample
from scenarios.chaos.nursery import run
from scenarios.chaos.planted import ROOT

ALL = all_mutants(ROOT / "protocol")


def test_every_cell_of_every_table_is_changed() -> None:
    """In its next state, in its action where it has one, and away."""
    places = Counter((m.where, m.text) for m in ALL if m.kind == "cell")
    assert len(places) == len(SESSIONS) + len(CALLS) + len(TRANSITIONS)
    assert {(name, number) for (name, _), number in places.items()} == {
        ("SESSIONS", 3), ("TRANSITIONS", 3), ("CALLS", 2),
    }  # fmt: skip


def test_every_mutant_is_a_change_that_can_be_compiled() -> None:
    """Of some file of the protocol; and each sort of change is there."""
    texts = {m.file: (ROOT / m.file).read_bytes() for m in ALL}
    assert {m.kind for m in ALL} == {"cell", "compare", "constant", "boolean", "statement"}
    assert {"protocol/owner.py", "protocol/worker.py", "protocol/messages.py"} <= set(texts)
    for mutant in ALL:
        assert mutant.apply(texts[mutant.file]) != texts[mutant.file], mutant
    assert len(ALL) > 800


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(a):\n    return a < 1\n", {"(a <= 1)", "(0)", "(2)", "pass"}),
        ("def f(a):\n    if a:\n        g()\n", {"(not a)", "pass"}),
        ("def f(a, b):\n    return a and (not b)\n", {"(a or not b)", "(b)", "pass"}),
        ("def f() -> 'int < 1':\n    '''1 < 2'''\n    raise ValueError('a < 1')\n", {"pass"}),
        ("class Config:\n    wait_s: float = 60.0\n", set()),
        ("class A:\n    count: int = 0\n", {"(-1)", "(1)"}),
    ],
)
def test_what_is_changed(text: str, expected: set[str], tmp_path: Path) -> None:
    """Operators, numbers, conditions, statements; no words, types or defaults of settings."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "it.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        found = {mutant.after for mutant in all_mutants(tmp_path / "given")}
    for name in ("given.it", "given"):
        __import__("sys").modules.pop(name, None)
    assert found == expected


def test_a_sample_is_the_seeds() -> None:
    """The same in every process, another for another seed, all of them for 0."""
    assert sample(ALL, 1, 50) == sample(ALL, 1, 50) != sample(ALL, 2, 50)
    assert len(set(sample(ALL, 1, 50))) == 50
    assert sample(ALL, 1, 0) == ALL


def test_no_entry_is_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mutant that is called equivalent exists, and one that does not is named."""
    assert mutants.outdated(ALL) == []
    gone = ("protocol/owner.py", "Owner.gone", "x = 1", "1", "(2)")
    monkeypatch.setitem(mutants.EQUIVALENT, gone, "was there once")
    assert mutants.outdated(ALL) == [": ".join(gone)]
    with pytest.raises(mutants.MutantError, match=r"Owner\.gone"):
        mutants.hunt(None, 0, 1, 1, 0)


def test_runs_end_well_badly_or_in_time(tmp_path: Path) -> None:
    """Each in a process that leaves nothing behind."""
    (tmp_path / "test_given.py").write_text(
        "import time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_long(): time.sleep(60)\n"
    )
    start = time.monotonic()
    ends = {}
    for name, timeout_s in (("right", 30), ("wrong", 30), ("long", 1)):
        arguments = ["-q", "-rf", "-p", "no:cacheprovider", f"{tmp_path}/test_given.py"]
        ends[name] = run([*arguments, "-k", name], timeout_s)
    assert [ends[name]["status"] for name in ("right", "wrong", "long")] == [0, 1, -1]
    assert "FAILED" in ends["wrong"]["told"]
    assert time.monotonic() - start < 50


def test_an_interrupted_hunt_goes_on(tmp_path: Path) -> None:
    """What was killed under the same texts stays so; anything else is judged again."""
    path = tmp_path / "mutants.json"
    mutant = ALL[0]
    row = mutants._row(mutant, "killed", "a test", 1.0)
    path.write_text(json.dumps(mutants._figures([row], "digest", 0, len(ALL), 1.0)))
    assert list(mutants._earlier(path, "digest").values()) == [row]
    assert mutants._earlier(path, "other digest") == {}
    path.write_text("{")
    assert mutants._earlier(path, "digest") == {}
    assert mutants._earlier(None, "digest") == {}


@pytest.mark.slow
def test_a_mutant_is_killed_and_the_tree_is_whole_again(tmp_path: Path) -> None:
    """By a test that is named."""
    (mutant,) = (m for m in ALL if m.where == "announced_bytes" and m.kind == "compare")
    bench = mutants.Bench(tmp_path / "tree", chaos_seeds=0)
    try:
        outcome, by = bench.judge(mutant)
    finally:
        bench.end()
    assert outcome == "killed"
    assert by.startswith("tests/protocol/test_")
    text = (ROOT / mutant.file).read_bytes()
    assert (bench.tree / mutant.file).read_bytes() == text
    assert isinstance(mutant, Mutant)
