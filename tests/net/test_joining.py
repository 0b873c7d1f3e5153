"""Joined requests at a real worker: everyone gets their own answer, whoever waits with whom."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.he.interface import WorkerCipher, WorkerMatrix
from backends.he.mlwe_worker import MlweWorker
from backends.he.wire import EXACT
from backends.net.devices import OneDevice
from backends.net.worker import WorkerServer
from protocol.catalogue import Catalogue, MatrixShape
from protocol.messages import Hello, Multiply, Product, Reason, Refuse, Welcome, decode, encode
from protocol.worker import WorkerConfig

PATIENCE_S = 10.0
DIGEST, SESSION = bytes(32), bytes(16)
CATALOGUE = Catalogue(DIGEST, DIGEST, tuple(MatrixShape(f"m{i}", 1, 1, 4, 4) for i in range(4)))
BROKEN, MALFORMED = 250, 251
"""First bytes of payloads: the whole product fails, or only this request is wrong."""


class Tagged(WorkerCipher):
    """Answers say which matrix computed them, and of which request. Waits for `allowed`, if any."""

    def __init__(self, launches: int = 1, wait: bool = True) -> None:
        self.launches = launches
        self.batches: list[tuple[int, list[int]]] = []
        self.started, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.wait = wait
        self.most = self.under_way = 0
        self.pauses = random.Random(0)
        self._lock = threading.Lock()

    def load(self, weight: Any, forward: bool, format: Any) -> int:
        return int(weight[0, 0])

    def multiply(self, payload: Any, tokens: int, matrix: int) -> Any:
        return self.multiply_many([(payload, tokens)], matrix)[0]

    def multiply_many(self, requests: Sequence[tuple[Any, int]], matrix: int) -> list[Any]:
        payloads = [bytes(payload) for payload, _ in requests]
        with self._lock:
            self.batches.append((matrix, [payload[1] for payload in payloads]))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            pause_s = self.pauses.choice((0, 0, 0.0003, 0.001))
        self.started.release()
        if self.wait:
            assert self.allowed.acquire(timeout=PATIENCE_S)
        else:
            time.sleep(pause_s)
        with self._lock:
            self.under_way -= 1
        if any(payload[0] == MALFORMED for payload in payloads):
            raise ValueError("malformed")
        if any(payload[0] == BROKEN for payload in payloads):
            raise MemoryError("device")
        tag = bytes((matrix,))
        return [np.frombuffer(tag + payload[1:4] + payload[4:], np.uint8) for payload in payloads]


class Crowd:
    """Owners who ask one worker, each over a link of its own, in a known order of arrival."""

    def __init__(
        self, cipher: WorkerCipher, max_tokens: int = 10, devices: type[OneDevice] = OneDevice
    ) -> None:
        matrices = [
            WorkerMatrix(np.full((1, 1), i, np.int8), True, EXACT)
            for i in range(len(CATALOGUE.matrices))
        ]
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.server = WorkerServer(
            devices(CATALOGUE, cipher, matrices),
            lambda peer, frame: self.answers.put((peer, decode(frame))),
            WorkerConfig(max_tokens=max_tokens),
        )  # fmt: skip
        self.server.start()
        self._met: set[str] = set()

    def meet(self, who: str) -> None:
        """An owner greets, once, while nobody waits for an answer."""
        if who not in self._met:
            self._met.add(who)
            self.server.deliver(who, encode(Hello(SESSION, DIGEST, DIGEST)))
            assert isinstance(self.answers.get(timeout=PATIENCE_S)[1], Welcome)

    def ask(self, who: str, request: int, matrix: int, tokens: int = 2, fate: int = 0) -> None:
        """One request; its payload begins with its fate and its number."""
        self.meet(who)
        payload = bytes((fate, request, 0, 0)) + bytes(4 * (tokens - 1))
        self.server.deliver(who, encode(Multiply(SESSION, request, matrix, tokens, payload)))

    def waits(self, requests: int) -> None:
        """Until so many wait for the cipher."""
        until = time.monotonic() + PATIENCE_S
        while len(self.server._queues) != requests:
            assert time.monotonic() < until
            time.sleep(0.001)

    def get(self, count: int) -> dict[tuple[str, int], Any]:
        """So many answers, by who asked and what."""
        got = (self.answers.get(timeout=PATIENCE_S) for _ in range(count))
        return {(who, message.request): message for who, message in got}


def batches(cipher: Tagged, asked: list[tuple[str, int, int, int]], max_tokens: int = 10) -> Any:
    """What is computed together of (who, request, matrix, tokens) that come while one runs."""
    crowd = Crowd(cipher, max_tokens)
    crowd.ask("first#1", 99, 3, 2)
    assert cipher.started.acquire(timeout=PATIENCE_S)
    for who, request, matrix, tokens in asked:
        crowd.ask(who, request, matrix, tokens)
    crowd.waits(len(asked))
    cipher.allowed.release(1 + len(asked))
    crowd.get(1 + len(asked))
    crowd.server.stop()
    return cipher.batches[1:]


def test_what_piles_up_is_joined_by_matrix() -> None:
    """While one runs, the rest wait; the oldest leads those of its matrix, then the others."""
    asked = [("a#1", 1, 0, 2), ("b#2", 2, 1, 2), ("c#3", 3, 0, 2), ("d#4", 4, 1, 2)]
    assert batches(Tagged(), asked) == [(0, [1, 3]), (1, [2, 4])]


def test_a_product_is_no_larger_than_allowed() -> None:
    """As many as fit, in order."""
    asked = [(f"o{i}#{i}", i, 0, tokens) for i, tokens in enumerate((4, 6, 2, 10, 2))]
    assert batches(Tagged(), asked) == [(0, [0, 1]), (0, [2]), (0, [3]), (0, [4])]


def test_an_owner_with_many_links_and_requests_is_one_of_two() -> None:
    """The other's one request is not behind all of them."""
    flood = [(f"flood#{i % 3}", i, i % 3, 9) for i in range(9)]
    order = [who for _, requests in batches(Tagged(), [*flood, ("one#9", 50, 3, 2)])
             for who in requests]  # fmt: skip
    assert order.index(50) <= 1


