"""Do the checks find what they are for? Known defects, planted one at a time in a copy of the tree.

A defect is a file tests/planted/NAME.patch: a few lines that say what it breaks, a line
`Found by: chaos` or `Found by: tests/...::test_...`, and a unified diff. Each is applied to a
temporary copy of the source tree; then chaos runs there until its first violation, or the named
test, which must fail. Line numbers of a diff are not looked at: the text of each hunk must occur
exactly once, so a patch that no longer fits the source is noticed, and one that moved is not.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from backends.threads import core_count
from scenarios import record

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "tests" / "planted"
COPIED = ("protocol", "backends", "sim", "scenarios", "tests", "docs", "pyproject.toml")
SEEDS_MOST = 2000
_TEST_TIMEOUT_S = 600
_CHAOS_TIMEOUT_S = 3600


class PatchError(ValueError):
    """A planted defect does not fit the source any more; the text says which and where."""


@dataclass(frozen=True)
class Planted:
    """One defect: its name, what it breaks, how it is found, and (file, old, new) texts."""

    name: str
    what: str
    found_by: str
    changes: tuple[tuple[str, str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Planted:
        """Parse a patch file. Raises PatchError when it is none."""
        head, mark, diff = path.read_text().partition("\n--- a/")
        what, found, how = head.partition("\nFound by:")
        if not mark or not found:
            raise PatchError(f"{path.name}: needs a line 'Found by: ...' and a unified diff")
        changes = []
        for part in ("--- a/" + diff).split("\n--- a/"):
            file = part.removeprefix("--- a/").partition("\n")[0].strip()
            for hunk in re.split(r"^@@.*@@.*\n", part, flags=re.MULTILINE)[1:]:
                lines = hunk.removesuffix("\n").split("\n")
                old = "".join(line[1:] + "\n" for line in lines if line[:1] in ("-", " ", ""))
                new = "".join(line[1:] + "\n" for line in lines if line[:1] in ("+", " ", ""))
                changes.append((file, old, new))
        return cls(path.stem, " ".join(what.split()), how.strip(), tuple(changes))

    def apply(self, root: Path) -> None:
        """Change the files below `root`. Raises PatchError unless each hunk fits exactly once."""
        for file, old, new in self.changes:
            path = root / file
            text = path.read_text()
            if text.count(old) != 1:
                raise PatchError(
                    f"{self.name}: a hunk fits {text.count(old)} places of {file}, not one; "
                    "bring the patch up to date"
                )
            path.write_text(text.replace(old, new))

    def take_back(self, root: Path) -> None:
        """Restore the files, with their times, so that nothing compiled before is lost."""
        for file, _, _ in self.changes:
            shutil.copy2(ROOT / file, root / file)


@dataclass(frozen=True)
class Finding:
    """Whether a defect was found, after how many seeds (0: by a test), and what told."""

    planted: Planted
    found: bool
    seeds: int
    how: str
    elapsed_s: float

    def row(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "name": self.planted.name,
            "what": self.planted.what,
            "found": self.found,
            "seeds_to_detect": self.seeds,
            "how": self.how,
            "elapsed_s": round(self.elapsed_s, 1),
        }


def all_planted(directory: Path = PATCHES) -> list[Planted]:
    """Every defect of the directory, by name."""
    return [Planted.read(path) for path in sorted(directory.glob("*.patch"))]


def copy_tree(target: Path) -> None:
    """A copy of what is needed to run and test, without what was compiled."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp")
            )
        else:
            shutil.copy2(source, target / name)


def seek(planted: Planted, tree: Path, seeds: int = SEEDS_MOST, first: int = 0) -> Finding:
    """Plant one defect in a copy of the tree, look for it (chaos: with so many seeds, from `first`
    on), and take it out again."""
    start = time.perf_counter()
    planted.apply(tree)
    try:
        if planted.found_by == "chaos":
            found, count, how = chaos_finds(tree, seeds, first)
        else:
            found, count, how = _by_test(tree, planted.found_by)
    finally:
        planted.take_back(tree)
    return Finding(planted, found, count, how, time.perf_counter() - start)


