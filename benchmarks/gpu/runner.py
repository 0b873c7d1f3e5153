"""Runs the parts, each in a process that is killed at its deadline, and gathers their figures.

This process never touches the GPU, so that nothing there can hang it; and whatever a part does to
its own process or its files, it only becomes that part's error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.files import write_json
from backends.he.cuda.tiling import SKIP_VARIABLE
from benchmarks.gpu.log import Log
from benchmarks.gpu.parts import Part
from benchmarks.gpu.supervisor import LATE
from benchmarks.gpu.task import Figures

ROOT = Path(__file__).resolve().parent.parent.parent
_GRACE_S = 5.0  # for the supervisor, which keeps the deadline, before it is killed itself
_RERUNS = 3  # of one part without a tiling more: each may take the whole deadline


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    figures   what it found; of one that failed, what it had kept until then, or None
    error     why it failed, with the end of what it said; empty when it did not
    warnings  of the backends
    blamed    the tiling that it names as what took the process with it, or nothing
    """

    figures: Any
    error: str
    warnings: tuple[str, ...]
    blamed: str = ""


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
    skipped = ",".join(name for name in (os.environ.get(SKIP_VARIABLE), *left_out) if name)
    task = {"preset": plan.preset, "quick": plan.quick, "deadline_s": deadline_s, "known": known}
    ends_s = time.monotonic() + deadline_s
    job = {"call": part.call, "task": task, "ends_s": ends_s, "runner": os.getpid()}
    try:
        with tempfile.TemporaryDirectory(prefix="part-", ignore_cleanup_errors=True) as place:
            write_json(Path(place) / "job.json", job)
            # Read through this handle, the log is there though the part removes its folder.
            with (Path(place) / "log.txt").open("w+b") as file:
                status = _run(Path(place), file.fileno(), skipped, ends_s)
                log = Log(file, (place, str(ROOT), sys.prefix, sys.base_prefix))
                return _outcome(Path(place), log, _reason(status, deadline_s), skipped)
    except OSError as error:  # its name of a file would be a path of this machine
        return Outcome(None, f"not run: {error.strerror or type(error).__name__}", ())


def _run(place: Path, log: int, skipped: str, ends_s: float) -> int | None:
    """The exit status of the part in `place`, None when even its supervisor had to be killed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.supervisor", str(place)], cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env=os.environ | {SKIP_VARIABLE: skipped},
        start_new_session=True,  # Ctrl-C is for this process to pass on
    )  # fmt: skip
    try:
        return child.wait(ends_s - time.monotonic() + _GRACE_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Have the supervisor kill the part; kill it when it does not: the part dies with it."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
        return
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1)


def _reason(status: int | None, deadline_s: float) -> str:
    """Why it failed, by its exit status; empty when it did not."""
    if status is None or status == LATE:
        return f"stopped after {deadline_s:.0f} s"
    if status < 0:
        with contextlib.suppress(ValueError):  # one without a name, as most real-time signals
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"
    return f"exit status {status}" if status else ""


def _outcome(place: Path, log: Log, reason: str, skipped: str) -> Outcome:
    """What a part left in its folder, whatever state that is in."""
    figures, broken = _figures(place / "figures.json")
    done = (place / "done").exists()
    if not reason and not done:
        reason = "its process ended with status 0 before it was done"
        reason += "; its figures are partial" if figures is not None else ""
    if broken or (done and not (place / "figures.json").exists()):
        reason = f"{reason or 'exit status 0'}; its figures are lost: {broken or 'no file'}"
    warnings: tuple[str, ...] = ()
    with contextlib.suppress(OSError):
        warnings = tuple((place / "warnings.txt").read_text(errors="replace").splitlines())
    if not reason:
        return Outcome(figures, "", warnings)
    return Outcome(figures, f"{reason}\n{log.tail()}".strip(), warnings, log.blamed(skipped))


def _figures(path: Path) -> tuple[Any, str]:
    """(figures, what is wrong with the file); a part that kept none has no file."""
    try:
        return json.loads(path.read_text(), parse_constant=_no_number), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        return None, said or type(error).__name__


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


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
    for _ in range(1 + _RERUNS):
        outcome = run_part(part, plan, figures, tuple(figures["left_out"]))
        if not outcome.blamed:
            return outcome
        figures["left_out"][outcome.blamed] = outcome.error
        print(f"  tiling {outcome.blamed} is left out from here on: it took {part.name} with it")
    first, _, rest = outcome.error.partition("\n")
    return replace(outcome, error=f"{first}; not run again after {_RERUNS} reruns\n{rest}")
