"""Traces can be read back and drawn; a step's time is split and nothing is left over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.trace import (
    KINDS,
    PARTS,
    TICKS_PER_S,
    Recorder,
    Span,
    critical_path,
    read_perfetto,
    write_perfetto,
)

TRACKS = ("owner0/lane 1", "owner0/lane 2", "owner0/lane 10", "worker0/gpu", "owner0->worker0")
names = st.text('ab/01"\\\n ()é²€', max_size=8)
ticks = st.tuples(st.integers(0, 400), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1]))


@st.composite
def spans_on_ticks(draw: st.DrawFn) -> Span:
    """A span whose times a file holds exactly."""
    start, end = draw(ticks)
    return Span(
        draw(st.sampled_from(TRACKS) | names.filter(bool)),
        draw(names),
        start / TICKS_PER_S,
        end / TICKS_PER_S,
        draw(names),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from(KINDS)),
    )


def written(folder: Path, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The events of a file with these spans."""
    write_perfetto(folder / "trace.json", spans, "a title")
    content = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    assert content["otherData"] == {"title": "a title"}
    return content["traceEvents"]


# --- spans and files ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(spans_on_ticks(), max_size=12))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, spans: list[Span]
) -> None:
    """All fields, in the same order; whatever the names."""
    path = tmp_path_factory.mktemp("trace") / "deep" / "trace.json"
    write_perfetto(path, spans, 'a "title"')
    assert read_perfetto(path) == spans
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]


def test_times_are_rounded_to_an_eighth_of_a_microsecond(tmp_path: Path) -> None:
    """Good enough to look at, also late in a long run."""
    span = Span("owner0/lane 1", "encrypt", 100_000.123456789, 100_000.987654321)
    event = written(tmp_path, [span])[-1]
    assert (event["ts"], event["dur"]) == (100_000_123_456.75, 864_197.625)
    (back,) = read_perfetto(tmp_path / "trace.json")
    assert back.start_s == pytest.approx(span.start_s, abs=0.07e-6)
    assert back.end_s == pytest.approx(span.end_s, abs=0.07e-6)


@settings(deadline=None)
@given(st.lists(spans_on_ticks(), max_size=25))
def test_a_viewer_can_draw_every_span(
    tmp_path_factory: pytest.TempPathFactory, spans: list[Span]
) -> None:
    """On one thread no two overlap or begin together; threads and processes are named, uniquely."""
    events = written(tmp_path_factory.mktemp("trace"), spans)
    drawn = [event for event in events if event["ph"] == "X"]
    assert len(drawn) == len(spans)
    threads: dict[int, list[tuple[float, float]]] = {}
    for event in drawn:
        # A viewer counts in whole nanoseconds: nothing may be lost on the way.
        assert (event["ts"] * 1000).is_integer()
        assert (event["dur"] * 1000).is_integer()
        assert "e" not in json.dumps([event["ts"], event["dur"]])
        threads.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for row in threads.values():
        row.sort()
        for (start, end), (after, _) in pairwise(row):
            assert end <= after
            assert start < after

    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows = {e["tid"]: e for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(rows) == set(threads)
    assert not set(rows) & set(processes)
    assert len(set(processes.values())) == len(processes)
    for span, event in zip(spans, drawn, strict=True):
        assert processes[event["pid"]] == span.track.partition("/")[0]
        assert rows[event["tid"]]["pid"] == event["pid"]
        assert event["args"] == {"lane": span.lane, "call": span.call}


def test_names_of_threads(tmp_path: Path) -> None:
    """The part after the slash, numbered where spans overlap; in the order a person expects."""
    spans = [
        Span("owner0/lane 10", "local", 0, 1),
        Span("owner0/lane 2", "local", 0, 1),
        Span("worker0/gpu", "multiply", 0, 2),
        Span("worker0/gpu", "multiply", 1, 3),
        Span("worker0/gpu", "multiply", 2, 4),
        Span("owner0->worker0", "up", 0, 1),
    ]
    events = written(tmp_path, spans)
    rows = [event for event in events if event["ph"] == "M" and event["name"] == "thread_name"]
    assert [row["args"]["name"] for row in rows] == [
        "owner0->worker0", "lane 2", "lane 10", "gpu", "gpu (2)"
    ]  # fmt: skip
    tids = [event["tid"] for event in events if event["name"] == "multiply"]
    assert tids[0] == tids[2] != tids[1]


def test_two_spans_that_begin_together_are_drawn_apart(tmp_path: Path) -> None:
    """Even if one has no length; two that only touch share a thread."""
    spans = [Span("t/x", "a", 1, 1), Span("t/x", "b", 1, 2), Span("t/x", "c", 2, 2)]
    tids = [event["tid"] for event in written(tmp_path, spans) if event["ph"] == "X"]
    assert tids[0] != tids[1] != tids[2]
    assert len(set(tids)) == 2


def test_a_file_does_not_depend_on_the_order_of_recording(tmp_path: Path) -> None:
    """Threads get the same numbers, so that two traces look alike."""
    spans = [Span(track, "x", i, i + 1) for i, track in enumerate(TRACKS)]
    first = {json.dumps(event) for event in written(tmp_path, spans)}
    assert first == {json.dumps(event) for event in written(tmp_path, spans[::-1])}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"traceEvents": [{}]}', b"\xff", b'{"traceEvents": [{"ph": "X"}]}',
     b'{"traceEvents": 3}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """With the name of the file."""
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json is not a trace"):
        read_perfetto(tmp_path / "other.json")


