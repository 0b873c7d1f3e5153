"""Quotas of a client: rate, bytes and requests in work, and a time to come back that is true."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.admission import Admission, Quota

RATE, BURST_S = 100.0, 2.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 400), st.floats(0, 3)), min_size=1, max_size=60
    )
)
def test_a_client_keeps_to_its_rate(asked: list[tuple[int, int, float]]) -> None:
    """In any time: its rate, and a burst, and one request; and who waits as told is taken."""
    admission = Admission(Quota(bytes_per_s=RATE, burst_s=BURST_S))
    taken: dict[int, list[tuple[float, int]]] = {}
    now = 0.0
    for client, size, pause_s in asked:
        now += pause_s
        wait_s = admission.wait_s(client, size, now)
        if wait_s is not None:
            assert wait_s > 0
            now += wait_s
            again_s = admission.wait_s(client, size, now + 1e-6)
            assert again_s is None or wait_s == 30.0
            if again_s is not None:
                continue
        admission.begin(client, size, now)
        admission.end(client, size, now, now)
        taken.setdefault(client, []).append((now, size))
    for times in taken.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                between_s = times[last][0] - times[first][0]
                sizes = [size for _, size in times[first : last + 1]]
                assert sum(sizes[:-1]) <= RATE * (between_s + BURST_S) + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.tuples(st.integers(0, 2), st.integers(1, 60)), st.just("end")), max_size=60
    )
)
def test_what_is_in_work_is_bounded(script: list[object]) -> None:
    """Of a client, and of all; one that has nothing in work is refused for others' sake only,
    and one that has leaves as much as it has with it."""
    quota = Quota(requests=3, size=100, size_all=150)
    admission, work = Admission(quota), []
    for now, step in enumerate(script):
        if step == "end":
            if work:
                admission.end(*work.pop(0), float(now))
            continue
        assert isinstance(step, tuple)
        client, size = step
        theirs = [s for c, s, _ in work if c == client]
        every = sum(s for _, s, _ in work)
        full = len(theirs) >= 3 or (theirs and sum(theirs) + size > 100)
        left = sum(theirs) + size if theirs else 0
        wait_s = admission.wait_s(client, size, float(now))
        assert (wait_s is not None) == bool(full or (work and every + size + left > 150))
        if wait_s is None:
            admission.begin(client, size, float(now))
            work.append((client, size, float(now)))
        assert admission.working(client) == any(c == client for c, _, _ in work)


@settings(max_examples=60, deadline=None)
@given(
    greedy=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    pauses=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    data=st.data(),
)
def test_clients_that_always_ask_keep_nobody_out(
    greedy: list[int], pauses: list[int], data: st.DataObject
) -> None:
    """Of the room of all: whoever has nothing in work is taken, with its share, however often the
    others ask in between."""
    room = 120
    admission, work = Admission(Quota(size=room, size_all=room)), list[tuple[int, int, float]]()
    size = data.draw(st.integers(1, room // (len(greedy) + 1) - max(greedy)))

    def fill(now: float) -> None:
        more = True
        while more:
            more = False
            for client, each in enumerate(greedy):
                if admission.wait_s(client, each, now) is None:
                    admission.begin(client, each, now)
                    work.append((client, each, now))
                    more = True

    fill(0.0)
    now, ended = 1.0, 0
    while admission.wait_s("new", size, now) is not None:
        assert ended <= 3 * room
        for _ in range(pauses[int(now) % len(pauses)]):
            now += 1.0
            ended += work[0][1]
            admission.end(*work.pop(0), now)
            fill(now)


def test_the_time_to_come_back_follows_the_pace() -> None:
    """A worker that computes 1,000 bytes a second has room for 500 in half of one."""
    admission = Admission(Quota(size=1000))
    for turn in range(20):
        admission.begin("ann", 500, float(turn) / 2)
        admission.end("ann", 500, float(turn) / 2, float(turn + 1) / 2)
    admission.begin("ann", 1000, 10.0)
    assert admission.wait_s("ann", 500, 10.0) == pytest.approx(0.5)
    assert admission.wait_s("ben", 500, 10.0) is None


@pytest.mark.parametrize(
    "wrong",
    [{"requests": 0}, {"size": 0}, {"size_all": 0}, {"bytes_per_s": 0.0},
     {"bytes_per_s": float("nan")}, {"burst_s": -1.0}, {"burst_s": float("inf")}],
)  # fmt: skip
def test_a_quota_lets_something_through(wrong: dict[str, float]) -> None:
    """Else nobody would ever be served."""
    with pytest.raises(ValueError, match=r"quota|rate"):
        Quota(**wrong)  # type: ignore[arg-type]
