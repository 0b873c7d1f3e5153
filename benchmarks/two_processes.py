"""A step of the 1B with its worker in another process, beside the same in one process and in clear.

The measurements of `python -m benchmarks.transport --llama1b`; see there. Every run is a process
as a user starts it, one after another, in turns; this one only watches them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load.live import live_worker, own_bytes
from scenarios.certs import Authority
from scenarios.clear_peer import ClearPeer

_WATCHED_S = 0.05


@dataclass(frozen=True)
class Size:
    """What a step is made of.

    tokens  of one lane's micro-batch
    rounds  runs of each kind
    head    local or remote, in clear too: what is compared has the same memory of its own for it
    cache   of prepared models; None is the usual one
    kinds   what is run: in one process, in two, in clear
    """

    steps: int = 3
    tokens: int = 64
    lanes: int = 4
    rounds: int = 2
    head: str = "local"
    preset: str = "thin"
    cache: Path | None = None
    kinds: tuple[str, ...] = ("one", "two", "clear")

    def options(self, lanes: int, tokens: int) -> list[str]:
        """For `scenarios.llama1b`."""
        told = {"steps": self.steps, "tokens": tokens, "sequence": self.tokens, "lanes": lanes}
        return [*_words(told), *self.model_options()]

    def model_options(self) -> list[str]:
        """For `scenarios.prepare`, too."""
        cache = {} if self.cache is None else {"cache": self.cache}
        return _words({"lm-head": self.head, "preset": self.preset, **cache})


def _words(told: dict[str, Any]) -> list[str]:
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


class Watch:
    """The largest private memory of a process, in bytes, as long as it lives: see `own_bytes`."""

    def __init__(self, pid: int) -> None:
        self.most = 0
        self._pid = pid
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            try:
                now = own_bytes(self._pid)
            except OSError:
                return
            if not now:
                return
            self.most = max(self.most, now)
            time.sleep(_WATCHED_S)


def private_run(size: Size, place: Path, more: list[str]) -> dict[str, Any]:
    """One private run; its figures, and its own peak memory."""
    figures = place / "figures.json"
    command = [sys.executable, "-m", "scenarios.llama1b", "--real-cpu"]
    command += size.options(size.lanes, size.tokens)
    command += ["--out", str(place / "out"), "--fresh", "--json", str(figures), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watch = Watch(process.pid)
    if process.wait() != 0:
        raise RuntimeError("a private run ended early; see its messages above")
    found: dict[str, Any] = json.loads(figures.read_text())
    return found | {"own_bytes": watch.most}


def _clear(size: Size) -> dict[str, Any]:
    """The same training in clear fp32: a micro-batch of all lanes' tokens."""
    peer = ClearPeer(["--real-cpu", *size.options(1, size.lanes * size.tokens)], "fp32")
    watch = Watch(peer.pid)
    steps = [peer.step() for _ in range(size.steps)]
    peer.close()
    return {
        "step_s": [step.seconds for step in steps],
        "cpu_s": median(step.cpu_s for step in steps),
        "own_bytes": watch.most,
    }


@contextmanager
def worker_at(model: Path, certs: Path, more: Sequence[str] = ()) -> Iterator[str]:
    """A worker in a process of its own, whose command is told `more`; where it is."""
    with live_worker(model, certs / "worker", more=more) as worker:
        yield worker.address


def prepared(size: Size, place: Path, more: Sequence[str] = ()) -> Path:
    """The model, prepared; where. more: for `scenarios.prepare`."""
    figures = place / "prepared.json"
    command = [sys.executable, "-m", "scenarios.prepare", "--json", str(figures)]
    subprocess.run([*command, *size.model_options(), *more], check=True)
    return Path(json.loads(figures.read_text())["directory"])


def measure(size: Size) -> dict[str, Any]:
    """Runs of the wanted kinds in turn; medians over steps and rounds.

    A private run's first step is not counted: it maps the hints.
    """
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in size.kinds}
    with tempfile.TemporaryDirectory(prefix="transport-") as directory:
        place = Path(directory)
        authority = Authority()
        authority.issue(place / "owner")
        authority.issue(place / "worker", ["localhost"])
        model = prepared(size, place)
        for turn in range(size.rounds):
            print(f"round {turn + 1} of {size.rounds}", flush=True)
            if "one" in runs:
                runs["one"].append(private_run(size, place, []))
            if "two" in runs:
                with worker_at(model, place) as address:
                    more = ["--worker", address, "--tls", str(place / "owner")]
                    runs["two"].append(private_run(size, place, more))
            if "clear" in runs:
                runs["clear"].append(_clear(size))
    return _summary(size, runs)


def _summary(size: Size, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def steps(kind: str) -> list[float]:
        key = "step_s" if kind == "clear" else "private_steps_s"
        return [s for run in runs[kind] for s in run[key][1:]]

    def of(kind: str, key: str) -> float:
        return median(run[key] for run in runs[kind])

    tokens = size.lanes * size.tokens
    names = {"one": "one_process", "two": "two_processes", "clear": "clear"}
    found: dict[str, Any] = {
        "tokens_per_step": tokens,
        "lanes": size.lanes,
        "head": size.head,
        "preset": size.preset,
        "cores": os.cpu_count(),
    }
    found |= {f"{names[kind]}_steps_s": steps(kind) for kind in runs}
    if {"one", "two"} <= runs.keys():
        found["step_ratio"] = median(steps("two")) / median(steps("one"))
    if {"two", "clear"} <= runs.keys():
        found |= {
            "owner_cpu_ms_per_token": 1e3 * of("two", "cpu_s") / tokens,
            "clear_cpu_ms_per_token": 1e3 * of("clear", "cpu_s") / tokens,
            "owner_cpu_ratio": of("two", "cpu_s") / of("clear", "cpu_s"),
            "owner_own_mb": of("two", "own_bytes") / 1e6,
            "clear_own_mb": of("clear", "own_bytes") / 1e6,
            "owner_rss_ratio": of("two", "own_bytes") / of("clear", "own_bytes"),
        }
    return found