def test_a_span_must_make_sense() -> None:
    """Refused on construction, by name."""
    with pytest.raises(ValueError, match="'x' on t: runs from 2 s to 1 s"):
        Span("t", "x", 2, 1)
    with pytest.raises(ValueError, match="runs from nan s"):
        Span("t", "x", float("nan"), 1)
    with pytest.raises(ValueError, match="to inf s"):
        Span("t", "x", 0, float("inf"))
    with pytest.raises(ValueError, match="kind is one of"):
        Span("t", "x", 0, 1, kind="sideways")
    with pytest.raises(ValueError, match="on no track"):
        Span("", "x", 0, 1)


def test_a_recorder_keeps_the_order() -> None:
    """Spans come out as they went in."""
    recorder = Recorder()
    spans = [Span("t", str(i), 3 - i, 4) for i in range(3)]
    for span in spans:
        recorder.add(span)
    assert recorder.spans == spans


# --- the critical path ----------------------------------------------------------------------


def of(lane: str) -> Callable[..., Span]:
    """A maker of spans of one lane: kind, start, end, name."""

    def make(kind: str, start_s: float, end_s: float, name: str = "x") -> Span:
        return Span("some/track", name, start_s, end_s, lane=lane, kind=kind)

    return make


def split(spans: Sequence[Span], start_s: float = 0, end_s: float = 20) -> dict[str, float]:
    """The parts of a step that are not zero."""
    parts = critical_path(spans, start_s, end_s)
    assert list(parts) == list(PARTS)
    return {part: seconds for part, seconds in parts.items() if seconds}


def test_a_chain_is_split_by_kind() -> None:
    """Its gaps are idle, what follows it is the update."""
    one = of("1")
    spans = [
        one("owner", 1, 3), one("up", 3, 4), one("worker", 5, 9), one("down", 9, 11),
        one("owner", 11, 14),
    ]  # fmt: skip
    assert split(spans) == {"owner": 2 + 3 + 6, "up": 1, "worker": 4, "down": 2, "idle": 1 + 1}


def test_the_lane_that_finished_last_decides() -> None:
    """What other lanes and spans without a lane did meanwhile does not count."""
    one, two, none = of("1"), of("2"), of("")
    spans = [one("owner", 0, 15), two("up", 2, 10), two("owner", 10, 16), none("worker", 0, 20)]
    assert split(spans) == {"owner": 6 + 4, "up": 8, "idle": 2}


def test_a_wait_counts_for_the_side_of_the_device() -> None:
    """And for nobody when it was not for a device."""
    one = of("1")
    spans = [
        one("wait", 0, 2, "owner0/cpu"), one("owner", 2, 3), one("wait", 3, 7, "worker3/gpu"),
        one("worker", 7, 8), one("wait", 8, 13, "a ready worker"), one("owner", 13, 20),
    ]  # fmt: skip
    assert split(spans) == {"owner": 2 + 1 + 7, "worker": 4 + 1, "idle": 5}


def test_an_answer_that_came_twice_does_not_end_the_lane() -> None:
    """The lane ended with the owner's own work; the straggler is no part of the path."""
    one, two = of("1"), of("2")
    spans = [one("owner", 0, 9), two("owner", 0, 10), one("down", 8, 19)]
    assert split(spans) == {"owner": 20}


def test_the_chain_goes_through_what_had_ended() -> None:
    """A frame sent again while the answer to the first was on its way did not cost time."""
    one = of("1")
    spans = [
        one("owner", 0, 2), one("up", 2, 4), one("worker", 4, 9), one("up", 7, 11),
        one("down", 9, 12), one("worker", 11, 16), one("owner", 12, 20),
    ]  # fmt: skip
    assert split(spans) == {"owner": 2 + 8, "up": 2, "worker": 5, "down": 3}


