"""The quickstart with its worker in another process, which dies twice while the line is cut twice.

Two undisturbed runs say how far two runs are apart by the cipher's noise alone; then one run during
which the worker is killed (kill -9) and started again twice, and the line is cut and heals twice,
at moments drawn from a seed. It has to come as close to the undisturbed ones as they are to each
other, but for a small factor.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scenarios.crashes import disk, plan
from scenarios.crashes.line import HOST, Line, free_port
from scenarios.crashes.training import KILLED, Failure
from scenarios.crashes.zygote import ROOT, Child, Cold, kill, wait

FACTOR = 2.0
"""So far may the disturbed run be from the undisturbed ones, in distances of those."""
_BASE = ROOT / "scenarios" / "assets" / "tiny-llama"
_POLL_S = 0.05
_STUCK_S = 600.0


@dataclass(frozen=True)
class Outcome:
    """A run at its end: where its adapter began and ended, float64[P]; losses in nats per token."""

    begin: NDArray[np.float64]
    end: NDArray[np.float64]
    losses: list[float]
    held_out: float
    seconds: float
    passed: int


class Run:
    """One quickstart: an owner, a worker, and a line between them, over TLS.

    worker  what more the worker's command is told
    """

    def __init__(
        self, place: Path, certificates: Path, cache: Path, steps: int, worker: Sequence[str] = ()
    ) -> None:
        self._place, self._certificates, self._cache = place, certificates, cache
        self._steps, self._cold, self._told = steps, Cold(), worker
        self._port = free_port()
        self.line = Line(self._port)
        place.mkdir(parents=True)
        self._worker = self.start_worker()
        self._owner: Child | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.line.close()
        for child in (self._owner, self._worker):
            if child is not None:
                kill(child)

    def start_worker(self) -> Child:
        """At the address it had before."""
        (model,) = (place for place in self._cache.iterdir() if (place / "manifest.json").exists())
        self._worker = self._cold.start(
            "scenarios.worker",
            ["--model", str(model), "--listen", f"{HOST}:{self._port}",
             "--tls", str(self._certificates / "worker"), "--verbose", *self._told],
            self._place / "worker.log",
        )  # fmt: skip
        return self._worker

    def kill_worker(self) -> None:
        """Raises Failure when it had ended by itself."""
        if kill(self._worker) != KILLED:
            raise Failure(f"the worker had ended by itself; see {self._place / 'worker.log'}")

    def go(self, disturb: Disturber) -> Outcome:
        """From start to end. Raises Failure when the owner gives up, or is stuck."""
        start = time.perf_counter()
        self._owner = self._cold.start(
            "scenarios.crashes.private_half",
            ["--out", str(self._place / "run"), "--cache", str(self._cache),
             "--steps", str(self._steps), "--worker", f"{HOST}:{self.line.port}",
             "--tls", str(self._certificates / "owner")],
            self._place / "owner.log",
        )  # fmt: skip
        seen, since = -1, time.monotonic()
        while (status := self._owner.poll()) is None:
            time.sleep(_POLL_S)
            disturb.look(self)
            if self.line.passed != seen:
                seen, since = self.line.passed, time.monotonic()
            elif time.monotonic() - since > _STUCK_S:
                raise Failure(f"nothing has passed for {_STUCK_S:.0f} s; see {self._place}")
        if status != 0:
            raise Failure(f"the owner ended with status {status}; see {self._place / 'owner.log'}")
        return self._outcome(time.perf_counter() - start)

    def _outcome(self, seconds: float) -> Outcome:
        run = self._place / "run"
        told = json.loads((run / "private.json").read_text())
        first = disk.kept(run / "checkpoints-private").get(0)
        if first is None:
            raise Failure(f"{run} has no checkpoint of step 0, from before any worker's answer")
        return Outcome(
            disk.adapter_of(first), disk.adapter_of(run / "adapter"), told["losses"],
            told["held_out_loss"], seconds, self.line.passed,
        )  # fmt: skip


class Disturber:
    """Two kills and two cuts, when so many bytes have passed; none for a seed of None.

    passed  bytes that pass in an undisturbed run
    """

    def __init__(self, seed: int | None = None, passed: int = 0) -> None:
        self.done: list[dict[str, Any]] = []
        self._due: list[tuple[float, str, float]] = []
        if seed is not None:
            draw = random.Random(f"quickstart {seed}")
            kinds = ["kill", "kill", *plan.CUTS]
            draw.shuffle(kinds)
            shares = plan.moments(seed, len(kinds))
            self._due = [
                (share, kind, draw.uniform(0.2, 3.0))
                for share, kind in zip(shares, kinds, strict=True)
            ]
        self._passed = passed

    def look(self, run: Run) -> None:
        """Do what is due by now."""
        if not self._due or run.line.passed < self._due[0][0] * self._passed:
            return
        share, kind, down_s = self._due.pop(0)
        if kind == "kill":
            run.kill_worker()
            time.sleep(down_s)
            run.start_worker()
        else:
            run.line.cut(kind)
            time.sleep(down_s)
            run.line.heal()
        self.done.append({"at": round(share, 3), "what": kind, "seconds": round(down_s, 2)})


def _apart(a: Outcome, b: Outcome) -> float:
    """How far two adapters are apart at the end, as a share of how far the first has moved."""
    return float(np.linalg.norm(a.end - b.end) / np.linalg.norm(a.end - a.begin))


def compare(undisturbed: list[Outcome], disturbed: Outcome) -> dict[str, Any]:
    """Distances of adapters and losses, between undisturbed runs and from them."""
    one, two = undisturbed
    noise = _apart(one, two)
    distance = float(np.mean([_apart(run, disturbed) for run in undisturbed]))

    def losses(a: Outcome, b: Outcome) -> float:
        return float(np.abs(np.subtract(a.losses, b.losses)).max())

    same_length = len({len(run.losses) for run in (one, two, disturbed)}) == 1
    return {
        "adapter_distance_undisturbed": noise,
        "adapter_distance_disturbed": distance,
        "ratio": distance / noise,
        "ratio_bar": FACTOR,
        "step_losses_differ_undisturbed": losses(one, two),
        "step_losses_differ_disturbed":
            max(losses(run, disturbed) for run in undisturbed) if same_length else None,
        "final_loss_undisturbed": [run.losses[-1] for run in undisturbed],
        "final_loss_disturbed": disturbed.losses[-1],
        "held_out_loss_undisturbed": [run.held_out for run in undisturbed],
        "held_out_loss_disturbed": disturbed.held_out,
        "seconds_undisturbed": [round(run.seconds, 1) for run in undisturbed],
        "seconds_disturbed": round(disturbed.seconds, 1),
        "same": same_length and distance <= FACTOR * noise,
    }  # fmt: skip


def prepare_base(place: Path) -> Path:
    """The cache with the quickstart's model, prepared. Raises Failure when that goes wrong."""
    cache, log = place / "cache", place / "prepare.log"
    place.mkdir(parents=True, exist_ok=True)
    child = Cold().start("scenarios.prepare", ["--weights", str(_BASE), "--cache", str(cache)], log)
    if wait(child, _STUCK_S) != 0:
        raise Failure(f"no model could be prepared; see {log}")
    return cache


def run(
    certificates: Path, place: Path, seed: int, steps: int
) -> tuple[dict[str, Any], str | None]:
    """The three runs: the figures, and one line about what was found, if anything."""
    cache = prepare_base(place)
    outcomes: list[Outcome] = []
    disturber = Disturber()
    with tqdm(total=3, unit="run", desc="quickstart") as bar:
        for name in ("undisturbed-1", "undisturbed-2", "disturbed"):
            bar.set_postfix_str(name)
            if name == "disturbed":
                disturber = Disturber(seed, outcomes[0].passed)
            with Run(place / name, certificates, cache, steps) as one:
                outcomes.append(one.go(disturber))
            bar.update()
    figures = {
        "steps": steps, "seed": seed, "disturbances": disturber.done,
        **compare(outcomes[:2], outcomes[2]),
    }  # fmt: skip
    whole = len(disturber.done) == 4 and len(outcomes[2].losses) == steps
    if not whole:
        return figures, f"{len(disturber.done)} of 4 disturbances came about"
    if not figures["same"]:
        return figures, f"the adapter is {figures['ratio']:.2f} times as far off as by noise alone"
    return figures, None
