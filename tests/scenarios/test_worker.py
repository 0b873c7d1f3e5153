"""`python -m scenarios.worker`: what its operator sees, and how it ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backends.he.mlwe_owner import MlweOwner
from backends.he.params import preset
from backends.he.store import PreparedModel
from backends.net import remote
from backends.net.dialling import WorkerUnreachableError
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient, RemoteLinearError
from backends.net.remote import connected
from backends.net.tls import Tls
from protocol.events import Event, FrameArrived, Send, TimerFired
from protocol.messages import SESSION_BYTES, Multiply, Product, Reason, Refuse, encode
from protocol.owner_memory import OwnerConfig
from scenarios.certs import Authority
from scenarios.line import LineWatch, watched
from scenarios.worker.__main__ import parsed
from scenarios.worker.run import State, shards_of
from scenarios.worker_log import EventLog
from tests.net.test_inprocess import make
from tests.net.test_remote_workers import copy_worker_part, right
from tests.scenarios.commands import ROOT, run
from tests.scenarios.worker_process import WorkerProcess, running

HASTY = OwnerConfig(hello_timeout_s=0.5, request_timeout_s=20, greetings_max=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def part(model: PreparedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a worker's machine has of it."""
    place = tmp_path_factory.mktemp("part") / "model"
    copy_worker_part(model, place)
    return place


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, authority = tmp_path_factory.mktemp("certs"), Authority()
    authority.issue(place / "owner")
    authority.issue(place / "worker", ["localhost"])
    return place


@contextmanager
def owner(
    model: PreparedModel, certs: Path, *workers: WorkerProcess, config: OwnerConfig = HASTY,
    hooks: Hooks | None = None,
) -> Iterator[OwnerClient]:  # fmt: skip
    cipher = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(cipher)
    addresses = [worker.address for worker in workers]
    tls = Tls(certs / "owner")
    with connected(model, cipher, addresses, tls, config, lanes=2, hooks=hooks) as client:
        yield client


def test_a_worker_says_how_it_is_and_ends_well(
    model: PreparedModel, part: Path, certs: Path
) -> None:
    """Pages, counters and log, from a directory with the worker's part alone; status 0."""
    with running(part, tls=certs / "worker") as worker:
        assert worker.page("/readyz") == worker.page("/healthz") == (200, "ok\n")
        assert worker.page("/")[0] == 404
        with owner(model, certs, worker) as client:
            assert all(right(model, client, rows) for rows in (1, 2, 3))
            numbers = worker.metrics()
            assert (numbers["links"], numbers["links_opened_total"], numbers["ready"]) == (1, 1, 1)
        assert numbers["requests_total"] == numbers["products_total"] == 3
        assert (numbers["tokens_total"], numbers["requests_in_hand"]) == (6, 0)
        assert 0 < numbers["busy_seconds_total"] < 60
        assert numbers["received_bytes_total"] > 6 * 3 * 24
        assert numbers["sent_bytes_total"] > 6 * 2 * 40
        worker.wait_for("link-ended")
        worker.signal()
        assert worker.ended() == 0
    events = [event["event"] for event in worker.log]
    assert events == [
        "loading", "listening", "link-opened", "link-ended", "draining", "stopped",
    ]  # fmt: skip
    assert worker.log[-1]["how"] == "drained"
    assert worker.log[1]["model"] == model.model_digest.hex()
    assert [len(e["owner"]) for e in worker.log if e["event"].startswith("link")] == [16, 16]


def test_counters_tell_of_nobody(model: PreparedModel, part: Path, certs: Path) -> None:
    """No label but the reason of a refusal, and nothing of an owner's identity."""
    with running(part, tls=certs / "worker") as worker, owner(model, certs, worker) as client:
        assert right(model, client)
        text = worker.page("/metrics")[1]
        identity = worker.wait_for("link-opened")["owner"]
        assert identity not in text
        labels = {line.partition("{")[2].partition("=")[0] for line in text.splitlines()}
        assert labels == {"", "reason"}