class Several(OneDevice):
    """Matrices on two devices: the even ones on the first, the odd ones on the other."""

    count, here = 2, False

    def of(self, matrix: int) -> int:
        return matrix % 2


def test_a_device_that_is_busy_holds_up_no_other() -> None:
    """Each has a queue: what waits for one is joined there, and the other takes what is its own."""
    cipher = Tagged()
    crowd = Crowd(cipher, devices=Several)
    for request, matrix in enumerate((0, 2, 2, 1, 3)):
        crowd.ask(f"o{request}#{request}", request, matrix)
    for _ in range(2):  # the first of either device
        assert cipher.started.acquire(timeout=PATIENCE_S)
    assert not cipher.started.acquire(timeout=0.05)
    assert {matrix for matrix, _ in cipher.batches} == {0, 1}
    cipher.allowed.release(2)
    for _ in range(2):
        assert cipher.started.acquire(timeout=PATIENCE_S)
    cipher.allowed.release(2)
    assert len(crowd.get(5)) == 5
    assert sorted(cipher.batches[2:]) == [(2, [1, 2]), (3, [4])]
    crowd.server.stop()
    assert len(crowd.server._queues) == 0
    assert crowd.server._queues._busy == [0, 0]


def test_an_idle_worker_computes_at_once_and_as_many_as_it_has_places() -> None:
    """Nobody waits for company; the third of two places waits for either."""
    cipher = Tagged(launches=2)
    crowd = Crowd(cipher)
    for request in range(3):
        crowd.ask("ann#1", request, request)
    for _ in range(2):
        assert cipher.started.acquire(timeout=PATIENCE_S)
    assert not cipher.started.acquire(timeout=0.05)
    cipher.allowed.release(3)
    assert len(crowd.get(3)) == 3
    crowd.server.stop()


