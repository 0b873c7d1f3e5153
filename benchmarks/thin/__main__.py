"""What thin ciphertexts cost: bytes, accuracy, wraps, and the owner's share of the work.

    python -m benchmarks.thin --json F                    all parts that need no checkpoint
    python -m benchmarks.thin --part traffic --part head  these alone
    python -m benchmarks.thin --gemma DIR --json F        and a real model, from its directory

    traffic     bytes a token of Llama-3.2-1B's shape, forward and backward, its head local
    quickstart  the quickstart's fine-tuning, private against clear: losses, gradients, wraps
    gemma       the same of a checkpoint on Python's documentation, 60 steps of 512 tokens
    gemma-chat  of questions and answers made of it, 60 steps of 512 tokens
    head        a remote head of the 1B's shape: error of its input's gradient
    outliers    adapters' gradients where eight channels are 300 times the rest
    owner       the owner's processor time and own memory, head remote, against clear fp32

Wraps are counted against the truth: beside every answer the product is computed in clear, from the
same int8 weights. With --json figures are written after every part and every run, and those of the
same commit and preset that are there are kept: an interrupted run goes on. On two cores all of it
takes about an hour, the checkpoint another one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backends.files import read_bounded
from backends.he.params import PRESETS, preset
from backends.machine import commit
from backends.options import STEPS, TIMES, Parser, Whole, place
from benchmarks import two_processes
from benchmarks.thin import head, outliers, training
from scenarios import record
from scenarios.cli import clean_exit, use_kernel
from scenarios.options import add_cache_option
from sim.models import model_config
from sim.workload import trace_step

PARTS = ("traffic", "quickstart", "gemma", "gemma-chat", "head", "outliers", "owner")
TRAINED = ("quickstart", "gemma", "gemma-chat")
MODEL = "llama-3.2-1b"
GEMMA_STEPS = 60
_OF_GEMMA = frozenset(("gemma", "gemma-chat"))
OWNER_TOKENS = 256  # of a micro-batch, as `scenarios.llama1b` has them
_FIGURES_MAX = 1 << 24


def traffic(name: str) -> dict[str, Any]:
    """From the formats that the planner gives to weights of which only the shapes are known."""
    step = trace_step(model_config(MODEL), 64, preset=name)
    up, down = (total / step.tokens for total in (step.up_bytes, step.down_bytes))
    return {"bytes_per_token_up": up, "bytes_per_token_down": down}


def owner(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the 1B's shape, the worker in a process of its own; in clear as many tokens each."""
    size = two_processes.Size(
        tokens=OWNER_TOKENS, lanes=args.lanes, rounds=2, head="remote", preset=args.preset,
        cache=args.cache, kinds=("two", "clear"),
    )  # fmt: skip
    found = two_processes.measure(size)
    return {key: found[key] for key in ("owner_cpu_ratio", "owner_rss_ratio")} | {"owner": found}


def measure(figures: dict[str, Any], part: str, args: argparse.Namespace) -> None:
    """One part, into the figures; written whenever there is something new."""
    parameters = preset(args.preset)
    if part == "traffic":
        figures |= traffic(args.preset)
        total = figures["bytes_per_token_up"] + figures["bytes_per_token_down"]
        print(f"traffic of {MODEL}, head local: {total / 1e6:.2f} MB a token")
    elif part in TRAINED:
        train(figures, part, args)
    elif part == "head":
        made = head.peaked(head.VOCABULARY, head.HIDDEN, head.TOKENS)
        found = {"llama": head.measure(*made, parameters, args.cache)}
        del made
        if args.gemma is not None:
            real = head.of_checkpoint(args.gemma, head.TOKENS)
            found["gemma"] = head.measure(*real, parameters, args.cache)
        figures |= {"head_gradient_error": found["llama"]["gradient_error"], "head": found}
        for name, each in found.items():
            print(
                f"remote head ({name}): gradient off by {each['gradient_error']:.2%}, "
                f"logits by {each['logits_error']:.2%}"
            )
    elif part == "outliers":
        text = training.quickstart_task(1).train
        batches = text[: 4 * (outliers.WARM_UP + 1)].reshape(-1, 4, text.shape[1])
        names = tuple(dict.fromkeys((args.preset, "exact")))
        found = outliers.measure(outliers.quickstart_model, batches, names, args.cache)
        figures["outliers"] = found
        told = ", ".join(f"{name} {found[name]:.2%}" for name in names)
        print(
            f"gradients off with outliers, after {outliers.WARM_UP} passes to learn gains: {told}"
        )
    else:
        figures |= owner(args)
        print(
            f"owner against clear: {figures['owner_cpu_ratio']:.2f} of its processor time, "
            f"{figures['owner_rss_ratio']:.2f} of its own memory"
        )


