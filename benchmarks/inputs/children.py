"""One case in a process of its own, forked from one that has imported everything, and its verdict.

passed     every check is behind, and only work was left
ended      the command did all of it
refused    it said what is wrong, in one line, with status 1 or 2
long       it was still at work when its time was over
traceback  an exception reached the user, or the process died of a signal
unsaid     it failed, and no line says why
hang       it waited for what never comes
silent     it would go on, or has ended well, with what can never be right
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from weakref import WeakSet

from tqdm import tqdm

from benchmarks.inputs.cases import Case
from benchmarks.inputs.entries import Passed, cut

BAD = ("traceback", "unsaid", "hang", "silent")
FINE = ("passed", "ended", "refused", "long")
_MEMORY_BYTES = 4 << 30
"""That a case may take beyond what was there before."""
_GLANCE_S = 1.0
_TOLD = 2000  # characters of what a case has printed, from its end
_TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    status  of the process; None where it was ended from outside
    text    the end of what it printed
    """

    case: Case
    kind: str
    status: int | None
    text: str
    seconds: float

    @property
    def cause(self) -> str:
        """One line that is the same for the same mistake: the last one it printed."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return (lines[-1] if lines else "nothing was said")[:200]


class Child:
    """A case under way.

    place  its working directory, made now and deleted at the end
    """

    def __init__(self, case: Case, pool: Path, place: Path) -> None:
        case.entry.load()
        self.case = case
        self._place, self._start = place, time.monotonic()
        self._seen = (self._start, -1.0)
        place.mkdir()
        (place / "mine").mkdir()
        words = [self._filled(word, pool) for word in case.words]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _live(case, words, place)

    def _filled(self, word: str, pool: Path) -> str:
        """A word with its folders in place; of what the case may change it gets a copy."""
        mine = self._place / "mine"
        if "{mine}/" in word:
            name = word.partition("{mine}/")[2].partition("/")[0]
            if (pool / "mine" / name).exists() and not (mine / name).exists():
                _copy(pool / "mine" / name, mine / name)
        return word.replace("{mine}", str(mine)).replace("{pool}", str(pool))

    def verdict(self, limit_s: float) -> Verdict | None:
        """What became of it; None while it is at work within its time."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return self._ended(os.waitstatus_to_exitcode(status))
        now = time.monotonic()
        if now - self._start < limit_s:
            return None
        # Out of time: what has used its processor since the last glance is at work.
        then, used_s = self._seen
        if used_s >= 0 and now - then < _GLANCE_S:
            return None
        self._seen = now, _processor_s(self.pid)
        if used_s < 0:
            return None
        self.end()
        return self._judged("long" if self._seen[1] > used_s else "hang", None)

    def end(self) -> None:
        """Kill it, and what it has started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _ended(self, status: int) -> Verdict:
        told = self._place / "verdict"
        how = told.read_text() if told.exists() else "died"
        if how == "exit":
            how = "ended" if status == 0 else "refused" if self._said(status) else "unsaid"
        if how == "died" or _TRACE in self._text():
            how = "traceback"
        return self._judged(how, status)

    def _judged(self, kind: str, status: int | None) -> Verdict:
        seconds, text = time.monotonic() - self._start, self._text()
        if kind in ("passed", "ended", "long") and self.case.nonsense:
            kind = "silent"
        shutil.rmtree(self._place, ignore_errors=True)
        return Verdict(self.case, kind, status, text[-_TOLD:], seconds)

    def _text(self) -> str:
        path = self._place / "said"
        return path.read_text(errors="backslashreplace") if path.exists() else ""

    def _said(self, status: int) -> bool:
        """Whether the last line says what is wrong."""
        lines = [line for line in self._text().splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if status == 2:
            return ": error: " in last
        return status == 1 and last.startswith("error: ")


def _copy(source: Path, target: Path) -> None:
    """Of a folder, or of what a link leads to; pipes are made anew."""

    def one(path: str, to: str) -> str:
        if Path(path).is_fifo():
            os.mkfifo(to)
        else:
            shutil.copy2(path, to)
        return to

    if source.is_dir():
        shutil.copytree(source, target, copy_function=one)
    else:
        one(str(source), str(target))


def _processor_s(pid: int) -> float:
    """Processor seconds of a process so far, of those it has waited for included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _live(case: Case, words: list[str], place: Path) -> NoReturn:
    """The child's whole life."""
    os.setsid()
    said = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    # As in an interpreter of its own, whoever has forked it.
    threading.excepthook, sys.excepthook = threading.__excepthook__, sys.__excepthook__
    faulthandler.disable()
    tqdm._instances = WeakSet()
    os.chdir(place / "mine")
    os.environ["TMPDIR"] = str(place)
    os.environ["COLUMNS"] = "100"
    bound = _address_space() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    how, status = "exit", 0
    try:
        sys.argv = [case.entry.name, *case.entry.words, *words]
        with cut(case.entry):
            case.entry.main()()
    except Passed:
        how = "passed"
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:
        how, status = "traceback", 1
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        (place / "verdict").write_text(how)
    finally:
        os._exit(status)


def _status(code: object) -> int:
    """As the interpreter does it."""
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def as_json(verdict: Verdict) -> dict[str, object]:
    """A finding, for the figures."""
    facts = {
        "number": verdict.case.number, "kind": verdict.kind, "command": str(verdict.case),
        "nonsense": verdict.case.nonsense, "status": verdict.status, "cause": verdict.cause,
        "said": verdict.text[-600:],
    }  # fmt: skip
    return json.loads(json.dumps(facts, default=str))
