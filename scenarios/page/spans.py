"""The spans of a few steps as the page's timeline draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sim.trace import Span, rows_of

MOST_SPANS, MOST_STEPS = 5000, 2
_ORDER = ("owner", "cipher", "up", "worker", "down", "")


@dataclass(frozen=True)
class Timeline:
    """
    data   what the page's script draws: rows, names, and bars (row, name, start and length in us)
    steps  how many whole steps there are, and the number of the first; 0 and 0 when it is cut short
    """

    data: dict[str, Any]
    seconds: float
    steps: int
    first: int
    spans: int


def timeline(spans: Sequence[Span]) -> Timeline | None:
    """Up to two steps after the first, or the first; None where no step has ended."""
    steps = sorted((s for s in spans if s.kind == "step"), key=lambda s: s.start_s)
    if not steps:
        return None
    skipped = min(1, len(steps) - 1)
    chosen = steps[skipped : skipped + MOST_STEPS]
    zero, end = chosen[0].start_s, chosen[-1].end_s
    drawn = sorted(
        (s for s in spans if s.kind not in ("step", "wait") and zero <= s.start_s < end),
        key=lambda s: s.start_s,
    )
    if whole := len(drawn) <= MOST_SPANS:
        count = len(chosen)
    else:
        drawn = drawn[:MOST_SPANS]
        end, count = max(s.end_s for s in drawn), 0
    data = _data(drawn, zero)
    data["end"] = _us(end - zero)
    data["steps"] = [_us(s.start_s - zero) for s in chosen if s.start_s < end]
    return Timeline(data, end - zero, count, skipped + 1 if whole else 0, len(drawn))


def _data(spans: Sequence[Span], zero_s: float) -> dict[str, Any]:
    sub = rows_of(spans)
    keys = sorted({_key(s, n) for s, n in zip(spans, sub, strict=True)})
    row = {key: i for i, key in enumerate(keys)}
    names = {name: i for i, name in enumerate(dict.fromkeys(s.name for s in spans))}
    bars = [
        [row[_key(s, n)], names[s.name], _us(s.start_s - zero_s), _us(s.end_s - s.start_s)]
        for s, n in zip(spans, sub, strict=True)
    ]
    labels = _labels([track for _, track, _ in keys])
    rows = [
        {"kind": _ORDER[kind] or "away", "label": labels[track] if n == 0 else ""}
        for kind, track, n in keys
    ]
    return {"rows": rows, "names": list(names), "bars": bars}


def _key(span: Span, sub: int) -> tuple[int, str, int]:
    """Sorts rows from the owner's own layers down to the answers' way back."""
    kind = "cipher" if span.track.endswith("/cipher") else span.kind
    return _ORDER.index(kind), span.track, sub


def _labels(tracks: Sequence[str]) -> dict[str, str]:
    """Words for tracks, with numbers where there are several; no address of a worker."""
    words = {track: _word(track) for track in dict.fromkeys(tracks)}
    alike: dict[str, list[str]] = {}
    for track, word in words.items():
        alike.setdefault(word, []).append(track)
    return {
        track: f"{word} {alike[word].index(track) + 1}" if len(alike[word]) > 1 else word
        for track, word in words.items()
    }


def _word(track: str) -> str:
    owner = track.startswith("owner")
    if "<->" in track:
        return "wire and worker"
    if "->" in track:
        return "wire: requests up" if owner else "wire: answers down"
    if not owner:
        return "worker: products on ciphertexts"
    return "owner: encrypt, decrypt" if track.endswith("/cipher") else "owner: its own layers"


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
