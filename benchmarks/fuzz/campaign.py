"""The whole of it: the machines in this process, then workers that listen, one attack at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.fuzz.attacks import PLAN, Attack, Target
from benchmarks.fuzz.inputs import stream
from benchmarks.fuzz.live import EVIL, MAX_TOKENS, Bounds, Child, Owner, Scene
from benchmarks.fuzz.verdict import Verdict

LIVE_SHARE = 0.04
"""Of all inputs, so many go over a real line; the others to the machines in this process."""


def attack_worker(
    scene: Scene, line: str, plan: Sequence[tuple[int, Attack]], seed: int, verdict: Verdict,
    log: Path, bounds: Bounds, patience_s: float, module: Sequence[str] = ("scenarios.worker",),
) -> dict[str, Any]:  # fmt: skip
    """Start a worker, attack it, and judge it; returns figures of this worker.

    line  "tls", or "plain", where all owners are one and share its few links
    plan  (inputs, attack)
    """
    catalogue = scene.model.catalogue()
    tls = line == "tls"
    with ExitStack() as stack:
        child = Child(scene, tls, log, module)
        stack.callback(child.end)
        child.wait_until_it_listens()
        good = Owner(scene, child.port, tls, verdict, bounds)
        good.start(newcomers=tls)
        stack.callback(good.stop)
        child.start_watching()

        def count(name: str, number: int) -> None:
            verdict.inputs[f"{line}: {name}"] += number

        target = Target(child.port, scene.certs if tls else None, catalogue, count, patience_s)
        spent = {}
        for number, attack in plan:
            start, seen = time.monotonic(), child.peak
            attack(target, stream(seed, f"{line}:{attack.__name__}"), number)
            if not child.alive():
                verdict.crash(f"the worker's process ended during {attack.__name__}")
                break
            spent[attack.__name__] = {
                "seconds": round(time.monotonic() - start, 1),
                "peak_growth_mb": round((child.peak - child.before) / 1e6, 1),
                "rose_here_mb": round((child.peak - seen) / 1e6, 1),
            }
        good.stop()
        if tls and child.alive():  # what the attackers held has been let go
            for name in (*EVIL, "newcomer"):
                good.comes(name)
        return _judge(child, good, verdict, bounds, catalogue.largest_frame(MAX_TOKENS), spent)


def _judge(
    child: Child, good: Owner, verdict: Verdict, bounds: Bounds, frame_max: int,
    spent: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    if "Traceback" in child.log() or "cannot go on" in child.log():
        verdict.crash(f"the worker's log has a stack trace: {child.log()[-600:]}")
    grown, allowed = child.peak - child.before, bounds.growth_bytes(frame_max)
    if grown > allowed:
        verdict.memory(
            f"the worker grew by {grown} bytes; at most {allowed} follow from its limits"
        )
    if not good.answers:
        verdict.hang("the good owner was never answered")
    return {
        "attacks": spent,
        "growth_bytes": grown,
        "growth_bytes_allowed": allowed,
        "good_answers": len(good.answers),
        "good_slowest_s": round(max(good.answers, default=0.0), 3),
        "newcomers": len(good.arrivals),
        "newcomer_slowest_s": round(max(good.arrivals, default=0.0), 3),
    }


def attack_lines(
    directory: Path, inputs: int, seed: int, verdict: Verdict, bounds: Bounds, patience_s: float,
    lines: Sequence[str] = ("plain", "tls"), only: Sequence[str] = (),
) -> None:  # fmt: skip
    """A worker in plain text, then one with TLS."""
    scene = Scene.make(directory)
    for line in lines:
        plan = [
            (max(1, int(share * inputs)), attack)
            for where, share, attack in PLAN
            if where == line and (not only or attack.__name__ in only)
        ]
        log = directory / f"worker-{line}.log"
        if plan:
            verdict.figures[line] = attack_worker(
                scene, line, plan, seed, verdict, log, bounds, patience_s
            )
