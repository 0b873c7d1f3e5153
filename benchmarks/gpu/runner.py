"""Runs the parts, each in a process that is killed at its deadline, and gathers their figures.

This process never touches the GPU, so that nothing there can hang it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.files import write_json
from backends.he.cuda.tiling import SKIP_VARIABLE
from benchmarks.gpu.parts import Part
from benchmarks.gpu.task import Figures

ROOT = Path(__file__).resolve().parent.parent.parent
_BLAMED = re.compile(rf"{SKIP_VARIABLE}=([\w-]+)")  # as the tuner's advice has it
_TAIL = 4000  # characters of what a part said that tell why it failed
_REAPING_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    figures   what it found; of one that failed, what it had kept until then, or None
    error     why it failed, with the end of what it said; empty when it did not
    warnings  of the backends
    """

    figures: Any
    error: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    preset   name of the cipher's parameters
    quick    the smaller scale and the shorter deadlines
    ends_s   on the monotonic clock: nothing runs after it
    """

    preset: str
    quick: bool
    ends_s: float = float("inf")

    def deadline_s(self, part: Part) -> float:
        """Seconds that a part which starts now may take."""
        own = part.quick_s if self.quick and part.quick_s is not None else part.deadline_s
        return min(own, self.ends_s - time.monotonic())


def run_part(part: Part, plan: Plan, known: Figures, left_out: Sequence[str] = ()) -> Outcome:
    """One part in a process of its own, without the tilings named in `left_out`."""
    deadline_s = plan.deadline_s(part)
    if deadline_s < 1:
        return Outcome(None, "not started: the time for the whole run is over", ())
    skipped = [name for name in (os.environ.get(SKIP_VARIABLE), *left_out) if name]
    job = {"call": part.call, "preset": plan.preset, "quick": plan.quick, "known": known}
    with tempfile.TemporaryDirectory(prefix="part-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        write_json(folder / "job.json", job | {"deadline_s": deadline_s})
        with (folder / "log.txt").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.child", place], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {SKIP_VARIABLE: ",".join(skipped)},
                start_new_session=True,  # so that what it starts can be killed with it
            )  # fmt: skip
            status = _ended(child, deadline_s)
        said = (folder / "log.txt").read_text(errors="replace")
        for root in (str(ROOT), sys.prefix, sys.base_prefix):  # figures hold no path of a machine
            said = said.replace(root, "")
        warnings = folder / "warnings.txt"
        figures = folder / "figures.json"
        return Outcome(
            json.loads(figures.read_text()) if figures.exists() else None,
            "" if status == 0 else f"{_reason(status, deadline_s)}\n{said[-_TAIL:]}".strip(),
            tuple(warnings.read_text().splitlines()) if warnings.exists() else (),
        )


def _ended(child: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    """Its exit status, None when it had to be stopped; nothing of its group is left."""
    try:
        return child.wait(deadline_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # One that the driver does not let go of is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_REAPING_S)


def _reason(status: int | None, deadline_s: float) -> str:
    if status is None:
        return f"stopped after {deadline_s:.0f} s"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def measure(
    gpu: str, parts: Sequence[Part], plan: Plan, save: Callable[[Figures], None],
    known: Figures | None = None,
) -> Figures:  # fmt: skip
    """Run parts in order; one that fails is recorded with its error, and the others run.

    gpu    its name
    known  figures of other parts, from an earlier run of the same commit
    """
    figures: Figures = {
        "gpu": gpu, "preset": plan.preset, "failed": {}, "warnings": {}, "left_out": {},
        "seconds": {}, "quick": [],
    } | (known or {})  # fmt: skip
    for part in parts:
        print(f"{part.name} ...", flush=True)
        start_s = time.monotonic()
        for notes in ("failed", "warnings"):
            figures[notes].pop(part.name, None)
        outcome = _attempted(part, plan, figures)
        figures.pop(part.name, None)
        if outcome.figures is not None:
            figures[part.name] = outcome.figures
        if outcome.warnings:
            figures["warnings"][part.name] = list(outcome.warnings)
        if outcome.error:
            figures["failed"][part.name] = outcome.error
            print(f"  failed: {outcome.error.splitlines()[0]}", flush=True)
        figures["seconds"][part.name] = round(time.monotonic() - start_s, 1)
        quick = set(figures["quick"]) - {part.name} | ({part.name} if plan.quick else set())
        figures["quick"] = sorted(quick)
        save(figures)
    return figures


def _attempted(part: Part, plan: Plan, figures: Figures) -> Outcome:
    """A part that ends with a tiling to blame is run again without it, and so are all after it."""
    while True:
        outcome = run_part(part, plan, figures, tuple(figures["left_out"]))
        blamed = _BLAMED.search(outcome.error)
        if blamed is None or blamed[1] in figures["left_out"]:
            return outcome
        figures["left_out"][blamed[1]] = outcome.error
        print(f"  tiling {blamed[1]} is left out from here on: it took {part.name} with it")