def train(figures: dict[str, Any], part: str, args: argparse.Namespace) -> None:
    """The runs of a model that are not there yet."""
    seeds, steps = (args.seeds, args.steps) if part == "quickstart" else (1, args.gemma_steps)
    seeds_left = training.missing(figures["runs"], part, steps, seeds)
    if not seeds_left:
        return
    if part == "quickstart":
        task = training.quickstart_task(steps)
    elif part == "gemma":
        task = training.gemma_task(args.gemma, steps)
    else:
        task = training.chat_task(args.gemma, steps)
    for seed in seeds_left:
        figures["runs"].append(training.run(task, seed, preset(args.preset), args.cache))
        print(training.line(figures["runs"][-1]), flush=True)
        keep(args.json, figures)


def kept(path: Path | None, name: str) -> dict[str, Any]:
    """What an earlier call with the same code and preset has found, or nothing yet."""
    nothing: dict[str, Any] = {"preset": name, "parts": [], "runs": []}
    if path is None or not path.is_file():
        return nothing
    try:
        found = json.loads(read_bounded(path, _FIGURES_MAX))
        origin = found.pop("origin")["commit"]
    except (ValueError, KeyError, TypeError):
        return nothing
    same = origin == commit() and found.get("preset") == name
    return found if same and {"parts", "runs"} <= found.keys() else nothing


def keep(path: Path | None, figures: dict[str, Any]) -> None:
    """Write what there is so far."""
    if path is not None:
        record.save(path, figures)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.thin")
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="only these (several times)")
    add("--preset", default="thin", choices=sorted(PRESETS), help="cipher parameters (thin)")
    add("--steps", type=STEPS, default=120, help="of the quickstart's runs (120)")
    add("--seeds", type=TIMES, default=3, help="runs of the quickstart (3)")
    add("--gemma", type=place, metavar="DIR", help="a checkpoint's directory, for real text")
    add("--gemma-steps", type=STEPS, default=GEMMA_STEPS, help=f"of its run ({GEMMA_STEPS})")
    add("--lanes", type=Whole(1, 4), default=1, choices=(1, 2, 4),
        help="the owner's micro-batches of 256 tokens in a step, all in flight (1)")  # fmt: skip
    add_cache_option(parser)
    record.add_json_option(parser)
    args = parser.parse(arguments)
    if args.part is None:
        args.part = [part for part in PARTS if part not in _OF_GEMMA or args.gemma is not None]
    if not _OF_GEMMA.isdisjoint(args.part) and args.gemma is None:
        parser.error("--part gemma and gemma-chat need --gemma DIR, a checkpoint's directory")
    return args


def main() -> None:
    args = parse()
    with clean_exit():
        torch.manual_seed(0)
        figures = kept(args.json, args.preset)
        figures["kernel"] = use_kernel(None).name
        for part in dict.fromkeys(args.part):
            if part in figures["parts"] and part not in TRAINED:
                print(f"{part}: kept, as this commit measured it")
                continue
            measure(figures, part, args)
            figures["parts"] = [*dict.fromkeys([*figures["parts"], part])]
            keep(args.json, figures)
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