def test_where_the_chain_breaks_the_latest_that_goes_on_counts() -> None:
    """No span ended where the next began, yet two were under way."""
    one = of("1")
    spans = [one("up", 0, 12), one("worker", 2, 9), one("owner", 8, 20)]
    assert split(spans) == {"owner": 12, "worker": 6, "up": 2}


def test_what_went_on_all_the_time_fills_only_the_gaps() -> None:
    """The chain proper comes first, however long something else took beside it."""
    one = of("1")
    spans = [one("down", 0, 20), one("owner", 0, 5), one("worker", 6, 10), one("owner", 10, 18)]
    assert split(spans) == {"owner": 5 + 8 + 2, "down": 1, "worker": 4}


def test_only_the_step_itself_counts() -> None:
    """Spans of other steps are not in it, spans across its edges are cut."""
    one = of("1")
    spans = [one("owner", 0, 4), one("up", 4, 8), one("worker", 8, 12), one("owner", 12, 16)]
    assert split(spans, 6, 10) == {"up": 2, "worker": 2}
    assert split(spans, 30, 33) == {"idle": 3}
    assert split(spans, 5, 5) == {}
    assert split([], 0, 2) == {"idle": 2}


def test_a_whole_step_is_no_part_of_a_lane() -> None:
    """A "step" span covers everything and explains nothing."""
    one = of("1")
    assert split([one("step", 0, 20), one("", 3, 9), one("owner", 10, 20)]) == {
        "owner": 10,
        "idle": 10,
    }


def test_a_step_cannot_end_before_it_starts() -> None:
    """Says which."""
    with pytest.raises(ValueError, match="runs from 2 s to 1 s"):
        critical_path([], 2, 1)


@st.composite
def lane_spans(draw: st.DrawFn) -> Span:
    """A span at whole seconds, of one of two lanes."""
    start, end = draw(ticks)
    kind = draw(st.sampled_from([*KINDS, "owner"]))
    name = draw(st.sampled_from(["owner0", "worker1/gpu", "else"]))
    return of(draw(st.sampled_from(["", "1", "2"])))(kind, start // 10, end // 10, name)


@settings(deadline=None)
@given(st.lists(lane_spans(), max_size=14), st.integers(0, 20), st.integers(0, 40))
def test_the_parts_are_the_whole(spans: list[Span], start: int, length: int) -> None:
    """They add up to the step; time is idle exactly where the deciding lane has no span."""
    end = start + length
    parts = critical_path(spans, start, end)
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == length

    # Second by second: which parts could it have been?
    sides = {"wait": {"owner0": "owner", "worker1/gpu": "worker", "else": "idle"}}
    own: dict[str, dict[int, set[str]]] = {}
    ends: dict[str, int] = {}
    for span in spans:
        if not span.lane or span.kind in ("", "step"):
            continue
        seconds = range(max(start, int(span.start_s)), min(end, int(span.end_s)))
        for second in seconds:
            part = sides.get(span.kind, {}).get(span.name, span.kind)
            own.setdefault(span.lane, {}).setdefault(second, set()).add(part)
        if span.kind == "owner" and seconds:
            ends[span.lane] = max(ends.get(span.lane, 0), seconds[-1] + 1)
    if not ends:
        return
    last = max(sorted(ends), key=lambda lane: ends[lane])
    could = dict.fromkeys(PARTS, 0)
    must = dict.fromkeys(PARTS, 0)
    for second in range(start, end):
        here = own[last].get(second, {"idle"}) if second < ends[last] else {"owner"}
        for part in here:
            could[part] += 1
            must[part] += len(here) == 1
    for part in PARTS:
        assert must[part] <= parts[part] <= could[part]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PARTS[:4]), st.floats(0, 1)), min_size=1))
def test_a_gapless_chain_is_counted_whole(chain: list[tuple[str, float]]) -> None:
    """Whatever its times: nothing idle, every kind as long as its spans."""
    one, now, spans = of("1"), 0.0, []
    expected = dict.fromkeys(PARTS, 0.0)
    for kind, length in [*chain, ("owner", 1.0)]:
        spans.append(one(kind, now, now + length))
        expected[kind] += spans[-1].end_s - now
        now = spans[-1].end_s
    parts = critical_path(spans[::-1], 0.0, now)
    assert parts == pytest.approx(expected, abs=1e-9)
    assert parts["idle"] == 0