_RUNNING: set[subprocess.Popen[str]] = set()
"""Processes of this module's that have not ended; an interrupted hunt ends them."""


def _python(tree: Path, *arguments: str, timeout_s: float) -> tuple[int, str]:
    """Exit status and last words of `python ...` run in a tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    _RUNNING.add(process)
    try:
        told, _ = process.communicate(timeout=timeout_s)
    finally:
        process.terminate()
        process.wait()
        _RUNNING.discard(process)
    return process.returncode, told[-2000:]


def chaos_finds(tree: Path, seeds: int, first: int = 0) -> tuple[bool, int, str]:
    """(found, seeds, what) of a chaos run in a tree. Raises PatchError when it does not run."""
    figures = tree / "figures.json"
    figures.unlink(missing_ok=True)
    _, told = _python(
        tree, "-m", "scenarios.chaos", "--seeds", str(seeds), "--first", str(first),
        "--stop-at-first", "--processes", "1", "--json", str(figures), timeout_s=_CHAOS_TIMEOUT_S,
    )  # fmt: skip
    if not figures.exists():
        raise PatchError(f"the patched tree does not run: {told}")
    outcome = json.loads(figures.read_text())
    found = [entry["violation"] for entry in outcome["violation_list"]]
    return bool(found), outcome["seeds"], found[0] if found else "not found"


def _by_test(tree: Path, test: str) -> tuple[bool, int, str]:
    status, _ = _python(
        tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test, timeout_s=_TEST_TIMEOUT_S
    )
    # 1: a test failed. Anything else (no such test, a broken import) is no finding.
    return status == 1, 0, test


def hunt(json_path: Path | None, processes: int | None, names: Sequence[str] = ()) -> int:
    """Look for all defects (or those named) on all cores; returns the exit status.

    Raises PatchError for a name that no defect has.
    """
    known = all_planted()
    strange = sorted(set(names) - {p.name for p in known})
    if strange or not known:
        there = ", ".join(p.name for p in known) or f"none in {PATCHES}"
        raise PatchError(f"no planted defect {', '.join(strange)}; there are {there}")
    chosen = [p for p in known if not names or p.name in names]
    wanted = max(1, min(len(chosen), processes or core_count()))
    trees: queue.Queue[Path] = queue.Queue()

    def one(planted: Planted) -> Finding:
        tree = trees.get()
        try:
            return seek(planted, tree)
        finally:
            trees.put(tree)

    start = time.perf_counter()
    findings = []
    with tempfile.TemporaryDirectory(prefix="planted-") as scratch:
        for index in range(wanted):
            tree = Path(scratch) / f"tree{index}"
            tree.mkdir()
            copy_tree(tree)
            trees.put(tree)
        with (
            ThreadPoolExecutor(wanted) as pool,
            tqdm(total=len(chosen), desc="planted", unit="defect", dynamic_ncols=True) as bar,
        ):
            try:
                for finding in pool.map(one, chosen):
                    findings.append(finding)
                    bar.update()
                    with tqdm.external_write_mode():
                        print(_line(finding), flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_RUNNING):
                    process.terminate()
                raise
    by_seeds = [finding.seeds for finding in findings if finding.found and finding.seeds]
    missed = [finding.planted.name for finding in findings if not finding.found]
    middle = median(by_seeds) if by_seeds else 0
    print(
        f"{len(findings) - len(missed)} of {len(findings)} defects found"
        + (f"; missed: {', '.join(missed)}" if missed else "")
        + f"; median of {middle:g} seeds to find one by chaos"
    )
    figures = {
        "planted": [finding.row() for finding in findings],
        "median_seeds": middle,
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    record.write(json_path, figures)
    return int(bool(missed))


def _line(finding: Finding) -> str:
    seeds = f"{finding.seeds} seeds" if finding.seeds else "test"
    verdict = "found" if finding.found else "MISSED"
    return f"{verdict:6}  {finding.planted.name:28} {seeds:>10}  {finding.how[:90]}"
