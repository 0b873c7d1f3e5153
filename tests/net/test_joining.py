"""Joined requests: everyone gets their own answer, whoever leads and whenever they come."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.net.joining import Joiner

PATIENCE_S = 10.0


class Gate:
    """A multiply_many that waits to be let through, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.started = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, key: str, requests: list[int]) -> list[str]:
        with self._lock:
            self.batches.append((key, list(requests)))
        self.started.release()
        assert self.allowed.acquire(timeout=PATIENCE_S)
        return [f"{key}{request}" for request in requests]


class Crowd:
    """Threads that ask one joiner, in a known order of arrival."""

    def __init__(self, joiner: Joiner[str, int, str]) -> None:
        self._joiner = joiner
        self._pool = ThreadPoolExecutor(16)

    def ask(self, key: str, request: int) -> Future[str]:
        """Ask, and return once the request either runs or waits."""
        before = len(self._joiner._waiting), self._joiner._free
        answer = self._pool.submit(self._joiner.run, key, request)
        end = time.monotonic() + PATIENCE_S
        while (len(self._joiner._waiting), self._joiner._free) == before:
            assert time.monotonic() < end
            time.sleep(0.001)
        return answer


def test_an_idle_device_is_used_at_once() -> None:
    """Nobody waits for company."""
    joiner: Joiner[str, int, str] = Joiner(
        lambda key, requests: [f"{key}{r}" for r in requests], 1, lambda r: 1, 10
    )
    assert joiner.run("a", 1) == "a1"
    assert joiner.run("b", 2) == "b2"


def test_what_piles_up_is_joined_by_matrix() -> None:
    """While one runs, the rest wait; the oldest leads those of its matrix, then the others."""
    gate = Gate()
    crowd = Crowd(Joiner(gate, 1, lambda r: 1, 10))
    asked = [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("c", 4)]
    answers = [crowd.ask(key, request) for key, request in asked]
    gate.allowed.release(4)
    assert [a.result(PATIENCE_S) for a in answers] == [f"{k}{r}" for k, r in asked]
    assert gate.batches == [("a", [0]), ("b", [1, 3]), ("a", [2]), ("c", [4])]


def test_a_batch_is_no_larger_than_allowed() -> None:
    """In order of arrival, as many as fit; what is larger by itself runs alone."""
    gate = Gate()
    crowd = Crowd(Joiner(gate, 1, lambda r: r, 10))
    answers = [crowd.ask("a", size) for size in (1, 4, 6, 1, 25, 2)]
    gate.allowed.release(5)
    assert [a.result(PATIENCE_S) for a in answers] == ["a1", "a4", "a6", "a1", "a25", "a2"]
    assert [requests for _, requests in gate.batches] == [[1], [4, 6], [1], [25], [2]]


def test_as_many_run_at_once_as_there_are_slots() -> None:
    """Two run, the third waits for either."""
    gate = Gate()
    crowd = Crowd(Joiner(gate, 2, lambda r: 1, 10))
    answers = [crowd.ask("a", request) for request in range(3)]
    for _ in range(2):
        assert gate.started.acquire(timeout=PATIENCE_S)
    assert not gate.started.acquire(timeout=0.05)
    gate.allowed.release(3)
    assert [a.result(PATIENCE_S) for a in answers] == ["a0", "a1", "a2"]


def test_an_error_reaches_its_batch_and_no_other() -> None:
    """And the slot is free again after it."""
    gate = Gate()

    def fails_joined(key: str, requests: list[int]) -> list[str]:
        results = gate(key, requests)
        if len(requests) > 1:
            raise MemoryError("too much")
        return results

    joiner: Joiner[str, int, str] = Joiner(fails_joined, 1, lambda r: 1, 10)
    crowd = Crowd(joiner)
    answers = [crowd.ask(key, request) for key, request in (("a", 0), ("a", 1), ("a", 2), ("b", 3))]
    gate.allowed.release(4)
    assert answers[0].result(PATIENCE_S) == "a0"
    for answer in answers[1:3]:
        with pytest.raises(MemoryError):
            answer.result(PATIENCE_S)
    assert answers[3].result(PATIENCE_S) == "b3"
    assert joiner.run("b", 4) == "b4"


def test_a_malformed_request_fails_alone() -> None:
    """A ValueError of a batch is traced to the request that caused it."""
    gate = Gate()

    def refuses_odd(key: str, requests: list[int]) -> list[str]:
        results = gate(key, requests)
        if any(request % 2 for request in requests):
            raise ValueError("odd")
        return results

    crowd = Crowd(Joiner(refuses_odd, 1, lambda r: 1, 10))
    answers = [crowd.ask("a", request) for request in (0, 2, 3, 4)]
    gate.allowed.release(5)
    assert [answers[i].result(PATIENCE_S) for i in (0, 1, 3)] == ["a0", "a2", "a4"]
    with pytest.raises(ValueError, match="odd"):
        answers[2].result(PATIENCE_S)


def test_a_wrong_number_of_results_is_an_error() -> None:
    """Never somebody else's answer."""
    joiner: Joiner[str, int, str] = Joiner(lambda key, requests: [], 1, lambda r: 1, 10)
    with pytest.raises(RuntimeError, match="0 results for 1"):
        joiner.run("a", 1)


def test_no_slots_are_refused() -> None:
    """They would wait forever."""
    with pytest.raises(ValueError, match="slots"):
        Joiner(lambda key, requests: requests, 0, lambda r: 1, 10)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=40
    ),
    threads=st.integers(1, 8),
    slots=st.integers(1, 3),
    max_size=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_everyone_gets_their_own_answer(
    asked: list[tuple[int, int, int]], threads: int, slots: int, max_size: int, seed: int
) -> None:
    """Whatever the timing: own answers and errors, batches within their limits, nobody lost.

    asked  (matrix, size, fate): fate 0 is a malformed request, 1 makes its whole batch fail
    """
    pauses = random.Random(seed)
    lock = threading.Lock()
    under_way = 0
    served: list[int] = []

    def multiply_many(key: int, requests: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        nonlocal under_way
        with lock:
            under_way += 1
            assert under_way <= slots
            pause_s = pauses.choice([0, 0, 0.0003, 0.001])
        assert len(requests) == 1 or sum(size for _, size, _ in requests) <= max_size
        time.sleep(pause_s)
        with lock:
            under_way -= 1
        if any(fate == 0 for _, _, fate in requests):
            raise ValueError("malformed")
        if any(fate == 1 for _, _, fate in requests):
            raise MemoryError("device")
        with lock:
            served.extend(number for number, _, _ in requests)
        return [(key, number) for number, _, _ in requests]

    joiner: Joiner[int, tuple[int, int, int], tuple[int, int]] = Joiner(
        multiply_many, slots, lambda request: request[1], max_size
    )

    def ask(number: int) -> tuple[int, int] | str:
        key, size, fate = asked[number]
        try:
            return joiner.run(key, (number, size, fate))
        except (ValueError, MemoryError) as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        answers = [pool.submit(ask, number) for number in range(len(asked))]
        for number, (answer, (key, _, fate)) in enumerate(zip(answers, asked, strict=True)):
            outcome = answer.result(PATIENCE_S)
            if fate == 0:
                assert outcome in ("malformed", "device")
            elif fate == 1:
                assert outcome == "device"
            else:
                assert outcome in ((key, number), "device")
    assert len(served) == len(set(served))
    assert joiner._free == slots
    assert not joiner._waiting
