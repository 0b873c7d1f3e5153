"""A worker that is told to stop, or that stops by itself, as its driver sees it."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from backends.he.mlwe_worker import MlweWorker
from backends.he.store import PreparedModel, WorkerPart
from backends.he.wire import EXACT
from backends.net.counts import LineEvent
from backends.net.devices import DevicesGoneError, OneDevice
from backends.net.listening import Limits
from backends.net.serving import serving
from backends.net.tls import dial
from backends.net.worker import WorkerServer
from protocol.events import Start
from protocol.messages import Hello, Multiply, Product, Reason, Refuse, Welcome, decode, encode
from tests.net.test_inprocess import make
from tests.net.test_remote_workers import Slow

SESSION = bytes(16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return make(tmp_path_factory.mktemp("model"))


class Driven:
    """A server whose products wait for `slow.go`, greeted, and what it has answered."""

    def __init__(self, model: PreparedModel) -> None:
        self.slow, self.answers = Slow(), queue.Queue[Any]()
        self.told: list[LineEvent] = []
        self.crashed = threading.Event()
        self.server = WorkerServer(
            OneDevice(model.catalogue(), self.slow, model.worker_matrices()),
            lambda peer, frame: self.answers.put(decode(frame)),
            tell=self.told.append, on_crash=self.crashed.set,
        )  # fmt: skip
        self.server.start()
        catalogue = model.catalogue()
        hello = Hello(SESSION, catalogue.parameters_digest, catalogue.model_digest)
        self.server.deliver("ann#1", encode(hello))
        assert isinstance(self.answers.get(timeout=10), Welcome)

    def ask(self, request: int) -> None:
        payload = bytes(EXACT.limbs * 24)
        self.server.deliver("ann#1", encode(Multiply(SESSION, request, 0, 1, payload)))


def test_new_requests_are_put_off_and_those_in_hand_are_answered(model: PreparedModel) -> None:
    """BUSY at once, whatever still computes; what came before is answered before the end."""
    driven = Driven(model)
    driven.ask(1)
    assert driven.slow.asked.wait(10)
    driven.ask(2)  # waits for the first
    ended: list[bool] = []
    drain = threading.Thread(target=lambda: ended.append(driven.server.finish(20)))
    drain.start()
    assert driven.server._draining.wait(10)
    driven.ask(3)
    assert driven.answers.get(timeout=10) == Refuse(SESSION, 3, Reason.BUSY)
    assert ended == []
    driven.slow.go.set()
    got = [driven.answers.get(timeout=10) for _ in range(2)]
    assert [(type(one), one.request) for one in got] == [(Product, 1), (Product, 2)]
    drain.join(10)
    assert ended == [True]
    assert driven.server.counts.refusals["busy"] == 1
    assert driven.server.counts.in_hand == 0
    driven.server.stop()


def test_what_is_put_off_does_not_wait(model: PreparedModel) -> None:
    """However much of it comes, the worker goes on reading."""
    part = WorkerPart.open(model.directory)
    payload = bytes(part.catalogue.up_bytes(0, 600))
    with serving(
        OneDevice.holding(part, MlweWorker()), "127.0.0.1", 0, None,
        limits=Limits(unhandled_bytes=len(payload)),
    ) as service:  # fmt: skip
        incoming, outgoing, _ = dial("127.0.0.1", service.port, None)
        service.server._draining.set()
        incoming.settimeout(5)
        for request in range(1, 6):
            outgoing.sendall(encode(Multiply(SESSION, request, 0, 600, payload)))
            answer = b""
            while len(answer) < len(encode(Refuse(SESSION, 1, Reason.BUSY))):
                answer += incoming.recv(100)
            assert decode(answer) == Refuse(SESSION, request, Reason.BUSY)
        incoming.close()
        outgoing.close()


def test_a_drain_that_takes_too_long_says_so(model: PreparedModel) -> None:
    """And one with nothing in hand takes no time."""
    driven = Driven(model)
    assert driven.server.finish(10)
    driven = Driven(model)
    driven.ask(1)
    assert driven.slow.asked.wait(10)
    assert not driven.server.finish(0.1)
    driven.slow.go.set()
    driven.server.stop()


def test_what_is_refused_is_told_once(model: PreparedModel) -> None:
    """For each peer and reason, by the owner's identity; every one is counted."""
    driven = Driven(model)
    for request in range(1, 6):
        driven.server.deliver("ann#1", encode(Multiply(SESSION, request, 7, 1, b"")))
        assert driven.answers.get(timeout=10).reason is Reason.UNKNOWN_MATRIX
    assert driven.told == [LineEvent("refused", "ann", "unknown_matrix")]
    assert driven.server.counts.refusals["unknown_matrix"] == 5
    driven.server.stop()


def test_a_worker_that_cannot_go_on_says_so(model: PreparedModel, tmp_path: Path) -> None:
    """Nobody is left to wait for one that is not there any more."""
    driven = Driven(model)
    driven.server._loop.post(Start())  # not a worker's event
    assert driven.crashed.wait(10)
    assert driven.server.failure.startswith("MisuseError")
    driven.server.stop()


def test_a_worker_whose_devices_are_gone_says_so(model: PreparedModel) -> None:
    """Whoever asked is refused, and the worker ends instead of refusing everybody for ever."""
    driven = Driven(model)

    def gone(requests: object, matrix: object) -> Any:
        raise DevicesGoneError("somebody took them away")

    driven.slow.multiply_many = gone  # type: ignore[method-assign]
    driven.slow.go.set()
    for request in (1, 2):
        driven.ask(request)
        assert driven.answers.get(timeout=10) == Refuse(SESSION, request, Reason.FAILED)
        assert driven.crashed.wait(10)
    assert driven.server.failure == "somebody took them away"
    driven.server.stop()
