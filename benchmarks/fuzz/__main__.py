"""Does a worker survive whoever talks to it, and does an owner?

    python -m benchmarks.fuzz --inputs 1000000 --json FILE     ten minutes on two idle cores

Hostile input, drawn from `--seed`: same seed, same inputs. Most of it goes to the frame decoder and
to both machines in this process. The rest (4 %) goes to `python -m scenarios.worker`, in a process
of its own: frames in any order, broken, cut at every point, replayed, announced too large; floods;
answers that nobody reads; sessions dropped by the hundred; links of one half or of two owners;
connections that hardly speak; certificates that are missing, foreign, expired, a worker's; TLS 1.2.
Beside all that one owner trains on, and another connects anew all the time.

Counted, and expected to be 0:
  crashes            a process ended, a machine raised, the decoder raised anything but
                     ProtocolError or took what no encoder makes, or a stack trace is in the
                     worker's log
  hangs              a good owner did not get its right answer within the bound (30 s, connecting
                     included)
  memory_over_bound  the worker grew by more than follows from its limits; both figures are in the
                     file

    python -m benchmarks.fuzz --inputs 20000 --only halves oversize     some attacks, live only
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from backends.options import SEED, Parser, Whole
from benchmarks.fuzz.attacks import PLAN
from benchmarks.fuzz.campaign import LIVE_SHARE, attack_lines
from benchmarks.fuzz.live import Bounds
from benchmarks.fuzz.machines import throw_at_machines
from benchmarks.fuzz.verdict import Verdict
from scenarios import record
from scenarios.cli import clean_exit

_PATIENCE_S = 45.0
"""Of attacks that work by waiting: longer than a good owner may have to wait."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.fuzz")
    add = parser.add_argument
    add("--inputs", type=Whole(), default=100_000, metavar="N", help="how many (100000)")
    add("--seed", type=SEED, default=0, metavar="S", help="what they are drawn from (0)")
    add("--only", nargs="+", default=[], metavar="ATTACK",
        choices=sorted({attack.__name__ for _, _, attack in PLAN}),
        help="only these, on the live worker, each with its usual share of the inputs")  # fmt: skip
    record.add_json_option(parser)
    return parser.parse(arguments)


def run(args: argparse.Namespace) -> Verdict:
    """All inputs; the verdict."""
    verdict, start = Verdict(), time.monotonic()
    live = int(args.inputs * LIVE_SHARE)
    if not args.only:
        throw_at_machines(args.seed, args.inputs - live, verdict)
        verdict.figures["in_process_seconds"] = round(time.monotonic() - start, 1)
        print(
            f"in process: {verdict.inputs.total():,} inputs, {dict(verdict.found) or 'no finding'}"
        )
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        attack_lines(
            Path(directory),
            live,
            args.seed,
            verdict,
            Bounds(),
            patience_s=_PATIENCE_S,
            only=args.only,
        )
    verdict.figures["seed"] = args.seed
    verdict.figures["seconds"] = round(time.monotonic() - start, 1)
    return verdict


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with clean_exit():
        verdict = run(args)
    figures = verdict.as_json()
    for line in ("plain", "tls"):
        for name, spent in figures.get(line, {}).get("attacks", {}).items():
            print(f"{line:5} {name:24} {spent}")
    for what in verdict.told:
        print(f"FOUND {what}")
    print(
        ", ".join(
            f"{figures[k]:,} {k}" for k in ("inputs", "crashes", "hangs", "memory_over_bound")
        )
    )
    record.write(args.json, figures)
    sys.exit(0 if verdict.clean else 1)


if __name__ == "__main__":
    main()
