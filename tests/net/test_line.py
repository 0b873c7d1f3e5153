"""The line between machines: frames whole and in order, links that end and open again, strangers.

Everything over real sockets on loopback, with certificates of a new authority.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from backends.net.counts import ENDED, OPENED, LineEvent
from backends.net.dialling import Dialler
from backends.net.listening import Limits, Listener
from backends.net.tls import (
    FULL,
    OWNER_WRITES,
    TAKEN,
    WORKER_WRITES,
    CertificateError,
    Tls,
    dial,
    preface,
)
from protocol.messages import Bye, Multiply, decode, encode
from scenarios.certs import Authority

FRAME_MAX = 1 << 20
SESSION = bytes(16)


def frame(size: int, request: int = 1) -> bytes:
    made = encode(Multiply(SESSION, request, 0, 1, os.urandom(size)))
    assert isinstance(made, bytes)
    return made


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of certificates: of one authority, of another, and one that has expired."""
    made = {}
    for kind, days in (("ours", 1.0), ("theirs", 1.0), ("expired", -0.5)):
        authority = Authority(days)
        place = tmp_path_factory.mktemp(kind)
        for side, hosts in (("owner", []), ("worker", ["localhost", "127.0.0.1"]),
                            ("elsewhere", ["gpu.example"])):  # fmt: skip
            authority.issue(place / side, hosts)
            made[f"{kind}/{side}"] = place / side
    for kind in ("theirs", "expired"):
        # One that believes our authority, with a certificate that ours did not sign, or long ago.
        mixed = made[f"{kind}/believer"] = tmp_path_factory.mktemp("mixed") / "owner"
        shutil.copytree(made[f"{kind}/owner"], mixed)
        shutil.copy(made["ours/owner"] / "ca.pem", mixed / "ca.pem")
    return made


class Ends:
    """A listener and a dialler, and what each was told."""

    def __init__(
        self, owner: Path | None, worker: Path | None, limits: Limits | None = None,
        believe: Callable[[str, str], str] = lambda worker, identity: "",
    ) -> None:  # fmt: skip
        self.at_worker: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.at_owner: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.told: queue.Queue[tuple[str, str]] = queue.Queue()
        self.listener = Listener(
            "127.0.0.1", 0, Tls(worker) if worker else None, FRAME_MAX,
            lambda peer, got: self.at_worker.put((peer, bytes(got))),
            lambda peer: self.told.put(("worker lost", peer)), limits,
        )  # fmt: skip
        self.listener.start()
        self.dialler = Dialler(
            {"w": ("localhost" if owner else "127.0.0.1", self.listener.port)},
            Tls(owner) if owner else None, FRAME_MAX,
            lambda peer, got: self.at_owner.put((peer, bytes(got))),
            lambda peer: self.told.put(("disconnected", peer)),
            lambda peer, why: self.told.put(("lost", why)), believe,
        )  # fmt: skip

    def close(self) -> None:
        self.dialler.close()
        self.listener.close()

    def next(self, source: queue.Queue[Any]) -> Any:
        return source.get(timeout=10)


@pytest.fixture(params=["tls", "plain"])
def ends(request: pytest.FixtureRequest, sides: dict[str, Path]) -> Iterator[Ends]:
    with_tls = request.param == "tls"
    made = Ends(
        sides["ours/owner"] if with_tls else None, sides["ours/worker"] if with_tls else None
    )
    yield made
    made.close()


def test_frames_arrive_whole_and_in_order_both_ways(ends: Ends) -> None:
    """Of every size up to the largest, many at once."""
    sizes = [0, 1, 16_383, 16_384, 16_385, 300_000, FRAME_MAX - 28 - 16, *range(50)]
    sent = [frame(size, n) for n, size in enumerate(sizes)]
    for one in sent:
        ends.dialler.send("w", one)
    got = [ends.next(ends.at_worker) for _ in sent]
    assert [body for _, body in got] == sent
    (peer,) = {name for name, _ in got}
    for one in sent:
        ends.listener.send(peer, one)
    assert [ends.next(ends.at_owner) for _ in sent] == [("w", body) for body in sent]


