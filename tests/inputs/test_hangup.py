"""Terminals that are closed, jobs beside jobs, and saves at the same time."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from backends.files import replacing_directory
from backends.interrupts import leave_terminal
from backends.lock import HeldError
from backends.nn.trainer import TrainingInterrupted
from scenarios.finetune import __main__ as finetune
from scenarios.llama1b import __main__ as llama1b
from scenarios.quickstart import __main__ as quickstart
from scenarios.session import one_run
from tests.inputs.test_lives import CONFIG, Life


def hung_up(life: Life, numbers: tuple[int, ...], after: int) -> None:
    """Signals after a step."""

    def on_step(step: int, loss: float) -> None:
        if step == after:
            for number in numbers:
                os.kill(os.getpid(), number)

    life.trainer.train(on_step)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,), (signal.SIGHUP, signal.SIGHUP), (signal.SIGINT, signal.SIGHUP),
        (signal.SIGTERM,),
    ],
)  # fmt: skip
def test_a_closed_terminal_loses_no_step(
    tmp_path: Path, numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell and the system may both tell of it; the same command goes on from there."""
    monkeypatch.setattr("backends.nn.trainer.leave_terminal", lambda: None)
    life = Life(tmp_path)
    life.trainer._every = 25
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # however these tests were started
    try:
        with pytest.raises(TrainingInterrupted, match="stopped after step 2"):
            hung_up(life, numbers, 2)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert Life(tmp_path).trainer.progress.step == 2


def test_who_ignores_a_closed_terminal_goes_on(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        life = Life(tmp_path)
        hung_up(life, (signal.SIGHUP,), 1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert life.trainer.progress.step == CONFIG.steps


GONE = """
import os, sys, time
from backends.interrupts import leave_terminal
sys.stdin.readline()
for _ in range(500):
    try:
        os.write(1, b"x")
    except OSError:
        break
    time.sleep(0.01)
else:
    os._exit(3)
leave_terminal()
print("to nobody", flush=True)
os.write(2, b"kept")
"""


def test_what_is_printed_to_a_terminal_that_is_gone_goes_nowhere() -> None:
    """Or each print would raise, and the step that is being finished be lost; files stay."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", GONE], stdin=subprocess.PIPE, stdout=theirs,
        stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    _, said = process.communicate(b"go\n", timeout=30)
    assert (process.returncode, said) == (0, b"kept")
    assert callable(leave_terminal)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (llama1b, ["--real-cpu"]),
        (quickstart, []),
        (finetune, ["--model", "m", "--data", __file__]),
    ],
    ids=["llama1b", "quickstart", "finetune"],
)
@pytest.mark.parametrize("more", [["--fresh"], ["--seed", "5"], ["--fresh", "--seed", "5"]])
def test_a_job_beside_a_job_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: ModuleType, words: list[str],
    more: list[str],
) -> None:  # fmt: skip
    """Whoever starts over, or with another seed, in the directory of one that runs."""
    kept = tmp_path / "checkpoints" / "step-000009"
    with one_run(tmp_path):
        kept.mkdir(parents=True)
        monkeypatch.setattr(command, "clean_exit", lambda *errors: nullcontext())
        line = [command.__name__, *words, *more, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(HeldError, match="another --out"):
            command.main()
        assert kept.exists()


def in_threads(what: Callable[[int], None], count: int) -> list[BaseException]:
    """What came of it at the same time, so many times each."""
    errors: list[BaseException] = []

    def several(mine: int) -> None:
        for _ in range(20):
            try:
                what(mine)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=several, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("before", ["nothing", "a directory", "an empty one"])
def test_saves_at_the_same_time_are_all_whole(tmp_path: Path, before: str) -> None:
    """The last one stays; none raises, and nothing is left aside."""
    place = tmp_path / "adapter"
    if before != "nothing":
        place.mkdir()
    if before == "a directory":
        (place / "old").write_text("x")

    def save(mine: int) -> None:
        with replacing_directory(place) as aside:
            for name in ("one", "two"):
                (aside / name).write_text(str(mine))

    assert in_threads(save, 6) == []
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in place.iterdir()} == {"one", "two"}
    assert (place / "one").read_text() == (place / "two").read_text()
