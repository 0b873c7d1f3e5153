"""The processes of `benchmarks.load`: one worker as users start it, and some with owners."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GOODBYE_S = 30.0


@dataclass(frozen=True)
class LiveWorker:
    """A worker in a process of its own. address, metrics: where it listens, for whom."""

    pid: int
    address: str
    metrics: str

    def own_mb(self) -> float:
        """Its private memory now, in MB of 10^6 bytes; files that it has mapped do not count."""
        return own_bytes(self.pid) / 1e6

    def processor_s(self) -> float:
        """Processor time that it has used so far, in ticks of proc(5)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def count(self, name: str) -> float:
        """One of its counters."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
            text = page.read().decode()
        found = re.search(rf"^private_lora_worker_{name} (\S+)$", text, re.M)
        assert found is not None, name
        return float(found[1])


def own_bytes(pid: int) -> int:
    """A process's private memory now; 0 for one that has ended, and not been waited for.

    Of its own: what is mapped from files, as hints and int8 weights are, is the system's to keep
    or to drop. RssAnon and RssShmem of proc(5). Raises OSError when there is no such process.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M)))


@contextmanager
def live_worker(
    model: Path, certs: Path, core: int | None = None, more: Sequence[str] = ()
) -> Iterator[LiveWorker]:
    """`python -m scenarios.worker` over TLS on loopback, drained at the end.

    certs  its own
    core   that it stays on, if any
    more   for its command

    Raises RuntimeError when it does not start, or does not end as it should.
    """
    command = [*on_core(core), sys.executable, "-m", "scenarios.worker"]
    command += ["--model", str(model), "--listen", "localhost:0", "--tls", str(certs)]
    command += ["--metrics", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    metrics = address = ""
    for line in process.stdout:
        told = re.search(r" metrics=(\S+)", line)
        metrics = told[1] if told else metrics
        if found := re.search(r" listening address=(\S+:\d+)", line):
            address = found[1]
            break
    if not address:
        raise RuntimeError("the worker ended early; see its messages above")
    try:
        yield LiveWorker(process.pid, address, metrics)
    finally:
        process.stdout.close()
        process.terminate()
        if process.wait(_GOODBYE_S) != 0:
            raise RuntimeError(f"the worker ended with status {process.returncode}")


def on_core(core: int | None) -> list[str]:
    """What a command begins with to stay on a core; nothing for None."""
    return [] if core is None else ["taskset", "-c", str(core)]


class Group:
    """Some owners in one process, see `owners`; they begin when told to."""

    def __init__(
        self, place: Path, worker: str, names: Sequence[str], tokens: int, rounds: int,
        core: int | None = None,
    ) -> None:  # fmt: skip
        self.names = names
        command = [
            *on_core(core),
            sys.executable,
            "-m",
            "benchmarks.load.owners",
            str(place),
            worker,
        ]
        command += [str(tokens), str(rounds), *names]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ready(self) -> None:
        """Until all have been welcomed."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("owners ended early; see their messages above")

    def begin(self) -> None:
        """They ask from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """As a machine dies: no goodbye."""
        self._process.kill()
        self._process.communicate()

    def results(self) -> list[dict[str, Any]]:
        """How each went, once all have finished; those that did not tell have lost everything."""
        told, _ = self._process.communicate()
        found = [json.loads(line) for line in told.splitlines()]
        silent = set(self.names) - {one["name"] for one in found}
        nothing = {"right": 0, "wrong": 0, "lost": 1, "seconds": float("nan"), "rounds_s": []}
        return found + [{"name": name, **nothing} for name in sorted(silent)]