def test_a_link_that_ended_is_opened_again_by_the_next_frame(ends: Ends) -> None:
    """Both sides hear of the end; the peer has another name at the worker then."""
    ends.dialler.send("w", frame(10))
    first, _ = ends.next(ends.at_worker)
    ends.listener._links[first].close("cut")
    told = {ends.next(ends.told) for _ in range(2)}
    assert told == {("worker lost", first), ("disconnected", "w")}
    ends.dialler.send("w", frame(11))
    second, _ = ends.next(ends.at_worker)
    assert second != first
    assert second.partition("#")[0] == first.partition("#")[0]
    ends.listener.send(first, frame(12))  # nobody is called that any more
    ends.listener.send(second, frame(13))
    assert len(ends.next(ends.at_owner)[1]) == len(frame(13))


def test_a_worker_that_is_not_there_is_tried_again(ends: Ends) -> None:
    """Each frame is one attempt, later and later; nothing blocks the caller."""
    ends.listener.close()
    start = time.monotonic()
    ends.dialler.send("w", frame(1))
    assert time.monotonic() - start < 1
    assert ends.next(ends.told) == ("disconnected", "w")
    ends.dialler.send("w", frame(1))
    assert ends.next(ends.told) == ("disconnected", "w")
    assert time.monotonic() - start > 0.15


STRANGERS = {
    "another authority's owner": ("theirs/believer", "ours/worker"),
    "an owner of another world": ("theirs/owner", "ours/worker"),
    "another authority's worker": ("ours/owner", "theirs/worker"),
    "an expired owner": ("expired/believer", "ours/worker"),
    "an expired worker": ("ours/owner", "expired/worker"),
    "a worker whose certificate ran out": ("expired/owner", "expired/worker"),
    "a worker of another name": ("ours/owner", "ours/elsewhere"),
    "an owner that passes for a worker": ("ours/owner", "ours/owner"),
}


SAID = {
    "a worker whose certificate ran out": "its certificate has expired; make new ones",
    "a worker of another name": "does not name 'localhost'; dial it by a name that it has",
}


@pytest.mark.parametrize("who", STRANGERS)
def test_strangers_are_not_spoken_to(who: str, sides: dict[str, Path]) -> None:
    """No frame of the owner arrives anywhere, and it hears that the worker is not there."""
    owner, worker = (sides[name] for name in STRANGERS[who])
    ends = Ends(owner, worker)
    try:
        ends.dialler.send("w", frame(10))
        kind, why = ends.next(ends.told)
        assert kind == "lost"
        assert SAID.get(who, "ca.pem") in why
        believed = "owner" not in who or "world" in who or "passes" in who
        assert ("is not believed" if believed else "does not believe") in why
        assert ends.at_worker.empty()
    finally:
        ends.close()


def test_an_identity_that_was_retired_gets_nothing(sides: dict[str, Path]) -> None:
    """Whatever its address: the key is what counts."""
    seen: list[str] = []

    def believe(worker: str, identity: str) -> str:
        seen.append(identity)
        return "it was caught"

    ends = Ends(sides["ours/owner"], sides["ours/worker"], believe=believe)
    try:
        ends.dialler.send("w", frame(10))
        assert ends.next(ends.told) == ("lost", "it was caught")
        assert ends.at_worker.empty()
        assert [len(identity) for identity in seen] == [64]
    finally:
        ends.close()


def test_a_dropped_worker_has_no_link_any_more(ends: Ends) -> None:
    """The link is closed at once, that is said, and a frame opens no other."""
    ends.dialler.send("w", frame(10))
    ends.next(ends.at_worker)
    ends.dialler.drop("w", "caught")
    ends.dialler.drop("w", "caught")
    told = [ends.next(ends.told) for _ in range(2)]
    assert sorted(kind for kind, _ in told) == ["lost", "worker lost"]
    assert ("lost", "caught") in told
    ends.dialler.send("w", frame(11))
    assert not ends.dialler._lines["w"].opening
    assert ends.told.empty()
    assert ends.at_worker.empty()


