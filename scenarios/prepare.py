"""Prepare a model, once, for private fine-tuning; or verify one that lies there.

    python -m scenarios.prepare                               the 1B shape, seeded random weights
    python -m scenarios.prepare --weights meta-llama/Llama-3.2-1B
    python -m scenarios.prepare --weights DIR_OR_HUB_ID --verify --json F
    python -m scenarios.prepare --weights DIR --preset paranoid --owner-tag "a text of your own"

Every scenario prepares what it needs by itself; this does that and nothing else, so that it can be
done before, elsewhere, or once for several people, who then point --cache at a copy. Give the same
--weights, --lm-head, --preset and --owner-tag as the run will have: they are the model's place in
the cache. Interrupting is safe: the same command goes on with the file after the last finished one.

What is made is public: int8 weights for workers; for owners scales, plans (how far inputs may be
scaled up before results could wrap) and hints (the weights times a public matrix). They are as good
as whoever made them. Wrong ones would turn answers into garbage or let results wrap, so a model
is verified when it has been made, and when one is found that you have not verified before: plans
are computed again, hints compared with the weights by a fresh random combination, which a wrong
hint survives with probability 1/q. The verdict is then kept under a key of yours in
$XDG_STATE_HOME/private-lora or ~/.local/state/private-lora, and later runs only compare digests.
--verify verifies in any case.

Expected for the 1B shape on two cores with AVX2: 4.1 GB on disk, made in under 4 minutes, verified
in under 15 seconds. Afterwards:

    python -m scenarios.llama1b --real-cpu --weights DIR_OR_HUB_ID --data DIR_OR_FILE

A worker on another machine needs a part of it, manifest.json and the folder worker/ (1 GB for the
1B); the end of the output says how to copy that, and --worker-part DIR puts it apart. The owner
needs all of it.
"""

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
from backends.options import ALL, SEED, Modes, Parser
from backends.places import replaced_directory
from backends.units import human_bytes
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.estimate import Shape
from scenarios.options import add_model_options
from scenarios.preparation import (
    chosen_base,
    chosen_skeleton,
    prepared_for,
    settle_head,
)

_STEP = (256, 256, 4, 16)
"""Tokens, sequence, lanes and rank of the step that `--lm-head auto` takes for granted."""

MODES = Modes(
    {"random": "random weights (without --weights)"},
    lambda args: ("random",) if args.weights is None else (),
    {"--seed": ("random",)}
    | dict.fromkeys(
        (
            "--weights", "--lm-head", "--least-remote", "--preset", "--owner-tag", "--cache",
            "--verify",
            "--worker-part", "--kernel", "--json",
        ),
        ALL,
    ),
)  # fmt: skip


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


def main() -> None:
    parser = Parser(__doc__, "scenarios.prepare", MODES)
    add_model_options(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="seed of random weights (0)")
    parser.add_argument(
        "--verify", action="store_true", help="verify plans and hints, whatever was found before"
    )
    parser.add_argument(
        "--worker-part", type=replaced_directory, metavar="DIR",
        help="also put what a worker needs into DIR, for copying it to another machine",
    )  # fmt: skip
    add_kernel_option(parser)
    record.add_json_option(parser)
    args = parser.parse()
    with clean_exit():
        use_kernel(args.kernel)
        figures = run(args)
        print_report(figures, args.worker_part)
        record.write(args.json, figures)


if __name__ == "__main__":
    main()
