"""A worker as its operator runs it: a process, its log, its status pages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.scenarios.commands import ROOT

SLOW = """
import sys, time
import backends.serve as serve
import scenarios.worker.__main__ as worker
class Slow(serve.MlweWorker):
    def multiply_many(self, requests, matrix):
        time.sleep({seconds})
        return super().multiply_many(requests, matrix)
serve.MlweWorker = Slow
worker.main()
"""
"""The worker's command, every product of which takes a while."""


class WorkerProcess:
    """One that listens. log: its events so far, as its JSON log has them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.log: list[dict[str, Any]] = []
        listening = self.wait_for("listening")
        self.address = listening["address"].replace("127.0.0.1", "localhost")
        self.pages = f"http://{self.wait_for('loading')['metrics']}"

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first event of that name, from the log or still to come."""
        assert self._process.stdout is not None
        for known in self.log:
            if known["event"] == event:
                return known
        for line in self._process.stdout:
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == event:
                return self.log[-1]
        raise AssertionError(f"no {event}: {self.log} {self._process.communicate()}")

    def page(self, path: str) -> tuple[int, str]:
        """(status, text) of a status page."""
        try:
            with urllib.request.urlopen(self.pages + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels."""
        lines = self.page("/metrics")[1].splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("private_lora_worker_"): float(n) for name, n in samples}

    def wait_for_a_request(self) -> None:
        """Until it has taken one."""
        deadline = time.monotonic() + 30
        while not self.metrics()["requests_total"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Tell it to end."""
        self._process.send_signal(number)

    def ended(self, timeout_s: float = 30) -> int:
        """Its exit status, when it has ended; the log has all its events then."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        self.log += [json.loads(line) for line in self._process.stdout]
        return self._process.wait(max(0.0, deadline - time.monotonic()))


@contextmanager
def running(
    model: Path, *options: str, tls: Path | None = None, slow_s: float = 0
) -> Iterator[WorkerProcess]:
    """A worker of that model, killed at the end if it has not ended.

    slow_s  seconds more that every product takes
    """
    how = ["-c", SLOW.format(seconds=slow_s)] if slow_s else ["-m", "scenarios.worker"]
    process = subprocess.Popen(
        [
            sys.executable, *how, "--model", str(model), "--listen", "127.0.0.1:0", "--metrics",
            "0", "--log-format", "json", *(["--tls", str(tls)] if tls else []), *options,
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield WorkerProcess(process)
    finally:
        process.kill()
        process.communicate()