def _dials(
    monkeypatch: pytest.MonkeyPatch, *answers: Exception | None
) -> tuple[Dialler, queue.Queue[tuple[str, str]]]:
    """A dialler whose attempts end so (None: a link that is cut), and what it says."""
    told: queue.Queue[tuple[str, str]] = queue.Queue()
    left = list(answers)

    def dialled(*where: object) -> tuple[Any, Any, str]:
        error = left.pop(0)
        if error is not None:
            raise error
        pairs = [socket.socketpair() for _ in range(2)]
        for _, other in pairs:
            other.close()
        return pairs[0][0], pairs[1][0], "key"

    monkeypatch.setattr("backends.net.dialling.dial", dialled)
    monkeypatch.setattr("backends.net.dialling._WAIT_S", (0.0, 0.0))
    dialler = Dialler(
        {"w": ("localhost", 1)}, None, FRAME_MAX, lambda worker, got: None,
        lambda worker: told.put(("disconnected", worker)),
        lambda worker, why: told.put(("lost", why)),
    )  # fmt: skip
    return dialler, told


def test_who_was_believed_is_not_lost_by_one_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another box behind the address for a moment is a line that broke."""
    wrong = CertificateError("not believed")
    dialler, told = _dials(monkeypatch, wrong, None, wrong)
    said = []
    for _ in range(3):
        dialler.send("w", frame(1))
        said.append(told.get(timeout=10)[0])
    assert said == ["lost", "disconnected", "disconnected"]


def test_no_failure_of_a_dial_is_the_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is; nor does the wait between them grow out of a float."""
    dialler, told = _dials(monkeypatch, ValueError("?"), RuntimeError("?"), OSError("?"))
    dialler._lines["w"].failures = 5000
    for _ in range(3):
        dialler.send("w", frame(1))
        assert told.get(timeout=10) == ("disconnected", "w")


class _LateTaken(socket.socket):
    """Its thread is not scheduled for a moment, when it is to say TAKEN."""

    def sendall(self, data: Any, *flags: Any) -> None:
        if data == TAKEN:
            self.inside.set()  # type: ignore[attr-defined]
            time.sleep(0.2)
        super().sendall(data, *flags)


def test_a_link_begins_when_both_halves_know_it() -> None:
    """Before that the first half's thread may write, and OpenSSL allows no other."""
    listener = Listener(
        "127.0.0.1", 0, None, FRAME_MAX, lambda peer, got: listener.send(peer, bytes(got)),
        lambda peer: None,
    )  # fmt: skip
    (near, far), (near_2, far_2) = socket.socketpair(), socket.socketpair()
    first, number = _LateTaken(fileno=near.detach()), os.urandom(16)
    first.inside = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener._pair, args=("o", number, WORKER_WRITES, first))
    thread.start()
    assert first.inside.wait(10)  # type: ignore[attr-defined]
    far_2.sendall(frame(1))
    assert listener._pair("o", number, OWNER_WRITES, near_2) == ""
    assert far_2.recv(1) == TAKEN
    assert far.recv(1) == TAKEN
    thread.join(10)
    listener.close()
    far.close()


class _Gone(socket.socket):
    def sendall(self, data: Any, *flags: Any) -> None:
        raise ConnectionResetError


def test_a_link_that_ends_as_it_begins_is_told_as_opened_first() -> None:
    """And gone before anybody is told of its end, who may fail at that."""
    told: list[str] = []
    ended = threading.Event()

    def tell(event: LineEvent) -> None:
        told.append(event.kind)
        raise OSError("the log's disk is full")

    listener = Listener(
        "127.0.0.1", 0, None, FRAME_MAX, lambda peer, got: None, lambda peer: ended.set(),
        tell=tell,
    )  # fmt: skip
    pairs, number = [socket.socketpair() for _ in range(2)], os.urandom(16)
    assert listener._pair("o", number, WORKER_WRITES, pairs[0][0]) == ""
    with pytest.raises(ConnectionResetError):
        listener._pair("o", number, OWNER_WRITES, _Gone(fileno=pairs[1][0].detach()))
    assert ended.wait(10)
    while len(told) < 2:
        time.sleep(0.01)
    assert told == [OPENED, ENDED]
    assert listener._links == {}
    listener.close()


def test_accepting_goes_on_when_nobody_can_be_told() -> None:
    """Of a stranger who was put out."""
    ends = Ends(None, None, Limits(opening=1))

    def tell(event: LineEvent) -> None:
        raise OSError("the log's disk is full")

    from backends.net.counts import guarded

    ends.listener._tell = guarded(tell)
    try:
        silent = [socket.create_connection(("127.0.0.1", ends.listener.port)) for _ in range(3)]
        ends.dialler.send("w", frame(10))
        ends.next(ends.at_worker)
        for one in silent:
            one.close()
    finally:
        ends.close()


