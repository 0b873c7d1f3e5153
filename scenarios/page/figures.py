"""A page's content from the figures that scenarios record, whichever of them a run has."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from backends.he.params import Parameters
from backends.machine import commit, machine
from scenarios.page.content import Budget, Checks, Content, Curve, Part, Sample, Traffic
from scenarios.page.watch import Watch

_PARTS = (
    ("model", "owner: embeddings, attention, adapters, optimiser", "owner_model_s"),
    ("cipher", "owner: encrypt, decrypt and check", "owner_cipher_s"),
    ("wire", "wire: hand-over between threads", "wire_s"),
    ("worker", "worker: products on ciphertexts", "worker_s"),
)
_AWAY = ("wire", "waiting for the line and the worker", "wire_s")


def content_of(
    title: str,
    figures: Mapping[str, Any],
    parameters: Parameters,
    watch: Watch | None = None,
) -> Content:
    """From figures named as `scenarios.quickstart --json` has them; each of them may be missing.

    Samples are `figures["samples"]`: mappings with the keys prompt, base and tuned. Held-out losses
    between start and end are `figures["held_out"]`: pairs of steps done and the loss.
    """
    f = figures
    samples = [Sample(s["prompt"], s["base"], s["tuned"]) for s in f.get("samples", ())]
    parts = (*_PARTS[:2], _AWAY) if f.get("worker_elsewhere") else _PARTS
    return Content(
        title=title,
        steps=len(f.get("losses", ())),
        steps_here=f.get("steps_this_run"),
        base_loss=f.get("base_loss"),
        private_loss=f.get("private_loss"),
        clear_loss=f.get("clear_loss"),
        samples=samples,
        curves=_curves(f),
        parts=[Part(kind, name, f[key]) for kind, name, key in parts if f.get(key) is not None],
        private_s=f.get("private_s"),
        clear_s=f.get("clear_s"),
        spans=watch.spans() if watch else (),
        traffic=_traffic(f),
        parameters=parameters,
        request=watch.request if watch else None,
        checks=_checks(f),
        budget=Budget(f["dp_epsilon"], f["dp_delta"]) if f.get("dp_epsilon") is not None else None,
        environment=environment(f.get("kernel", "")),
    )


def _curves(f: Mapping[str, Any]) -> list[Curve]:
    found = []
    for name, losses, held_out in (
        ("private", f.get("losses"), f.get("private_loss")),
        ("clear", f.get("clear_losses"), f.get("clear_loss")),
    ):
        if losses is None:
            continue
        points = [(len(losses), held_out)] if held_out is not None else []
        if points and f.get("base_loss") is not None:
            points.insert(0, (0, f["base_loss"]))
        if name == "private" and f.get("held_out"):
            points = [(step, loss) for step, loss in f["held_out"]]
        found.append(Curve(name, losses, points))
    return found


def _traffic(f: Mapping[str, Any]) -> Traffic | None:
    """Of the steps that this process took: a resumed run has not seen the others."""
    tokens = f.get("tokens_this_run", 0)
    if not tokens:
        return None
    up, down = f["bytes_per_token_up"], f["bytes_per_token_down"]
    return Traffic(up * tokens, down * tokens, tokens)


def _checks(f: Mapping[str, Any]) -> Checks:
    products = f.get("products") or {}
    return Checks(
        answers=f.get("answers_checked") or None,
        caught=f.get("workers_caught"),
        blocks=f.get("blocks_encrypted") or None,
        median=products.get("median"),
        largest=products.get("largest"),
        where=products.get("where", ""),
        wraps=products.get("wraps"),
        gradient_ratio=f.get("gradient_norm_ratio"),
    )


def environment(kernel: str = "") -> dict[str, str]:
    """What the run ran on, in a reader's words. No host name, no user, no path."""
    found = machine()
    facts = {
        "processor": found["processor"],
        "cores, memory": f"{found['cores']} cores, {found['memory_gb']} GB",
        "GPU": found.get("gpu", ""),
        "integer kernel": kernel,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": found["python"],
        "torch": found["torch"],
    }
    for package in ("transformers", "peft", "numpy"):
        facts[package] = importlib.metadata.version(package)
    facts["commit"] = commit()
    return {name: str(value) for name, value in facts.items() if value}
