"""What every scenario and benchmark writes with `--json FILE`: its figures and their origin."""

from __future__ import annotations

import argparse
import json
import math
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

    A figure that is not finite becomes null, which is said: it costs none of the others.

    found  `machine()` of another process, for one that must not ask the GPU
    """
    origin = {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() if found is None else found,
    }
    write_json(path, told_finite(figures) | {"origin": origin})


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


def told_finite(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with null for whatever is not finite, after a warning that names it."""
    strange: list[str] = []
    found: dict[str, Any] = _finite(figures, "", strange)
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        names = ", ".join(strange[:5])
        print(f"warning: not finite, written as null: {names}{more}", file=sys.stderr)
    return found


def _finite(value: Any, name: str, strange: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v, f"{name}.{k}" if name else str(k), strange) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{name}.{i}", strange) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        strange.append(name)
        return None
    return value


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