def test_a_common_name_is_no_host(tmp_path: Path) -> None:
    """A worker is believed for the names that its certificate lists."""
    authority = Authority()
    authority.issue(tmp_path / "owner")
    authority.issue(tmp_path / "worker", ["203.0.113.7"])
    ends = Ends(tmp_path / "owner", tmp_path / "worker")
    try:
        raw = socket.create_connection(("127.0.0.1", ends.listener.port))
        with pytest.raises(ssl.SSLCertVerificationError, match="worker"):
            Tls(tmp_path / "owner").context(server=False).wrap_socket(raw, server_hostname="worker")
    finally:
        ends.close()


def raw_link(ends: Ends, tls: Tls) -> tuple[Any, Any]:
    incoming, outgoing, _ = dial("localhost", ends.listener.port, tls)
    return incoming, outgoing


def attack_oversize(incoming: Any, outgoing: Any) -> None:
    outgoing.sendall(frame(100)[:24] + (1 << 30).to_bytes(4, "little"))


def attack_garbage(incoming: Any, outgoing: Any) -> None:
    outgoing.sendall(os.urandom(1000))


def attack_torn(incoming: Any, outgoing: Any) -> None:
    outgoing.sendall(frame(1000)[:500])
    outgoing.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("attack", [attack_oversize, attack_garbage, attack_torn])
def test_what_is_no_frame_ends_the_link_of_its_sender_only(
    attack: Callable[[Any, Any], None], sides: dict[str, Path]
) -> None:
    """Before memory is taken for it; others are served on."""
    ends = Ends(sides["ours/owner"], sides["ours/worker"])
    try:
        ends.dialler.send("w", frame(10))
        ends.next(ends.at_worker)
        incoming, outgoing = raw_link(ends, Tls(sides["ours/owner"]))
        attack(incoming, outgoing)
        assert ends.next(ends.told)[0] == "worker lost"
        incoming.settimeout(10)
        with suppress(OSError):
            assert incoming.recv(1) == b""
        ends.dialler.send("w", frame(11))
        ends.next(ends.at_worker)
        assert len(ends.listener._links) == 1
    finally:
        ends.close()


def test_an_owner_has_so_many_links_and_no_more(sides: dict[str, Path]) -> None:
    """Half links count; one that is gone makes room."""
    ends = Ends(sides["ours/owner"], sides["ours/worker"], Limits(links_each=2, links=3))
    tls = Tls(sides["ours/owner"])
    try:
        links = [raw_link(ends, tls) for _ in range(2)]
        for _, outgoing in links:
            outgoing.sendall(frame(5))
        for _ in links:
            ends.next(ends.at_worker)
        with pytest.raises(ConnectionError, match="as many links as it takes"):
            raw_link(ends, tls)
        assert len(ends.listener._links) == 2
        links[0][0].close()
        links[0][1].close()
        assert ends.next(ends.told)[0] == "worker lost"
        _, outgoing = raw_link(ends, tls)
        outgoing.sendall(frame(6))
        ends.next(ends.at_worker)
    finally:
        ends.close()


def test_connections_that_say_nothing_make_room(sides: dict[str, Path]) -> None:
    """As many as may open at once, silent: the next takes the place of the oldest."""
    ends = Ends(sides["ours/owner"], sides["ours/worker"], Limits(opening=2))
    try:
        silent = [socket.create_connection(("127.0.0.1", ends.listener.port)) for _ in range(2)]
        time.sleep(0.3)
        ends.dialler.send("w", frame(10))
        ends.next(ends.at_worker)
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b""
        for one in silent:
            one.close()
    finally:
        ends.close()


def test_two_same_halves_make_no_link(sides: dict[str, Path]) -> None:
    """And another owner cannot complete a link that is not its own."""
    ends = Ends(None, None)
    try:
        number, made = os.urandom(16), []
        for answer in (TAKEN, FULL):
            made.append(socket.create_connection(("127.0.0.1", ends.listener.port)))
            made[-1].sendall(preface(0, number))
            made[-1].settimeout(10)
            assert made[-1].recv(1) == answer
        assert made[0].recv(1) == made[1].recv(1) == b""
        assert ends.listener._links == {}
    finally:
        ends.close()


