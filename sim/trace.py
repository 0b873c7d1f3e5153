"""Spans of time: who did what when, as a file that opens in Perfetto, and where a step's time went.

Simulated and real runs record the same spans and write them with the same writer, so that two
traces can be laid side by side.

A track is one row of the picture, "process/thread": "owner0/lane 1", "owner0/cipher",
"worker0/gpu", or a link, "owner0->worker0". A lane is one micro-batch; its name must be unique
among the spans that are looked at together. A lane's own spans form a chain: local layers, encrypt,
up, worker, down, decrypt, local layers, and so on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from backends.files import replacing

# Nothing in particular; the owner's own work; filling the line upwards; on a worker; filling it
# downwards; a line that is not full, but far; in a queue for a device; a whole step.
KINDS = ("", "owner", "up", "worker", "down", "latency", "wait", "step")
PARTS = ("owner", "up", "worker", "down", "latency", "head", "idle")
HEAD = "loss"
"""The owner's own span between a pass's way forward and its way back: head, if local, and loss."""

# Times in a file are multiples of 1/8 us: exact in binary, so that a viewer that counts in
# nanoseconds cannot make neighbours overlap. Perfetto drops spans that overlap on one thread.
TICKS_PER_US = 8
TICKS_PER_S = TICKS_PER_US * 1_000_000


@dataclass(frozen=True, slots=True)
class Span:
    """Something on a track lasted from `start_s` to `end_s`, on the run's clock (seconds).

    lane: the lane it was for, if any. call: the number of the owner's call, 0 for none. kind: one
    of KINDS. A "wait" carries in `name` what was waited for, beginning with "owner" or "worker"
    when that was a device of one ("worker0/gpu").
    """

    track: str
    name: str
    start_s: float
    end_s: float
    lane: str = ""
    call: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.track:
            raise ValueError(f"span {self.name!r} is on no track")
        if self.kind not in KINDS:
            raise ValueError(f"span {self.name!r}: kind is one of {KINDS}, got {self.kind!r}")
        if not -math.inf < self.start_s <= self.end_s < math.inf:
            raise ValueError(
                f"span {self.name!r} on {self.track}: runs from {self.start_s} s to {self.end_s} s"
            )


class Recorder:
    """Collects spans. Any thread may add: appending to a list is atomic."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, span: Span) -> None:
        """Note one span."""
        self.spans.append(span)


# --- files ----------------------------------------------------------------------------------


def write_perfetto(path: Path, spans: Iterable[Span], title: str) -> None:
    """Write spans as a trace for ui.perfetto.dev or chrome://tracing, atomically.

    Spans that overlap on one track go to numbered threads of it: "gpu", "gpu (2)". Times are
    rounded to 1/8 us. The order of the spans is kept.
    """
    spans = list(spans)
    rows = rows_of(spans)
    threads = sorted({(span.track, row) for span, row in zip(spans, rows, strict=True)}, key=_order)
    processes: dict[str, int] = {}
    for track, _ in threads:
        processes.setdefault(track.partition("/")[0], len(processes) + 1)
    # A thread whose number is that of a process would be taken for that process's main thread.
    numbers = {thread: len(processes) + 1 + i for i, thread in enumerate(threads)}

    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": process}}
        for process, pid in processes.items()
    ]
    for (track, row), tid in numbers.items():
        process, _, thread = track.partition("/")
        label = (thread or process) + (f" ({row + 1})" if row else "")
        # `track` is for `read_perfetto`; viewers ignore it.
        named = {"name": label, "track": track}
        pid = processes[process]
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": named})
    for span, row in zip(spans, rows, strict=True):
        start, end = _ticks(span)
        events.append(
            {
                "ph": "X",
                "pid": processes[span.track.partition("/")[0]],
                "tid": numbers[span.track, row],
                "name": span.name,
                "cat": span.kind,
                "ts": start / TICKS_PER_US,
                "dur": (end - start) / TICKS_PER_US,
                "args": {"lane": span.lane, "call": span.call},
            }
        )
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    head = json.dumps({"title": title})
    with replacing(path) as file:
        file.write(f'{{"otherData":{head},"traceEvents":[\n{lines}\n]}}\n'.encode())


def read_perfetto(path: Path) -> list[Span]:
    """The spans of a file of `write_perfetto`, in their order, times rounded to 1/8 us.

    Raises ValueError for a file that is something else.
    """
    try:
        events = json.loads(path.read_bytes())["traceEvents"]
        tracks = {
            event["tid"]: event["args"]["track"]
            for event in events
            if event["ph"] == "M" and event["name"] == "thread_name"
        }
        return [
            Span(
                tracks[event["tid"]],
                event["name"],
                event["ts"] * TICKS_PER_US / TICKS_PER_S,
                (event["ts"] + event["dur"]) * TICKS_PER_US / TICKS_PER_S,
                event["args"]["lane"],
                event["args"]["call"],
                event["cat"],
            )
            for event in events
            if event["ph"] == "X"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a trace that this project has written "
            f"({type(error).__name__}: {error}); write it again"
        ) from None