def test_requests_in_hand_are_answered_before_the_end(
    model: PreparedModel, part: Path, certs: Path
) -> None:
    """Told to stop in the middle of one: not ready, healthy, and the answer still comes."""
    with running(part, tls=certs / "worker", slow_s=3) as worker:
        with owner(model, certs, worker) as client:
            done: list[bool] = []
            lane = threading.Thread(target=lambda: done.append(right(model, client)))
            lane.start()
            worker.wait_for("link-opened")
            worker.wait_for_a_request()
            worker.signal()
            assert worker.wait_for("draining")["in_hand"] == 1
            assert worker.page("/readyz")[0] == 503
            assert worker.page("/healthz")[0] == 200
            host, _, port = worker.address.rpartition(":")
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((host, int(port)), timeout=5)
            lane.join(20)
            assert done == [True]
        assert worker.ended() == 0
    assert worker.log[-1]["how"] == "drained"
    assert worker.log[-1]["unanswered"] == 0


def test_how_long_requests_were_under_way_is_seen(
    model: PreparedModel, part: Path, certs: Path
) -> None:
    """Over a real link: what a run says of its line, and of the time it will take, rests on it."""
    watch, slow_s = LineWatch(), 0.3
    with (
        running(part, tls=certs / "worker", slow_s=slow_s) as worker,
        owner(model, certs, worker, hooks=watched(Hooks(), watch)) as client,
    ):
        start = time.perf_counter()
        assert right(model, client)
        assert slow_s < watch.away_s < time.perf_counter() - start


@pytest.mark.parametrize("how", ["out of time", "at once"])
def test_a_drain_ends(how: str, model: PreparedModel, part: Path, certs: Path) -> None:
    """After its seconds, or by a second signal, whatever is still computed."""
    options = ("--drain-s", "0.3" if how == "out of time" else "60")
    with running(part, *options, tls=certs / "worker", slow_s=20) as worker:
        cipher_wait = threading.Thread(target=_ask_in_vain, args=(model, certs, worker))
        cipher_wait.start()
        worker.wait_for("link-opened")
        worker.wait_for_a_request()
        worker.signal()
        worker.wait_for("draining")
        if how == "at once":
            worker.signal(signal.SIGINT)
        assert worker.ended(10) == (0 if how == "out of time" else 1)
        assert how in worker.log[-1]["how"]
        cipher_wait.join(30)


def _ask_in_vain(model: PreparedModel, certs: Path, worker: WorkerProcess) -> None:
    with owner(model, certs, worker) as client, pytest.raises(RemoteLinearError):
        client.linear(0, np.ones((1, 24), np.float32))


