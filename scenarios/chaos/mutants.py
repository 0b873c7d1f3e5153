"""Do the protocol's own tests notice every small change of it? And where they do not, does chaos?

One mutant at a time, in a copy of the source tree: first the tests of tests/protocol, the slow one
last, until one fails; then, for those that live, a short chaos run. Failing, crashing and taking
too long all count as killed. The test that compares docs/protocol.md with the tables is left out:
it finds every changed cell, and says nothing of what the cell is for.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backends.threads import core_count
from scenarios import record
from scenarios.chaos.equivalent import EQUIVALENT
from scenarios.chaos.mutation import Mutant, all_mutants, sample
from scenarios.chaos.nursery import NOT_RUN
from scenarios.chaos.planted import ROOT, PatchError, chaos_finds, copy_tree

TESTS = "tests/protocol"
_FIRST = ("test_boundaries.py",)
_LAST = ("test_pair.py", "test_purity.py")
_LEFT_OUT = f"{TESTS}/test_tables.py::test_the_page_shows_these_tables"
_SAVE_EVERY_S = 20.0
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class MutantError(ValueError):
    """The hunt cannot begin; the text says why."""


class Bench:
    """A copy of the tree and a nursery in it.

    chaos_seeds  for mutants that the tests let live; 0 for none
    """

    def __init__(self, directory: Path, chaos_seeds: int) -> None:
        self.tree, self._chaos_seeds = directory, chaos_seeds
        directory.mkdir()
        copy_tree(directory)
        self._files = sorted(path.name for path in (directory / TESTS).glob("test_*.py"))
        self._nursery = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "scenarios.chaos.nursery"], cwd=directory,
            env=os.environ | {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.timeout_s = 600.0

    def end(self) -> None:
        """Stop the nursery."""
        self._nursery.kill()
        self._nursery.wait()

    def test(self, changed: str = "") -> dict[str, Any]:
        """The protocol's tests on the tree as it is; first those of the changed module."""
        near, far = self._by_distance(changed)
        run = self._order(near) if near else {"status": 0}
        return run if run["status"] else self._order(far)

    def _by_distance(self, changed: str) -> tuple[list[str], list[str]]:
        """The files that most likely notice, which are quick to collect; and the others."""
        about = "page" if "table" in changed else Path(changed).stem.partition("_")[0]
        near = [name for name in self._files if changed and about in name and name not in _LAST]
        near += [name for name in _FIRST if changed and name in self._files]
        far = [name for name in self._files if name not in near]
        return near, sorted(far, key=lambda name: name in _LAST)

    def _order(self, files: list[str]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        arguments = [
            "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-rfE",
            "--deselect", _LEFT_OUT, *(f"{TESTS}/{name}" for name in files),
        ]  # fmt: skip
        order = {"arguments": arguments, "timeout_s": self.timeout_s}
        self._nursery.stdin.write(json.dumps(order) + "\n")
        self._nursery.stdin.flush()
        answer: dict[str, Any] = json.loads(self._nursery.stdout.readline())
        return answer

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """(outcome, by what): "killed" or "survived"."""
        path = self.tree / mutant.file
        text = (ROOT / mutant.file).read_bytes()
        path.write_bytes(mutant.apply(text))
        try:
            return self._judge(mutant.file)
        finally:
            path.write_bytes(text)

    def _judge(self, changed: str) -> tuple[str, str]:
        run = self.test(changed)
        if run["status"] == NOT_RUN:
            raise MutantError(f"the tests cannot be run any more: {run['told']}")
        if run["status"]:
            named = _FAILED.search(run["told"])
            words = "took too long" if run["status"] == -1 else f"status {run['status']}"
            return "killed", named.group(1) if named else words
        if self._chaos_seeds:
            try:
                found, _, how = chaos_finds(self.tree, self._chaos_seeds)
            except PatchError:
                return "killed", "chaos does not run"
            except subprocess.TimeoutExpired:
                return "killed", "chaos took too long"
            if found:
                return "killed", f"chaos: {how}"
        return "survived", ""


def outdated(mutants: Sequence[Mutant]) -> list[str]:
    """Entries of EQUIVALENT that no present mutant fits."""
    keys = {mutant.key for mutant in mutants}
    return [": ".join(key) for key in EQUIVALENT if key not in keys]


def _digest() -> str:
    """Of what is changed, and of the tests that look at it."""
    whole = hashlib.sha256()
    for directory in ("protocol", TESTS):
        for path in sorted((ROOT / directory).glob("*.py")):
            whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def _earlier(path: Path | None, digest: str) -> dict[tuple[str | int, ...], dict[str, Any]]:
    """What an interrupted hunt of the same texts has found so far."""
    if path is None or not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text())
        rows = held["results"] if held["digest"] == digest else []
        return {tuple(row[k] for k in _KEY): row for row in rows}
    except (ValueError, KeyError, TypeError):
        return {}