def test_plain_text_stays_on_this_machine() -> None:
    """To dial or listen elsewhere without certificates is refused before a byte is sent."""
    for host in ("0.0.0.0", "192.0.2.1", "gpu.example", "::"):
        with pytest.raises(CertificateError, match="needs TLS"):
            Listener(host, 0, None, FRAME_MAX, lambda p, f: None, lambda p: None)
        with pytest.raises(CertificateError, match="needs TLS"):
            dial(host, 1, None)


def test_old_tls_is_refused(sides: dict[str, Path]) -> None:
    """1.2 with a right certificate is not enough."""
    ends = Ends(sides["ours/owner"], sides["ours/worker"])
    try:
        context = Tls(sides["ours/owner"]).context(server=False)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        raw = socket.create_connection(("127.0.0.1", ends.listener.port))
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname="localhost")
    finally:
        ends.close()


def test_every_connection_is_a_handshake(sides: dict[str, Path]) -> None:
    """The worker gives no ticket, so nothing of one connection opens another."""
    ends = Ends(sides["ours/owner"], sides["ours/worker"])
    try:
        incoming, outgoing = raw_link(ends, Tls(sides["ours/owner"]))
        for connection in (incoming, outgoing):
            assert not connection.session_reused
            assert connection.session is None or not connection.session.has_ticket
            assert connection.version() == "TLSv1.3"
        assert Tls(sides["ours/worker"]).context(server=True).num_tickets == 0
    finally:
        ends.close()


@pytest.mark.parametrize("spoil", ["missing", "open", "passphrase", "garbage"])
def test_unusable_certificates_are_explained(
    spoil: str, sides: dict[str, Path], tmp_path: Path
) -> None:
    """When they are named, not at the first connection."""
    for file in sides["ours/owner"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / file.name).chmod(0o600)
    if spoil == "missing":
        (tmp_path / "cert.pem").unlink()
    elif spoil == "open":
        (tmp_path / "key.pem").chmod(0o644)
    elif spoil == "garbage":
        (tmp_path / "ca.pem").write_text("no certificate")
    else:
        from cryptography.hazmat.primitives import serialization as s

        key = s.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
        (tmp_path / "key.pem").write_bytes(
            key.private_bytes(
                s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x")
            )
        )
    with pytest.raises(CertificateError, match=r"cert\.pem|key\.pem|cannot be used"):
        Tls(tmp_path)


def test_a_certificate_that_is_not_good_now_is_said_before_anything_is_dialled(
    sides: dict[str, Path], tmp_path: Path
) -> None:
    """What is wrong with one's own is not for the other side to find out."""
    assert Tls(sides["ours/owner"]).require_current() > datetime.now(timezone.utc)
    with pytest.raises(CertificateError, match=r"cert\.pem has expired, on 20.*make new"):
        Tls(sides["expired/owner"]).require_current()
    authority = Authority()
    authority._span = tuple(end + timedelta(days=2) for end in authority._span)
    authority.issue(tmp_path / "early")
    with pytest.raises(CertificateError, match="look at this machine's clock"):
        Tls(tmp_path / "early").require_current()


def test_a_side_that_does_not_read_is_given_up(sides: dict[str, Path]) -> None:
    """Its frames do not pile up for ever."""
    ends = Ends(None, None)
    try:
        kept = dial("127.0.0.1", ends.listener.port, None)
        outgoing = kept[1]
        outgoing.sendall(encode(Bye(SESSION)))  # type: ignore[arg-type]
        peer, body = ends.next(ends.at_worker)
        assert isinstance(decode(body), Bye)
        big = frame(FRAME_MAX - 100)
        for _ in range(5000):
            ends.listener.send(peer, big)
        assert ends.next(ends.told) == ("worker lost", peer)
    finally:
        ends.close()


def test_threads_end_with_the_line(ends: Ends) -> None:
    """None is left behind."""
    ends.dialler.send("w", frame(10))
    ends.next(ends.at_worker)
    ends.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [t.name for t in threading.enumerate() if t.name.startswith(("link", "listener"))]
        if not left:
            return
        time.sleep(0.02)
    raise AssertionError(left)
