"""Preparing a model, or opening a prepared one, and what is said of it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from backends.hardware import CPU
from backends.he.manifest import NAME, PreparationError
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import preset
from backends.he.store import PreparedModel, copy_worker_part
from backends.units import human_bytes
from scenarios import record
from scenarios.estimate import Shape
from scenarios.preparation import (
    chosen_base,
    chosen_skeleton,
    prepared_for,
    settle_head,
)

_STEP = (256, 256, 4, 16)
"""Tokens, sequence, lanes and rank of the step that `--lm-head auto` takes for granted."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare or open, verify if asked; returns the figures."""
    if args.worker_part is not None:
        _require_free(args.worker_part, args.cache)
    base = chosen_base(args)
    settle_head(args, Shape(base.config, *_STEP, args.preset), base, CPU, here=False)
    skeleton = chosen_skeleton(args, base)
    prepared, seconds = prepared_for(
        skeleton, preset(args.preset), args.cache,
        owner_tag=args.owner_tag, anew=args.verify,
    )  # fmt: skip
    verify_s = prepared.verification_s
    if args.worker_part is not None:
        copy_worker_part(prepared.directory, args.worker_part)
    return {
        "weights": base.describe(),
        "kernel": chosen_kernel().name,
        "preset": args.preset,
        "owner_tag": args.owner_tag.decode(errors="backslashreplace"),
        "lm_head": args.lm_head,
        "directory": str(prepared.directory),
        "model_digest": prepared.model_digest.hex(),
        "setup_digest": prepared.setup_digest.hex(),
        "groups": len(prepared.groups),
        "hint_rows": sum(g.total_out + g.in_features for g in prepared.groups),
        **sizes(prepared),
        "prepare_s": seconds - verify_s,
        "verify_s": verify_s if verify_s else None,
        "peak_rss_mb": record.peak_rss_mb(),
    }


def _require_free(part: Path, cache: Path) -> None:
    """Raise PreparationError where a worker's part cannot go, before anything is prepared."""
    if part.resolve().is_relative_to(cache.resolve()):
        raise PreparationError("--worker-part is a place of its own, outside the cache")
    if part.exists() and any(part.iterdir()) and not (part / NAME).is_file():
        raise PreparationError(
            f"{part} is there already, and is no worker's part; choose another name, or delete it"
        )


def sizes(prepared: PreparedModel) -> dict[str, int]:
    """Bytes of the arrays, by kind."""
    stored = [s for group in prepared.stored for s in group]
    hints = sum(s.values.nbytes for s in stored if s.kind in ("forward", "backward"))
    weights = sum(s.values.nbytes for s in stored if s.kind == "weight")
    total = sum(s.values.nbytes for s in stored)
    return {"weight_bytes": weights, "hint_bytes": hints, "total_bytes": total}


def print_report(f: dict[str, Any], part: Path | None) -> None:
    """What a person wants to know of it."""
    print(f"\n{f['weights']}, {f['groups']} groups of linears, {f['hint_rows']:,} rows of hints")
    print(f"prepared or found in   {f['prepare_s']:8.1f} s")
    verified = f"{f['verify_s']:8.1f} s" if f["verify_s"] else "     not necessary"
    print(f"verified in            {verified}")
    print(f"int8 weights           {human_bytes(f['weight_bytes']):>10}  for workers")
    print(f"hints                  {human_bytes(f['hint_bytes']):>10}  for owners")
    print(f"model digest           {f['model_digest']}")
    print(f"in                     {f['directory']}")
    print(worker_text(part or Path(f["directory"])))


def worker_text(directory: Path) -> str:
    """How to bring a worker its part of the model, from this directory."""
    name = shlex.quote(directory.name)
    parts = f"{name}/manifest.json {name}/worker"
    return f"""
The worker's part, for another machine (in place of gpu.example):
    cd {shlex.quote(str(directory.resolve().parent))}
    tar -c {parts} | ssh gpu.example tar -x
or, where it should go on after an interruption:
    rsync -aR --partial {parts} gpu.example:
and there:
    python -m scenarios.worker --model {name} --listen 0.0.0.0:7443 --tls certs/worker"""
