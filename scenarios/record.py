"""What every scenario and benchmark writes with `--json FILE`: its figures and their origin."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from backends.files import WriteError, write_json
from backends.machine import commit, machine
from backends.places import output_file


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The `--json FILE` option. A FILE that cannot be written is an error before anything runs."""
    parser.add_argument(
        "--json", type=output_file, metavar="FILE",
        help="also write the figures, with machine and commit",
    )  # fmt: skip


def command() -> str:
    """The command line as a user would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name.removesuffix(".__main__") if module else ""
    head = f"python -m {name}" if name else Path(sys.argv[0]).name
    return " ".join([head, *sys.argv[1:]])


def save(path: Path, figures: dict[str, Any], found: dict[str, Any] | None = None) -> None:
    """Write the figures and their origin as JSON. Raises WriteError when they cannot be.

    found  `machine()` of another process, for one that must not ask the GPU
    """
    origin = {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() if found is None else found,
    }
    write_json(path, figures | {"origin": origin})


def write(
    path: Path | None,
    figures: dict[str, Any],
    quiet: bool = False,
    found: dict[str, Any] | None = None,
) -> None:
    """`save` the figures when a path was given, at the end of a command; `quiet` says nothing.

    Where they cannot be written they are printed, and the command ends as one that failed.
    """
    if path is None:
        return
    try:
        save(path, figures, found)
    except WriteError as error:
        print(json.dumps(figures))
        sys.exit(f"error: {error}. The figures are printed above instead")
    if not quiet:
        print(f"figures written to {path}")


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