_KEY = ("file", "where", "line", "before", "after")


def _row(mutant: Mutant, outcome: str, by: str, seconds: float) -> dict[str, Any]:
    return {
        "file": mutant.file, "where": mutant.where, "kind": mutant.kind, "line": mutant.line,
        "text": mutant.text, "before": mutant.before, "after": mutant.after, "outcome": outcome,
        "by": by, "seconds": round(seconds, 1),
    }  # fmt: skip


def _figures(
    rows: list[dict[str, Any]], digest: str, seed: int, possible: int, elapsed_s: float
) -> dict[str, Any]:
    count = Counter(row["outcome"] for row in rows)
    at_stake = len(rows) - count["equivalent"]
    return {
        "mutants": len(rows),
        "killed": count["killed"],
        "equivalent": count["equivalent"],
        "survived": count["survived"],
        "killed_share": round(count["killed"] / at_stake, 4) if at_stake else 1.0,
        "by_chaos": sum(row["by"].startswith("chaos") for row in rows),
        "possible": possible,
        "seed": seed,
        "elapsed_s": round(elapsed_s, 1),
        "digest": digest,
        "survivors": [row for row in rows if row["outcome"] == "survived"],
        "results": rows,
    }


@contextmanager
def _benches(count: int, chaos_seeds: int) -> Iterator[queue.Queue[Bench]]:
    """Copies of the tree in which the tests pass."""
    free: queue.Queue[Bench] = queue.Queue()
    made: list[Bench] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        try:
            for index in range(count):
                made.append(Bench(Path(scratch) / f"tree{index}", chaos_seeds))
            run = made[0].test()  # the trees are alike
            if run["status"]:
                raise MutantError(f"the tests fail without a mutant: {run['told'][-600:]}")
            for bench in made:
                bench.timeout_s = 30 + 6 * run["seconds"]
                free.put(bench)
            yield free
        finally:
            for bench in made:
                bench.end()


def hunt(
    json_path: Path | None, seed: int, count: int, processes: int | None, chaos_seeds: int
) -> int:
    """Judge a sample of mutants on all cores; returns the exit status."""
    mutants = all_mutants(ROOT / "protocol")
    stale = outdated(mutants)
    if stale:
        raise MutantError("equivalent.py speaks of what is not there: " + "; ".join(stale))
    chosen, digest = sample(mutants, seed, count), _digest()
    earlier = _earlier(json_path, digest)
    rows: dict[Mutant, dict[str, Any]] = {}
    for mutant in chosen:
        known = earlier.get((mutant.file, mutant.where, mutant.line, mutant.before, mutant.after))
        if mutant.key in EQUIVALENT:
            rows[mutant] = _row(mutant, "equivalent", EQUIVALENT[mutant.key], 0.0)
        elif known is not None and known["outcome"] == "killed":
            rows[mutant] = known
    left = [mutant for mutant in chosen if mutant not in rows]
    start = saved = time.monotonic()

    def figures() -> dict[str, Any]:
        ordered = [rows[mutant] for mutant in chosen if mutant in rows]
        return _figures(ordered, digest, seed, len(mutants), time.monotonic() - start)

    wanted = max(1, min(len(left), processes or core_count()))
    try:
        for mutant, row in _judged(left, wanted, chaos_seeds):
            rows[mutant] = row
            if row["outcome"] == "survived":
                with tqdm.external_write_mode():
                    print(f"SURVIVED {mutant}", flush=True)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                saved = time.monotonic()
                record.write(json_path, figures(), quiet=True)
    finally:
        record.write(json_path, figures(), quiet=True)
    told = figures()
    print(
        f"{told['mutants']} of {told['possible']} mutants: {told['killed']} killed "
        f"({told['by_chaos']} by chaos), {told['equivalent']} equivalent, {told['survived']} "
        f"survived, in {told['elapsed_s']:.0f} s"
    )
    return int(told["survived"] > 0)


def _judged(
    mutants: list[Mutant], processes: int, chaos_seeds: int
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    if not mutants:
        return
    with _benches(processes, chaos_seeds) as free, ThreadPoolExecutor(processes) as pool:

        def one(mutant: Mutant) -> tuple[Mutant, dict[str, Any]]:
            bench, start = free.get(), time.monotonic()
            try:
                outcome, by = bench.judge(mutant)
            finally:
                free.put(bench)
            return mutant, _row(mutant, outcome, by, time.monotonic() - start)

        try:
            yield from tqdm(
                pool.map(one, mutants), total=len(mutants), desc="mutants", unit="mutant",
                dynamic_ncols=True,
            )  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
