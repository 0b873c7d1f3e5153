"""The ledger of a run's workers: durable, strict about its file, and clear about what to do."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.ledger import LedgerError, TaintedError, WorkerLedger


def ledger_in(directory: Path) -> WorkerLedger:
    return WorkerLedger(directory / "run" / "retired-workers.json")


def test_what_was_caught_is_known_after_a_restart(tmp_path: Path) -> None:
    """With what was found, when, and where that is kept; the first finding stays."""
    ledger = ledger_in(tmp_path)
    assert ledger.retired == {}
    ledger.retire("w1", "layer.up: not the product")
    ledger.retire("w1", "another lie")
    ledger.retire("w2", "off by a little")
    again = ledger_in(tmp_path)
    assert again.retired == ledger.retired
    assert again.retired["w1"].startswith("layer.up: not the product (20")
    assert "retired-workers.json" in again.retired["w1"]
    assert "off by a little" in again.retired["w2"]


def test_who_served_is_known_until_what_they_computed_is_given_up(tmp_path: Path) -> None:
    """It is no part of the file: checkpoints say whom they rest on."""
    ledger = ledger_in(tmp_path)
    ledger.accepted("w1")
    ledger.accepted("w1")
    assert ledger.served == {"w1"}
    ledger.start_over()
    assert ledger.served == frozenset()
    assert ledger_in(tmp_path).served == frozenset()


@pytest.mark.parametrize("caught", ["w1", "w2"])
@pytest.mark.parametrize("ended", [None, ValueError("no worker left"), SystemExit(0)])
def test_what_rests_on_one_that_was_caught_is_tainted(
    tmp_path: Path, caught: str, ended: BaseException | None
) -> None:
    """Also when nothing can go on without it; a worker of whom nothing was used taints nothing."""
    ledger = ledger_in(tmp_path)
    expected = TaintedError if caught == "w1" else ended and type(ended)
    with pytest.raises(expected) if expected else nullcontext(), ledger.untainted("this: redo it"):
        ledger.accepted("w1")
        ledger.retire(caught, "a lie")
        if ended:
            raise ended


def test_who_says_already_that_it_is_tainted_is_not_talked_over(tmp_path: Path) -> None:
    """Its advice is the better one."""
    ledger = ledger_in(tmp_path)
    with pytest.raises(TaintedError, match="run it again"), ledger.untainted("this: redo it"):
        ledger.accepted("w1")
        ledger.retire("w1", "a lie")
        raise TaintedError("run it again")


def test_nobody_left_is_said_before_anything_starts(tmp_path: Path) -> None:
    """Each by name; one that was not caught is enough to go on."""
    ledger = ledger_in(tmp_path)
    ledger.retire("w1", "a lie")
    ledger.require_one_of(["w1", "w2"])
    with pytest.raises(LedgerError, match=r"'w1': a lie .*delete that file"):
        ledger.require_one_of(["w1"])


GOOD = {"format": 1, "workers": {"w1": {"found": "a lie", "when": "2026-01-01T00:00:00+00:00"}}}


def other(**changes: object) -> dict[str, object]:
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    "stored",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}",
        other(format=2), other(more=1), {"format": 1}, other(workers=[]), other(workers="w1"),
        other(workers={"w1": {}}), other(workers={"w1": "a lie"}), other(workers={"": {}}),
        other(workers={"w1": {"found": 1, "when": "now"}}),
        other(workers={"w1": {"found": "a\nb", "when": "now"}}),
        other(workers={"w1": {"found": "a lie", "when": "now", "more": 1}}),
        other(workers={"w1": {"found": "a" * 5000, "when": "now"}}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_never_taken_for_an_empty_one(tmp_path: Path, stored: object) -> None:
    """Trusting a liar again by a torn file would be failing open."""
    path = tmp_path / "retired-workers.json"
    path.write_bytes(stored if isinstance(stored, bytes) else json.dumps(stored).encode())
    with pytest.raises(LedgerError, match=r"retired-workers.json .*restore it, or delete it"):
        WorkerLedger(path)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A directory in its place, here."""
    (tmp_path / "retired-workers.json").mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        WorkerLedger(tmp_path / "retired-workers.json")


@given(st.text(min_size=1), st.text(min_size=1))
def test_whatever_the_driver_calls_a_worker_can_be_read_again(worker: str, found: str) -> None:
    """A name or finding that the reader would refuse must not lock the owner out of its run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "retired-workers.json"
        ledger = WorkerLedger(path)
        ledger.retire(worker, found)
        assert WorkerLedger(path).retired == ledger.retired
