"""Is a model the same through our path as in clear, whatever it is and however it was saved?

    python -m benchmarks.zoo --json FILE            every causal-LM type of transformers
    python -m benchmarks.zoo --only llama gpt2      some
    python -m benchmarks.zoo --layouts              a few types in every layout that can be written

Each type is built tiny and random, with norms, biases and persistent buffers shaken, saved by
transformers, and compared: logits, and gradients of LoRA adapters, between transformers' own
reading of the checkpoint and our skeleton over plain float products (no cipher, no int8).

  exact       both within 2e-5, relative, in float32; where workers compute less than half of the
              frozen weights, a run refuses it all the same unless --least-remote says otherwise
  refused     a UserError of one line, before any text is read
  wrong       something else, and nothing said
  traceback   an error that is not the user's
  not built   transformers cannot make, save or run such a model here
  died        the child ran out of time or memory

Every one runs in a process of its own, at most two at a time. The exit status is 1 when any is
wrong, a traceback or died (with --layouts: when any is not what is expected).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import transformers
from transformers.utils import logging as quiet

from backends.defaults import LEAST_REMOTE
from backends.options import SECONDS, Parser
from benchmarks.zoo import layouts, types
from benchmarks.zoo.children import Limits, Row, each
from scenarios import record
from scenarios.cli import clean_exit

STATUSES = ("exact", "refused", "wrong", "traceback", "not built", "died")
BAD = ("wrong", "traceback", "died")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.zoo")
    add = parser.add_argument
    add("--only", nargs="+", metavar="TYPE", default=[],
        help="only these types; with --layouts, only layouts whose names begin so")  # fmt: skip
    add("--layouts", action="store_true", help="layouts instead of types")
    add("--seconds", type=SECONDS, default=90, metavar="S", help="limit for one of them (90)")
    record.add_json_option(parser)
    args = parser.parse(arguments)
    names = layouts.NAMES if args.layouts else types.TYPES
    unknown = [t for t in args.only if not any(_asked(name, t, args.layouts) for name in names)]
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)}")
    args.names = [
        n for n in names if not args.only or any(_asked(n, t, args.layouts) for t in args.only)
    ]
    return args


def _asked(name: str, text: str, begins: bool) -> bool:
    return name.startswith(text) if begins else name == text


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    quiet.set_verbosity_error()  # type: ignore[no-untyped-call]
    quiet.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")  # of other libraries, a screenful a model
    start = time.monotonic()
    with clean_exit():
        work = layouts.row if args.layouts else types.row
        rows = [shown(row) for row in each(args.names, work, Limits(seconds=args.seconds))]
    rows.sort(key=lambda row: row["name"])
    counts = Counter(row["status"] for row in rows)
    figures: dict[str, Any] = {status.replace(" ", "_"): counts[status] for status in STATUSES}
    figures |= {
        "cases": len(rows),
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    print(", ".join(f"{counts[s]} {s}" for s in STATUSES) + f"; {figures['seconds']} s")
    figures["exact_but_mostly_local"] = sum(
        row["status"] == "exact" and row["remote"] < LEAST_REMOTE for row in rows
    )
    print(f"{figures['exact_but_mostly_local']} of the exact ones need --least-remote")
    if args.layouts:
        figures["unexpected"] = sum(not row.get("expected", False) for row in rows)
        print(f"{figures['unexpected']} not as expected")
        failed = figures["unexpected"]
    else:
        failed = sum(counts[status] for status in BAD)
    record.write(args.json, figures)
    sys.exit(1 if failed else 0)


def shown(row: Row) -> Row:
    """Print a line of the table, as it comes."""

    def figure(name: str, form: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    cells = [
        f"{row['name']:28}", f"{row['status']:10}",
        f"{figure('logits', '.1e'):>8}", f"{figure('gradients', '.1e'):>8}",
        f"{figure('remote', '.0%'):>5}",
    ]  # fmt: skip
    if row.get("expected") is False:
        cells.append(f"NOT AS EXPECTED ({row['wanted']}):")
    print(" ".join([*cells, row.get("why", "")]).rstrip(), flush=True)
    return row


if __name__ == "__main__":
    main()