@pytest.mark.parametrize(("fate", "failed"), [(BROKEN, {1, 2}), (MALFORMED, {1})])
def test_a_fault_reaches_whom_it_concerns(fate: int, failed: set[int]) -> None:
    """The device's fault all of its product, a malformed request only its owner; nobody else."""
    cipher = Tagged()
    crowd = Crowd(cipher)
    crowd.ask("ann#1", 0, 3)
    assert cipher.started.acquire(timeout=PATIENCE_S)
    crowd.ask("ann#1", 1, 0, fate=fate)
    crowd.ask("ben#2", 2, 0)
    crowd.ask("cat#3", 3, 1)
    crowd.waits(3)
    cipher.allowed.release(6)
    got = crowd.get(4)
    refused = {request for (_, request), told in got.items() if isinstance(told, Refuse)}
    assert refused == failed
    assert all(m.reason is Reason.FAILED for m in got.values() if isinstance(m, Refuse))
    crowd.server.stop()


def test_a_cipher_that_gives_too_few_answers_has_failed() -> None:
    """Never somebody else's answer."""

    class Short(Tagged):
        def multiply_many(self, requests: Sequence[tuple[Any, int]], matrix: int) -> list[Any]:
            return super().multiply_many(requests, matrix)[1:]

    crowd = Crowd(Short(wait=False))
    crowd.ask("ann#1", 1, 0)
    assert crowd.get(1)["ann#1", 1] == Refuse(SESSION, 1, Reason.FAILED)
    crowd.server.stop()


def test_who_leaves_leaves_no_work_behind() -> None:
    """Not in the queue either, and others' requests are computed as before."""
    cipher = Tagged()
    crowd = Crowd(cipher)
    crowd.ask("ann#1", 0, 3)
    assert cipher.started.acquire(timeout=PATIENCE_S)
    for request in range(1, 5):
        crowd.ask("gone#2", request, 0)
    crowd.ask("ben#3", 9, 0)
    crowd.waits(5)
    crowd.server.lost("gone#2")
    crowd.waits(1)
    cipher.allowed.release(6)
    assert set(crowd.get(2)) == {("ann#1", 0), ("ben#3", 9)}
    assert cipher.batches == [(3, [0]), (0, [9])]
    assert not crowd.server._queues._since
    crowd.server.stop()


@settings(max_examples=15, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(2, 6), st.integers(0, 11)),
        min_size=1, max_size=40,
    ),
    launches=st.integers(1, 3),
)  # fmt: skip
def test_everyone_gets_their_own_answer(
    asked: list[tuple[int, int, int, int]], launches: int
) -> None:
    """Whatever the timing: own answers and refusals, nobody lost, no more at once than places.

    asked  (owner, matrix, tokens, fate): fate 0 is a malformed request, 1 makes its product fail
    """
    cipher = Tagged(launches, wait=False)
    crowd = Crowd(cipher)
    fates = {0: MALFORMED, 1: BROKEN}
    for owner in range(4):
        crowd.meet(f"o{owner}#{owner}")
    for number, (owner, matrix, tokens, fate) in enumerate(asked):
        crowd.ask(f"o{owner}#{owner}", number, matrix, tokens, fates.get(fate, 0))
    got = crowd.get(len(asked))
    crowd.server.stop()
    assert cipher.most <= launches
    for number, (owner, matrix, tokens, fate) in enumerate(asked):
        answer = got[f"o{owner}#{owner}", number]
        if isinstance(answer, Refuse):
            broken = any(m == matrix and f == 1 for _, m, _, f in asked)
            assert fate == 0 or broken
            continue
        assert isinstance(answer, Product)
        assert fate > 1
        assert bytes(answer.payload) == bytes((matrix, number, 0, 0)) + bytes(4 * (tokens - 1))


def test_a_cpu_gives_each_request_the_bits_that_it_has_alone() -> None:
    """Joined with others, of other lengths."""
    draw = np.random.default_rng(3)
    worker = MlweWorker()
    weight = draw.integers(-127, 128, (40, 24), np.int8)
    for forward in (True, False):
        matrix = worker.load(weight, forward, EXACT)
        inputs = 24 if forward else 40
        requests = [
            (draw.integers(0, 256, EXACT.limbs * tokens * inputs, np.uint8), tokens)
            for tokens in (1, 5, 2, 9)
        ]
        together = worker.multiply_many(requests, matrix)
        for (payload, tokens), answer in zip(requests, together, strict=True):
            np.testing.assert_array_equal(answer, worker.multiply(payload, tokens, matrix))
