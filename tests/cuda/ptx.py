"""Reads compiled kernels: is a buffer refilled before all warps have finished with it?"""

from __future__ import annotations

import re

_WAIT = "wgmma.wait_group"
_COPY = re.compile(r"\bcp\.async\.(bulk\.tensor|ca|cg)\b")
_BARRIER = re.compile(r"(bar|barrier)\.sync(\.aligned)?\s+0;")  # of all threads, unconditional
_LABEL = re.compile(r"([$\w]+):")
_BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+([$\w]+);")


def bare_copies(ptx: str) -> set[tuple[int, int]]:
    """(line of a wait for products, line of a copy) with a way from one to the other that passes
    no barrier of the whole block.

    A wait tells one warp group that its own products have read a buffer. Others may be behind, so
    before anything is copied into that buffer again, all must have met.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        if found := _LABEL.match(line):
            labels.setdefault(found[1], []).append(number)
    bare = set()
    for wait in (number for number, line in enumerate(lines) if _WAIT in line):
        seen: set[int] = set()
        ahead = [wait + 1]
        while ahead:
            number = ahead.pop()
            if number in seen or _BARRIER.match(lines[number]):
                continue
            seen.add(number)
            if _COPY.search(lines[number]):
                bare.add((wait + 1, number + 1))
            else:
                ahead += _next(lines, labels, number)
    return bare


def _next(lines: list[str], labels: dict[str, list[int]], number: int) -> list[int]:
    """Lines that may run after this one."""
    branch = _BRANCH.search(lines[number])
    if branch is None:
        ends = lines[number] == "ret;" or number + 1 == len(lines)
        return [] if ends else [number + 1]
    # Small waiting loops all use one label, each in braces of its own: the last one is meant.
    places = labels[branch[2]]
    target = places[0] if len(places) == 1 else max(at for at in places if at < number)
    return [target, number + 1] if branch[1] else [target]
