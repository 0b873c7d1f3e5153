"""Pages with a generated part between two markers: how the docs' generators write them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def between(page: str, begin: str, end: str, fresh: str) -> str:
    """A page with a fresh part between its markers. Raises ValueError when it has lost them."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"a page has lost its marker {begin if not found else end!r}")
    return f"{before}{begin}\n\n{fresh}\n{end}{after}"


def rewrite(
    paths: Iterable[Path], renewed: Callable[[Path, str], str], command: str,
    arguments: Sequence[str],
) -> int:  # fmt: skip
    """Rewrite the pages, or with --check say which are stale; the exit status."""
    stale = 0
    for path in paths:
        page = path.read_text(encoding="utf-8")
        fresh = renewed(path, page)
        if fresh == page:
            continue
        if "--check" in arguments:
            print(f"{path.name} is stale: run python -m {command}", file=sys.stderr)
            stale = 1
        else:
            path.write_text(fresh, encoding="utf-8")
    return stale


def origin(figures: dict[str, Any]) -> str:
    """Where figures come from, as a line under their table."""
    o = figures["origin"]
    m = o["machine"]
    if "gpu" in figures:
        return (
            f"*`{o['command'].split(' --json')[0]}` on one {m['gpu']}, {m['cores']} cores of "
            f"{m['processor']}, torch {m['torch']}, commit `{o['commit']}`, {o['date']}.*\n"
        )
    return (
        f"*`{o['command'].split(' --json')[0]}` on {m['cores']} cores of {m['processor']}, torch "
        f"{m['torch']}, commit `{o['commit']}`, {o['date']}.*\n"
    )
