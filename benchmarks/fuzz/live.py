"""A worker in a process of its own, an owner who trains on it, and one who comes anew all the time.

The worker is `python -m scenarios.worker` itself, on loopback, with TLS or in plain text.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.he.interface import Float32Array
from backends.he.manifest import GroupSpec
from backends.he.mlwe_owner import MlweOwner
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.net.listening import Limits
from backends.net.remote import connected
from backends.net.tls import Tls
from benchmarks.fuzz.verdict import Verdict, memory_bytes
from protocol.admission import Quota
from protocol.owner_memory import OwnerConfig
from scenarios.certs import Authority

MAX_TOKENS = 1024
EVIL = ("evil1", "evil2", "evil3")
"""Owners with good certificates and bad intentions."""
ROWS = 3
_READY_S = 120.0
_SAMPLE_S = 0.02
_PATIENT = OwnerConfig(
    hello_timeout_s=0.5, request_timeout_s=10, timeout_s_max=10, attempts_max=12, greetings_max=12
)


@dataclass(frozen=True)
class Bounds:
    """What is held against the worker.

    answer_s    seconds within which an owner whose link is open has its answer
    newcomer_s  the same for one who connects first, turned away or not
    growth      bytes, where not those that follow from the worker's limits
    """

    answer_s: float = 30.0
    newcomer_s: float = 30.0
    growth: int | None = None

    def growth_bytes(self, frame_max: int) -> int:
        """By how much the worker may grow over what it took before the attack.

        For each link that the owners here may have: a frame that arrives, `Quota.requests` in work,
        answers that wait to be read, and 1 MiB for two threads and two TLS connections. For all:
        1 MiB for each handshake under way, frames that wait to be handled, and 64 MiB of slack for
        allocators that keep what was freed.
        """
        if self.growth is not None:
            return self.growth
        limits, in_flight = Limits(), Quota().requests
        links = min(limits.links, limits.links_each * (len(EVIL) + 2))
        unsent = max(limits.unsent_bytes, 2 * frame_max)
        each = (1 + in_flight) * frame_max + unsent + (1 << 20)
        return links * each + (limits.opening << 20) + limits.unhandled_bytes + (64 << 20)


@dataclass(frozen=True)
class Scene:
    """A prepared model of one layer, and certificates of every sort."""

    model: PreparedModel
    certs: Path

    @classmethod
    def make(cls, directory: Path) -> Scene:
        """Below a directory."""
        weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
        groups = [GroupSpec("layer", ("layer",), 24, (40,))]
        model = prepare(
            directory / "model", groups, lambda m: weight, preset("exact"), lambda label, n: None
        )
        certs, ours = directory / "certs", Authority()
        ours.issue(certs / "worker", ["localhost", "127.0.0.1"])
        for owner in ("good", "newcomer", *EVIL):
            ours.issue(certs / owner)
        for kind, authority in (("foreign", Authority()), ("expired", Authority(-0.5))):
            authority.issue(certs / kind)
            (certs / kind / "ca.pem").write_bytes((certs / "good" / "ca.pem").read_bytes())
        return cls(model, certs)

    def expected(self, x: Float32Array) -> Float32Array:
        """What a good owner must get, but for the cipher's noise."""
        scale = self.model.owner_matrices()[0].out_scale
        product: Float32Array = (
            x @ (self.model.worker_weights()[0].astype(np.float32) * scale[:, None]).T
        )
        return product


class Child:
    """A worker's process and what is seen of it from outside.

    module  what to run; the tests run one with a fault
    """

    def __init__(
        self, scene: Scene, with_tls: bool, log: Path, module: Sequence[str] = ("scenarios.worker",)
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        arguments = ["--model", str(scene.model.directory), "--max-tokens", str(MAX_TOKENS),
                     "--listen", f"127.0.0.1:{self.port}"]  # fmt: skip
        if with_tls:
            arguments += ["--tls", str(scene.certs / "worker")]
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *module, *arguments], stdout=file, stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.peak = self.before = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def wait_until_it_listens(self) -> None:
        """Raises RuntimeError when it does not."""
        until = time.monotonic() + _READY_S
        while f"listening address=127.0.0.1:{self.port}" not in self.log():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the worker does not start: {self.log()[-1000:]}")
            time.sleep(0.05)

    def start_watching(self) -> None:
        """Memory counts from here on."""
        self.before = self.peak = memory_bytes(self._process.pid)
        self._thread.start()

    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            with suppress(OSError):
                self.peak = max(self.peak, memory_bytes(self._process.pid))

    def end(self) -> None:
        """Stop it."""
        self._over.set()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Owner:
    """A good owner; each use counts, and what takes too long or is wrong is a hang."""

    def __init__(
        self, scene: Scene, port: int, tls: bool, verdict: Verdict, bounds: Bounds
    ) -> None:
        self._scene, self._tls, self._verdict, self._bounds = scene, tls, verdict, bounds
        self._address = f"localhost:{port}" if tls else f"127.0.0.1:{port}"
        self.answers: list[float] = []
        self.arrivals: list[float] = []
        self._numbers = np.random.default_rng(0)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def connected(self, name: str) -> Iterator[Any]:
        """A fresh owner under a certificate."""
        cipher = MlweOwner(preset("exact"), self._scene.model.public_matrix())
        self._scene.model.guard(cipher)
        tls = Tls(self._scene.certs / name) if self._tls else None
        with connected(self._scene.model, cipher, [self._address], tls, _PATIENT) as client:
            yield client

    def asks(self, client: Any, who: str) -> None:
        """One product, compared."""
        x = self._numbers.standard_normal((ROWS, 24)).astype(np.float32)
        try:
            right = np.allclose(client.linear(0, x), self._scene.expected(x), rtol=1e-2, atol=1e-2)
        except Exception as error:
            self._verdict.hang(f"{who} got no answer: {type(error).__name__}: {error}"[:300])
            time.sleep(0.5)
            return
        if not right:
            self._verdict.hang(f"{who} got a wrong answer")

    def start(self, newcomers: bool) -> None:
        """Begin to ask, on threads."""
        with self.connected("good") as client:  # what is compiled first does not count
            self.asks(client, "the good owner, before the attack,")
        self._threads = [threading.Thread(target=self._stay, daemon=True)]
        if newcomers:
            self._threads.append(threading.Thread(target=self._come_and_go, daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """After a last question."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _stay(self) -> None:
        with self.connected("good") as client:
            while not self._stop.wait(0.02):
                self._timed(client, "the good owner", self.answers, self._bounds.answer_s)

    def _come_and_go(self) -> None:
        while not self._stop.wait(0.3):
            self.comes("newcomer")

    def comes(self, name: str) -> None:
        """Connect, ask, leave."""
        start = time.monotonic()
        with self.connected(name) as client:
            self._timed(client, name, self.arrivals, self._bounds.newcomer_s, start)

    def _timed(
        self, client: Any, who: str, into: list[float], bound_s: float, start: float = 0.0
    ) -> None:
        start = start or time.monotonic()
        self.asks(client, who)
        into.append(time.monotonic() - start)
        if into[-1] > bound_s:
            self._verdict.hang(f"{who} waited {into[-1]:.1f} s for an answer; bound {bound_s:g} s")