def _ticks(span: Span) -> tuple[int, int]:
    return round(span.start_s * TICKS_PER_S), round(span.end_s * TICKS_PER_S)


def rows_of(spans: Sequence[Span]) -> list[int]:
    """For each span the first row of its track that is free by then."""
    rows = [0] * len(spans)
    free_from: dict[str, list[int]] = {}
    for i in sorted(range(len(spans)), key=lambda i: _ticks(spans[i])):
        start, end = _ticks(spans[i])
        track = free_from.setdefault(spans[i].track, [])
        row = next((r for r, free in enumerate(track) if free <= start), len(track))
        rows[i] = row
        # Viewers mix up two that begin at the same moment, even if one of them has no length.
        track[row : row + 1] = [max(end, start + 1)]
    return rows


def _order(thread: tuple[str, int]) -> tuple[list[str | int], str, int]:
    """Sorts tracks as a person would: "lane 2" before "lane 10"."""
    track, row = thread
    words = enumerate(re.split(r"(\d+)", track))
    return [int(word) if i % 2 else word for i, word in words], track, row


# --- where a step's time went -----------------------------------------------------------------


def critical_path(
    spans: Iterable[Span], step_start_s: float, step_end_s: float
) -> dict[str, float]:
    """Seconds of one owner's step by what it was waiting for; they add up to the step's duration.

    The lane that finished last decided how long the step took. Walked from its end to the step's
    start, each moment counts for the span that the rest of the chain had to wait for:

    - the span that ended when the next one began;
    - where none did, the one that began last of those still going on;
    - where there is none either, nothing: "idle" (timers, retries, waiting for a worker, and the
      time before the lane began).

    The line is two parts: filling it, by direction, which more bandwidth shortens, and waiting for
    it, which only a shorter way or more lanes do. The owner's work between forward and backward is
    a part of its own, "head".

    A wait for a device counts for the side the device belongs to. A lane ends with its last "owner"
    span: what comes later is an answer that came twice. From there on the owner updates its
    weights. A step in which no lane did anything is idle.

    `spans` may hold other steps and other spans; it must hold the lanes of one owner only. Raises
    ValueError when the step ends before it starts.
    """
    if not step_start_s <= step_end_s:
        raise ValueError(f"the step runs from {step_start_s} s to {step_end_s} s")
    lanes: dict[str, list[tuple[float, float, str]]] = {}
    ends: dict[str, tuple[bool, float]] = {}
    for span in spans:
        part = _part(span)
        start, end = max(span.start_s, step_start_s), min(span.end_s, step_end_s)
        if span.lane and part and start < end:
            lanes.setdefault(span.lane, []).append((end, start, part))
            finish = (span.kind == "owner", end)
            ends[span.lane] = max(ends.get(span.lane, finish), finish)
    seconds = dict.fromkeys(PARTS, 0.0)
    if not lanes:
        seconds["idle"] = step_end_s - step_start_s
        return seconds
    last = max(sorted(lanes), key=lambda lane: ends[lane])
    lane_end_s = ends[last][1]
    seconds["owner"] += step_end_s - lane_end_s
    for part, duration_s in _walk(lanes[last], step_start_s, lane_end_s):
        seconds[part] += duration_s
    return seconds


def _part(span: Span) -> str:
    """Which of PARTS a span counts for; "" for none."""
    if span.kind == "wait":
        return next((side for side in ("owner", "worker") if span.name.startswith(side)), "idle")
    if span.kind == "owner" and span.name == HEAD:
        return "head"
    return span.kind if span.kind in PARTS else ""


def _walk(
    chain: list[tuple[float, float, str]], start_s: float, end_s: float
) -> list[tuple[str, float]]:
    """(part, seconds) from `end_s` back to `start_s` along (end, start, part) spans."""
    ended = sorted(chain)  # not later than `now`, the latest last
    going_on: list[tuple[float, str]] = []  # later than `now`: a heap of (-start, part)
    steps: list[tuple[str, float]] = []
    now = end_s
    while now > start_s:
        while ended and ended[-1][0] > now:
            _, start, part = ended.pop()
            heappush(going_on, (-start, part))
        while going_on and -going_on[0][0] >= now:
            heappop(going_on)
        until = ended[-1][0] if ended else start_s
        if until == now:
            _, begun, part = ended.pop()
        elif going_on:
            begun, part = max(-going_on[0][0], until), going_on[0][1]
        else:
            begun, part = until, "idle"
        steps.append((part, now - begun))
        now = begun
    return steps
