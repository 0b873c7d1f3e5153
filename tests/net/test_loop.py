"""The loop of a machine on the real clock: where tasks run."""

from __future__ import annotations

import threading
import time

import pytest

from backends.net.loop import MachineLoop
from protocol.events import Effect, Encrypt, Event, RunTask, Start, Task

PATIENT_S = 30.0


class Asks:
    """A machine that asks for so many tasks at once."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Nothing after the first event."""
        count, self._tasks = self._tasks, 0
        return [RunTask(task, Encrypt(0, 1, None)) for task in range(count)]


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_small_tasks_of_one_thread_never_run_at_once(tasks: int) -> None:
    """One alone runs on the loop's own thread; of several each on the pool's."""
    running, most, where = 0, 0, list[str]()
    over = threading.Semaphore(0)

    def compute(work: Task) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        where.append(threading.current_thread().name)
        time.sleep(0.02)
        running -= 1
        over.release()

    loop = MachineLoop(
        "m", Asks(tasks), compute, lambda peer, frame: None, lambda effect: None,
        lambda error: None, small=lambda work: True,
    )  # fmt: skip
    loop.start()
    loop.post(Start())
    for _ in range(tasks):
        assert over.acquire(timeout=PATIENT_S)
    loop.stop()
    assert most == 1
    assert all(("loop" in name) == (tasks == 1) for name in where)
