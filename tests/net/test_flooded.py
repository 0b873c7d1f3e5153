"""What a worker does to those who send too much, read too little, or leave at the wrong moment."""

from __future__ import annotations

import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.he.interface import Payload, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.store import PreparedModel, WorkerPart
from backends.net import listening
from backends.net.backlog import Backlog
from backends.net.counts import LineEvent
from backends.net.devices import OneDevice
from backends.net.link import Link
from backends.net.listening import Limits, Listener
from backends.net.loop import Hooks
from backends.net.remote import connected
from backends.net.serving import serving
from backends.net.tls import OWNER_WRITES, WORKER_WRITES, dial, preface
from backends.net.worker import WorkerServer
from protocol.admission import Quota
from protocol.events import Event, FrameArrived, PeerLost
from protocol.messages import Bye, Hello, Multiply, Product, decode, encode
from protocol.worker import WorkerConfig
from tests.net.test_inprocess import expected, make
from tests.net.test_line import Ends, frame, sides

__all__ = ["sides"]  # a fixture
FRAME_MAX = 1 << 20
SESSION = bytes(16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return make(tmp_path_factory.mktemp("model"))


@contextmanager
def link_of(
    on_frame: Callable[[memoryview], None], frame_max: int = FRAME_MAX
) -> Iterator[tuple[Link, socket.socket, queue.Queue[str]]]:
    """(link, where its incoming frames are written, what it said of its end)."""
    (there, incoming), (back, outgoing) = socket.socketpair(), socket.socketpair()
    ended: queue.Queue[str] = queue.Queue()
    link = Link("test", incoming, outgoing, frame_max, on_frame, ended.put)
    link.start()
    try:
        yield link, there, ended
    finally:
        link.close("the test ends")
        there.close()
        back.close()


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for something; whether it came."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_an_announcement_takes_no_memory() -> None:
    """Only what has come does."""
    size = 1 << 29
    with link_of(lambda got: None, size + 100) as (_, there, _):
        before = rss_bytes()
        there.sendall(frame(100)[:24] + size.to_bytes(4, "little") + bytes(100_000))
        time.sleep(0.3)
        assert rss_bytes() - before < 1 << 25


def test_no_frame_comes_after_the_end() -> None:
    """Whatever its socket still holds: who is told of the end can let go of all it knows."""
    order: list[str] = []
    go = threading.Event()

    def on_frame(got: memoryview) -> None:
        order.append("frame")
        go.wait(10)

    with link_of(on_frame) as (link, there, ended):
        there.sendall(frame(10) * 100)
        assert until(lambda: bool(order))
        link.close("enough")
        go.set()
        assert ended.get(timeout=10) == "enough"
        time.sleep(0.05)
        assert order == ["frame"]
        assert ended.empty()


def test_a_link_that_is_cut_does_not_go_on_in_plain_text(
    sides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSLSocket.shutdown drops the TLS layer and leaves a socket that reads and writes without."""

    def dropped(self: ssl.SSLSocket, how: int) -> None:
        raise AssertionError("the TLS layer was taken off")

    monkeypatch.setattr(ssl.SSLSocket, "shutdown", dropped)
    ends = Ends(sides["ours/owner"], sides["ours/worker"])
    try:
        ends.dialler.send("w", frame(10))
        peer, _ = ends.next(ends.at_worker)
        ends.listener._links[peer].close("cut")
        assert {ends.next(ends.told)[0] for _ in range(2)} == {"worker lost", "disconnected"}
    finally:
        ends.close()


class Gone(socket.socket):
    """One that was reset while nobody looked."""

    def sendall(self, *data: Any) -> None:
        raise ConnectionResetError("drawn")


@pytest.mark.parametrize("gone", ["first half", "second half"])
def test_one_that_leaves_as_it_is_taken_leaves_nothing_behind(gone: str) -> None:
    """Neither half nor link: its owner has as many as before."""
    lost: queue.Queue[str] = queue.Queue()
    listener = Listener("127.0.0.1", 0, None, FRAME_MAX, lambda peer, got: None, lost.put)
    (near, far), (other_near, other_far) = socket.socketpair(), socket.socketpair()
    number = os.urandom(16)
    try:
        if gone == "second half":
            assert not listener._pair("plain", number, OWNER_WRITES, near), "it is taken"
            near = other_near
        with pytest.raises(ConnectionResetError):
            listener._pair("plain", number, WORKER_WRITES, Gone(fileno=near.detach()))
        assert listener._halves == {}
        if gone == "second half":
            assert lost.get(timeout=10).startswith("plain#")
        assert until(lambda: listener._links == {})
    finally:
        listener.close()
        for one in (near, far, other_near, other_far):
            one.close()


@pytest.mark.parametrize("greedy", [1, 3, 8])
def test_halves_that_never_become_links_keep_nobody_out(greedy: int) -> None:
    """However many owners leave theirs behind: one whose other half does come has its link, and of
    two such none loses the half that it has."""
    limits = Limits(opening=8, links_each=9)
    listener = Listener("127.0.0.1", 0, None, FRAME_MAX, lambda *_: None, lambda peer: None, limits)
    ends = [socket.socketpair() for _ in range(40 + 4)]
    try:
        for number in range(40):
            owner = f"greedy{number % greedy}"
            assert not listener._pair(owner, os.urandom(16), OWNER_WRITES, ends[number][0])
            assert len(listener._halves) <= limits.opening
        numbers = {owner: os.urandom(16) for owner in ("ann", "ben")}
        for (owner, number), (near, _) in zip(numbers.items(), ends[40:], strict=False):
            assert not listener._pair(owner, number, OWNER_WRITES, near)
        for (owner, number), (near, _) in zip(numbers.items(), ends[42:], strict=False):
            assert not listener._pair(owner, number, WORKER_WRITES, near)
        owners = {name.partition("#")[0] for name in listener._links}
        assert owners == {"ann", "ben"}
    finally:
        listener.close()
        for near, far in ends:
            near.close()
            far.close()


def test_a_preface_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not prolong it."""
    monkeypatch.setattr(listening, "HANDSHAKE_S", 0.5)
    ends = Ends(None, None)
    try:
        connection = socket.create_connection(("127.0.0.1", ends.listener.port))
        connection.settimeout(0.1)
        start = time.monotonic()
        for byte in preface(0, bytes(16))[:-1]:
            with suppress(TimeoutError):
                connection.sendall(bytes((byte,)))
                if connection.recv(1) == b"":
                    break
        assert time.monotonic() - start < 2.2
        connection.close()
    finally:
        ends.close()


def test_who_does_not_read_is_not_read() -> None:
    """Its answers do not pile up beyond the limit; when it reads, all of them come, in order."""
    answer, seen = bytes(60_000), []

    def on_frame(peer: str, got: memoryview) -> None:
        seen.append(peer)
        message = decode(got)
        assert isinstance(message, Multiply)
        made = encode(Product(SESSION, message.request, answer))
        listener.send(peer, made)

    limits = Limits(unsent_bytes=1 << 18)
    listener = Listener("127.0.0.1", 0, None, 1 << 17, on_frame, lambda peer: None, limits)
    listener.start()
    incoming, outgoing, _ = dial("127.0.0.1", listener.port, None)
    try:
        asked = 1000
        writer = threading.Thread(
            target=lambda: [outgoing.sendall(frame(10_000, n)) for n in range(asked)], daemon=True
        )
        writer.start()
        assert until(lambda: len(seen) > 4)
        time.sleep(0.5)
        stopped = len(seen)
        time.sleep(0.3)
        (link,) = listener._links.values()
        assert stopped == len(seen) < asked
        assert link._unsent < (1 << 18) + 2 * 60_100
        for number in range(asked):
            head = incoming.recv(36, socket.MSG_WAITALL)
            assert int.from_bytes(head[28:], "little") == number
            assert len(incoming.recv(len(answer), socket.MSG_WAITALL)) == len(answer)
    finally:
        incoming.close()
        outgoing.close()
        listener.close()


def test_unread_answers_of_an_owner_are_bounded_over_all_its_links(model: PreparedModel) -> None:
    """Who opens many links and reads none of them has no more than the bound, and what was in hand
    as it was reached; what it reads at last is all there."""
    part, quota, count = WorkerPart.open(model.directory), Quota(size=1 << 20), 12
    tokens, limits = 4096, Limits(links_each=count, unsent_bytes=0, unsent_each=2 << 20)
    catalogue = part.catalogue
    one = encode(Multiply(SESSION, 1, 0, tokens, bytes(catalogue.up_bytes(0, tokens))))
    hello = encode(Hello(SESSION, catalogue.parameters_digest, catalogue.model_digest))
    with serving(
        OneDevice.holding(part, MlweWorker()), "127.0.0.1", 0, None,
        WorkerConfig(quota=quota), limits,
    ) as service, ExitStack() as stack:  # fmt: skip

        def unsent() -> int:
            return sum(link.unsent for link in list(service.listener._links.values()))

        for _ in range(count):
            for connection in (ends := dial("127.0.0.1", service.port, None)[:2]):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
                stack.callback(connection.close)
            ends[1].sendall(hello)
            ends[1].settimeout(0.02)
            with suppress(TimeoutError):
                for _ in range(100):
                    ends[1].sendall(one)
        assert limits.unsent_each < unsent() <= limits.unsent_each + 2 * quota.size


@pytest.mark.parametrize(("each", "every"), [(1, 1), (70, 80), (1, 1100)])
def test_whoever_is_let_in_is_welcomed(model: PreparedModel, each: int, every: int) -> None:
    """As many links as one owner and all may have are as many sessions, whatever a configuration
    says of these."""
    part = WorkerPart.open(model.directory)
    catalogue, told = part.catalogue, list[LineEvent]()
    hello = encode(Hello(SESSION, catalogue.parameters_digest, catalogue.model_digest))
    with serving(
        OneDevice.holding(part, MlweWorker()), "127.0.0.1", 0, None,
        WorkerConfig(), Limits(each, every), tell=told.append,
    ) as service:  # fmt: skip
        for number in range(every):
            service.server.deliver(f"owner{number // each}#{number}", hello)
        assert until(lambda: service.server.meter.frames_sent == every)
    assert not told


def test_while_frames_pile_up_none_is_read() -> None:
    """And when they have been handled, reading goes on; a link that ends meanwhile does end."""
    flooded = threading.Event()
    flooded.set()
    got: queue.Queue[bytes] = queue.Queue()
    lost: queue.Queue[str] = queue.Queue()
    listener = Listener(
        "127.0.0.1", 0, None, FRAME_MAX, lambda peer, one: got.put(bytes(one)), lost.put,
        flooded=lambda peer: flooded.is_set(),
    )  # fmt: skip
    listener.start()
    incoming, outgoing, _ = dial("127.0.0.1", listener.port, None)
    try:
        outgoing.sendall(frame(10))
        time.sleep(0.2)
        assert got.empty()
        flooded.clear()
        assert len(got.get(timeout=10)) == len(frame(10))
        flooded.set()
        outgoing.sendall(frame(10))
        for link in list(listener._links.values()):
            link.close("cut")
        assert lost.get(timeout=10)
        assert got.qsize() <= 1  # one look may have been over when the flood came
    finally:
        incoming.close()
        outgoing.close()
        listener.close()


def test_an_owner_that_is_flooded_stops_reading_too() -> None:
    """A hostile worker must not fill its memory either; and its own requests go out meanwhile."""
    flooded = threading.Event()
    flooded.set()
    ends = Ends(None, None)
    ends.dialler._flooded = flooded.is_set
    try:
        ends.dialler.send("w", frame(10))
        peer, _ = ends.next(ends.at_worker)
        ends.listener.send(peer, frame(20))
        ends.dialler.send("w", frame(11))
        ends.next(ends.at_worker)
        time.sleep(0.1)
        assert ends.at_owner.empty()
        flooded.clear()
        assert len(ends.next(ends.at_owner)[1]) == len(frame(20))
    finally:
        ends.close()


def test_what_was_handled_does_not_count() -> None:
    """Frame by frame; whoever else looks on still does."""
    seen: list[Event] = []
    backlog = Backlog(1000, Hooks(observe=lambda event, effects: seen.append(event)))
    got = memoryview(bytearray(400))
    for _ in range(100):
        backlog.arrived("w", got)
        assert not backlog.full()
        backlog.arrived("w", got)
        assert backlog.full()
        for _ in range(2):
            backlog.observe(FrameArrived("w", got), [])
            backlog.observe(PeerLost("w"), [])
    assert len(seen) == 400


def test_a_link_that_sends_more_than_is_handled_keeps_no_other_waiting(
    model: PreparedModel,
) -> None:
    """Of each link few frames wait in the line of all, however small and many they are."""
    part, go, order = WorkerPart.open(model.directory), threading.Event(), list[str]()
    catalogue = part.catalogue
    hello = encode(Hello(SESSION, catalogue.parameters_digest, catalogue.model_digest))
    small = encode(Multiply(SESSION, 1, 0, 1, bytes(catalogue.up_bytes(0, 1))))

    def observe(event: Event, effects: object) -> None:
        if isinstance(event, FrameArrived):
            order.append(event.peer)
            assert go.wait(10)

    with serving(
        OneDevice.holding(part, MlweWorker()), "127.0.0.1", 0, None, hooks=Hooks(observe=observe)
    ) as service, ExitStack() as stack:  # fmt: skip
        links = [dial("127.0.0.1", service.port, None)[:2] for _ in range(3)]
        for one in (connection for link in links for connection in link):
            stack.callback(one.close)
        for _, outgoing in links[:2]:
            threading.Thread(target=outgoing.sendall, args=(small * 2000,), daemon=True).start()
        assert until(lambda: len(order) == 1)
        time.sleep(0.2)
        links[2][1].sendall(hello)
        time.sleep(0.1)
        go.set()
        assert until(lambda: "plain#3" in order)
        assert order.index("plain#3") <= 2 * 40
        assert until(lambda: len(order) == 4001)


def test_the_narrowest_limits_still_serve(model: PreparedModel) -> None:
    """One frame at a time, one answer at a time: slower, and right."""
    part = WorkerPart.open(model.directory)
    limits = Limits(unsent_bytes=0, unhandled_bytes=0)
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    with (
        serving(
            OneDevice.holding(part, MlweWorker()),
            "127.0.0.1",
            0,
            None,
            None,
            limits,
        ) as service,
        connected(model, owner, [f"127.0.0.1:{service.port}"], None) as client,
    ):
        for rows in range(1, 9):
            x = np.random.default_rng(rows).standard_normal((rows, 24)).astype(np.float32)
            assert np.allclose(client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)


class Held(MlweWorker):
    """Multiplies when it is told to, and counts."""

    multiply_many = WorkerCipher.multiply_many  # one by one

    def __init__(self) -> None:
        super().__init__()
        self.go, self.done = threading.Event(), 0

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> Any:
        assert self.go.wait(10)
        self.done += 1
        return super().multiply(payload, tokens, matrix)


def test_work_of_a_peer_that_is_gone_is_given_up(model: PreparedModel) -> None:
    """Who comes again and again under new names leaves none behind, and nobody waits for it."""
    part, cipher = WorkerPart.open(model.directory), Held()
    answers: queue.Queue[tuple[str, Any]] = queue.Queue()
    server = WorkerServer(
        OneDevice.holding(part, cipher),
        lambda peer, got: answers.put((peer, decode(got))),
    )
    server.start()
    catalogue = part.catalogue
    hello = encode(Hello(SESSION, catalogue.parameters_digest, catalogue.model_digest))
    payload = bytes(catalogue.up_bytes(0, 1))
    for name in ("first", "second", "third", "good"):
        server.deliver(name, hello)
        for number in range(1, 2 if name == "good" else 20):
            server.deliver(name, encode(Multiply(SESSION, number, 0, 1, payload)))
        if name != "good":
            server.lost(name)
    server.deliver("good", encode(Bye(SESSION)))
    assert until(lambda: answers.qsize() == 5)  # four Welcomes, a Farewell: all was handled
    server.deliver("good", hello)
    server.deliver("good", encode(Multiply(SESSION, 2, 0, 1, payload)))
    cipher.go.set()
    try:
        assert until(lambda: any(isinstance(m, Product) for _, m in list(answers.queue)))
        assert cipher.done <= 3  # the one under way, and those of the good peer
    finally:
        server.stop()