def test_refusals_say_why(
    model: PreparedModel, part: Path, certs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To the owner and to the operator: another model, too many links, a stranger."""
    monkeypatch.setattr(remote, "REACHED_S", 1.0)
    other = make(tmp_path / "other", seed=1)
    Authority().issue(tmp_path / "stranger")
    with running(part, "--links-per-owner", "1", tls=certs / "worker") as worker:
        with (
            owner(other, certs, worker) as client,
            pytest.raises(RemoteLinearError, match="another model"),
        ):
            client.linear(0, np.ones((1, 24), np.float32))
        refused = worker.wait_for("refused")
        assert refused["reason"] == "other_model"
        assert other.model_digest.hex() in refused["detail"]
        assert model.model_digest.hex() in refused["detail"]
        with owner(model, certs, worker) as client:
            assert right(model, client)
            with (
                pytest.raises(WorkerUnreachableError, match="as many links as it takes"),
                owner(model, certs, worker),
            ):
                raise AssertionError("it was let in")
            assert right(model, client)
        host, _, port = worker.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(100)
        numbers = worker.metrics()
        worker.signal()
        assert worker.ended() == 0
    assert numbers['refusals_total{reason="other_model"}'] == 1
    assert numbers['refusals_total{reason="owner_links"}'] >= 1
    assert numbers['refusals_total{reason="handshake"}'] == 1
    reasons = [event["reason"] for event in worker.log if event["event"] == "refused"]
    assert set(reasons) == {"other_model", "owner_links", "handshake"}


def test_a_log_is_not_filled_by_strangers(tmp_path: Path) -> None:
    """So many refusals a minute, and how many were left out."""
    from backends.net.counts import REFUSED, TURNED_AWAY, LineEvent

    with (tmp_path / "log").open("wb") as file:
        log = EventLog("text", file.fileno())
        for _ in range(1000):
            log.on_line(LineEvent(REFUSED, "", TURNED_AWAY, "SSLError"))
        log._minute_s -= 61
        log.on_line(LineEvent(REFUSED, "ab" * 32, TURNED_AWAY, "a text of several words"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 31
    assert lines[0].endswith("refused owner=unknown reason=handshake detail=SSLError")
    last = 'owner=abababababababab reason=handshake detail="a text of several words" unsaid=970'
    assert lines[-1].endswith(last)


def test_a_log_is_not_filled_by_owners_that_come_and_go(tmp_path: Path) -> None:
    """Each kind of line has its own room."""
    from backends.net.counts import ENDED, OPENED, LineEvent

    with (tmp_path / "log").open("wb") as file:
        log = EventLog("text", file.fileno())
        for _ in range(100):
            log.on_line(LineEvent(OPENED, "ab" * 32))
            log.on_line(LineEvent(ENDED, "ab" * 32, "cut"))
        log._minute_s -= 61
        log.on_line(LineEvent(ENDED, "ab" * 32, "cut"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("link-opened" in line for line in lines) == 30
    assert sum("link-ended" in line for line in lines) == 31
    assert lines[-1].endswith("link-ended owner=abababababababab why=cut unsaid=70")


def test_a_log_is_not_filled_by_messages(tmp_path: Path) -> None:
    """Of a device that fails every request, say; each level has its own room."""
    with (tmp_path / "log").open("wb") as file:
        log = EventLog("text", file.fileno())
        for _ in range(100):
            log.message("info", "a frame was dropped")
            log.message("error", "a product failed")
        log._minute_s -= 61
        log.message("error", "a product failed")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("level=info" in line for line in lines) == 30
    assert sum("level=error" in line for line in lines) == 31
    assert lines[-1].endswith('message level=error text="a product failed" unsaid=70')


def test_a_log_that_cannot_be_written_is_done_without() -> None:
    """A full disk: no exception reaches whoever tells."""
    with Path("/dev/full").open("wb", buffering=0) as full:
        EventLog("json", full.fileno()).event("listening")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere"], "a worker needs manifest.json"),
        (["--model", "nowhere", "--listen", "0.0.0.0:7443"], "needs TLS on both sides"),
        (["--model", "nowhere", "--listen", "7443"], "looks like gpu.example:7443"),
        (["--model", "nowhere", "--metrics", "192.0.2.1:1"], "choose another --metrics"),
        (["--model", "nowhere", "--tls", "nowhere"], "nowhere has no ca.pem"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(options: list[str], said: str) -> None:
    """No traceback."""
    text = run("scenarios.worker", *options, code=1)
    assert said in text
    assert "Traceback" not in text


def test_shards_are_told_where_the_model_is_from_any_directory(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processes are not in the front door's."""
    asked: list[Path] = []

    def shards(of: object, directory: Path, *_: object) -> SimpleNamespace:
        asked.append(directory)
        return SimpleNamespace(name="any", count=1)

    cluster = SimpleNamespace(leave=lambda: None, RayShards=shards)
    monkeypatch.chdir(part.parent)
    monkeypatch.setattr("scenarios.worker.run.joined", lambda address: cluster)
    monkeypatch.setattr("sys.argv", ["worker", "--model", part.name, "--ray"])
    with ExitStack() as stack:
        shards_of(parsed(), EventLog("text"), stack)
    assert asked == [part]


def test_calls_without_an_answer_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest first; those whose answer comes count as before."""
    monkeypatch.setattr("scenarios.line._UNDER_WAY_MAX", 3)
    watch, nobody = LineWatch(), bytes(SESSION_BYTES)

    def sent(*calls: int) -> None:
        watch.observe(
            TimerFired("t"), [Send("w", encode(Multiply(nobody, n, 0, 1, b""))) for n in calls]
        )

    sent(*range(1, 100))
    assert list(watch._sent) == [97, 98, 99]
    for call in (1, 50, 96):
        watch.observe(FrameArrived("w", encode(Product(nobody, call, b""))), [])
    assert watch.away_s == 0.0
    watch.observe(FrameArrived("w", encode(Product(nobody, 97, b""))), [])
    assert watch.away_s > 0.0
    assert list(watch._sent) == [98, 99]
    sent(100, 98)  # again: it is under way since it was first sent
    assert list(watch._sent) == [98, 99, 100]


def test_what_a_worker_does_not_take_yet_is_neither_the_line_nor_the_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From BUSY with a time to come back in until the request is sent again, there or elsewhere."""
    now = [0.0]
    monkeypatch.setattr("scenarios.line.time.perf_counter", lambda: now[0])
    watch, nobody = LineWatch(), bytes(SESSION_BYTES)

    def at(seconds: float, event: Event, *frames: bytes) -> None:
        now[0] = seconds
        watch.observe(event, [Send("w", frame) for frame in frames])

    ask = encode(Multiply(nobody, 7, 0, 1, b""))
    at(0, TimerFired("t"), ask)
    at(1, FrameArrived("w", encode(Refuse(nobody, 7, Reason.BUSY, 500))))
    at(3, TimerFired("t"), ask)
    at(4, FrameArrived("w", encode(Refuse(nobody, 7, Reason.BUSY))), ask)  # it drains: another
    at(9, FrameArrived("w", encode(Product(nobody, 7, b""))))
    assert (watch.away_s, watch.held_s) == (1 + 6, 2)
    assert not watch._told


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_that_nobody_reads_holds_nobody_up(form: str) -> None:
    """A pipe that is full; when it is read again, whole lines come again."""
    reader, writer = os.pipe()
    log = EventLog(form, writer)
    begun = time.monotonic()
    for _ in range(3000):
        log.event("message", text="\u00fc" * 500)
    assert time.monotonic() - begun < 5
    with os.fdopen(reader, "rb") as read:
        first = read.readline()
        while len(read.peek(1)) and select.select([reader], [], [], 0)[0]:
            read.readline()
        log.event("again", text="x" * 100_000)
        os.close(writer)
        lines = read.read().splitlines()
    assert first.endswith(b"\n")
    assert all(len(line) < select.PIPE_BUF for line in lines)
    assert b"again" in lines[-1]


def test_a_second_signal_waits_for_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads what it writes there."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(select.PIPE_BUF))
    os.set_blocking(writer, True)
    ends: list[int] = []
    monkeypatch.setattr("scenarios.worker.run.os._exit", ends.append)
    state = State(EventLog("text", writer))
    both = threading.Thread(
        target=lambda: [state._signalled(signal.SIGTERM, None) for _ in range(2)], daemon=True
    )
    both.start()
    both.join(5)
    assert ends == [1]
    os.close(reader)
    os.close(writer)


def test_a_worker_whose_log_nobody_reads_ends(part: Path) -> None:
    """When all is answered, as any other: its log's pipe is full."""
    fill = "import os; os.set_blocking(1, False)\ntry:\n while 1: os.write(1, b'x' * 4096)\n"
    fill += "except BlockingIOError: os.set_blocking(1, True)\n"
    code = fill + "import scenarios.worker.__main__ as w; w.main()"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--model", str(part), "--listen", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_signal_that_another_thread_receives_is_heard() -> None:
    """By the thread that waits for the end, which it does not wake up."""
    state = State(EventLog("json"))
    before = signal.signal(signal.SIGTERM, state._signalled)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        send = threading.Timer(0.2, signal.pthread_kill, (other.ident, signal.SIGTERM))
        send.start()
        state.wait_for_end()
        send.join()
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)
    assert not state.serving
