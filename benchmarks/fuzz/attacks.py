"""What is done to a worker that listens. Every attack takes a budget of inputs, and counts them.

Nothing here waits for ever: sockets have time-outs, and an error of the other side ends one try.
"""

from __future__ import annotations

import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.net.tls import OWNER_WRITES, WORKER_WRITES, Tls, dial, preface
from benchmarks.fuzz.inputs import Frames
from benchmarks.fuzz.live import EVIL, MAX_TOKENS
from protocol.catalogue import Catalogue
from protocol.messages import HEADER_BYTES, Bye, Hello, Message, Multiply, encode

_WAIT_S = 2.0
_BATCH = 100
_RESET = struct.pack("ii", 1, 0)


_PAUSES_S = (0.01, 0.05, 0.2, 0.5)


def quietly() -> AbstractContextManager[object]:
    """What the other side does to a connection is no error here."""
    return suppress(OSError, ValueError)


@dataclass
class Target:
    """Where the worker is, and with whose certificates it is spoken to.

    patience_s  for how long attacks that work by waiting wait
    """

    port: int
    certs: Path | None
    catalogue: Catalogue
    count: Callable[[str, int], None]
    patience_s: float = 12.0

    @property
    def host(self) -> str:
        """As the certificate names it."""
        return "localhost" if self.certs else "127.0.0.1"

    def tls(self, name: str) -> Tls | None:
        """Certificates of one owner."""
        return Tls(self.certs / name) if self.certs else None

    def connect(self) -> socket.socket:
        """TCP and nothing more."""
        made = socket.create_connection(("127.0.0.1", self.port), _WAIT_S)
        made.settimeout(_WAIT_S)
        return made

    def shaken(self, name: str) -> Any:
        """A connection of an owner before its preface. Raises OSError."""
        raw, tls = self.connect(), self.tls(name)
        if tls is None:
            return raw
        return tls.context(server=False).wrap_socket(raw, server_hostname=self.host)

    @contextmanager
    def link(self, name: str = EVIL[0]) -> Iterator[tuple[Any, Any]]:
        """(incoming, outgoing) of a link. Raises OSError when the worker takes none."""
        for pause_s in _PAUSES_S:
            with quietly():
                incoming, outgoing, _ = dial(self.host, self.port, self.tls(name))
                break
            time.sleep(pause_s)  # the links before it may not have ended yet
        else:
            raise ConnectionError("no link")
        try:
            incoming.settimeout(_WAIT_S)
            outgoing.settimeout(_WAIT_S)
            yield incoming, outgoing
        finally:
            incoming.close()
            outgoing.close()

    def frames(self, rng: random.Random) -> Frames:
        """Frames against this worker."""
        return Frames(rng, self.catalogue, (rng.randbytes(16), rng.randbytes(16), bytes(16)))


Attack = Callable[[Target, random.Random, int], None]


def raw(message: Message) -> bytes:
    """A frame's bytes."""
    frame = encode(message)
    assert isinstance(frame, bytes)
    return frame


def hello(target: Target, session: bytes) -> bytes:
    """A right greeting."""
    digests = target.catalogue.parameters_digest, target.catalogue.model_digest
    return raw(Hello(session, *digests))


def request(target: Target, session: bytes, number: int, tokens: int) -> bytes:
    """A right request; its payload are zeros."""
    payload = bytes(target.catalogue.up_bytes(0, tokens))
    return raw(Multiply(session, number, 0, tokens, payload))


def drain(incoming: Any, wait_s: float = 0.0) -> None:
    """Read what has come, and forget it."""
    incoming.settimeout(wait_s or 0.001)
    with quietly():
        while incoming.recv(1 << 16):
            pass


def finish(incoming: Any, outgoing: Any) -> None:
    """Say no more, and wait until all that was said has been taken: then the worker ends it too."""
    socket.socket.shutdown(outgoing, socket.SHUT_WR)
    drain(incoming, 5 * _WAIT_S)


def reset(connection: Any) -> None:
    """Close with a reset, so that the other side's next word fails."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


# --- frames -----------------------------------------------------------------------------------


def frames_in_any_order(target: Target, rng: random.Random, count: int) -> None:
    """Frames that a link lets through, many on one link; now and then all over again (a replay)."""
    sent = 0
    while sent < count:
        frames = target.frames(rng)
        size = min(_BATCH, count - sent)
        batch = hello(target, frames.sessions[0]) + b"".join(frames.whole()[1] for _ in range(size))
        sent += size
        target.count("frames in any order", size)
        for _ in range(1 + (rng.random() < 0.1)):
            with quietly(), target.link(rng.choice(EVIL)) as (incoming, outgoing):
                outgoing.sendall(batch)
                finish(incoming, outgoing)


def broken_frames(target: Target, rng: random.Random, count: int) -> None:
    """One a link, since it may be the last that the link takes."""
    frames = target.frames(rng)
    for _ in range(count):
        _, frame = frames.draw()
        target.count("broken frames", 1)
        with quietly(), target.link() as (incoming, outgoing):
            outgoing.sendall(frame)
            finish(incoming, outgoing)


def cut_at_every_point(target: Target, rng: random.Random, count: int) -> None:
    """Every sort of message, as far as one of its bytes; then the end."""
    frames, sent = target.frames(rng), 0
    while sent < count:
        frame = frames.legal()
        step = max(1, len(frame) // 60)
        for point in range(0, len(frame), step):
            if sent == count:
                return
            sent += 1
            target.count("frames cut", 1)
            with quietly(), target.link() as (incoming, outgoing):
                outgoing.sendall(hello(target, frames.sessions[0]) + frame[:point])
                finish(incoming, outgoing)


def flood_of_frames(target: Target, rng: random.Random, count: int) -> None:
    """As fast as they go, on all links that three owners may have; answers are read."""

    def pour(name: str, share: int, session: bytes) -> None:
        small = hello(target, session) + raw(Bye(session)) + hello(target, session)
        requests = b"".join(request(target, session, n, 1) for n in range(1, 48))
        burst, size = small + requests, 50
        with quietly(), target.link(name) as (incoming, outgoing):
            for _ in range(0, share, size):
                outgoing.sendall(burst)
                drain(incoming)
            finish(incoming, outgoing)

    links = [name for name in EVIL for _ in range(4)]
    share = -(-count // len(links))
    target.count("flood of frames", share * len(links))
    _together([(pour, (name, share, rng.randbytes(16))) for name in links])


def never_reads(target: Target, rng: random.Random, count: int) -> None:
    """Large requests, one after the other, whose answers nobody fetches."""

    def pour(name: str, share: int, session: bytes) -> None:
        frame, sent = request(target, session, 1, MAX_TOKENS), 0
        while sent < share:
            with quietly(), target.link(name) as (_, outgoing):
                outgoing.sendall(hello(target, session))
                # Not a repetition of one in work: those would be dropped.
                for number in range(share - sent):
                    head = frame[:HEADER_BYTES] + number.to_bytes(8, "little")
                    sent += 1
                    outgoing.sendall(head + frame[HEADER_BYTES + 8 :])
                return

    links = [name for name in EVIL for _ in range(4)]
    share = -(-count // len(links))
    target.count("requests whose answers are not read", share * len(links))
    _together([(pour, (name, share, rng.randbytes(16))) for name in links])


def sessions_dropped(target: Target, rng: random.Random, count: int) -> None:
    """Opened, given large work, and dropped with a reset: a new link, a new session, again."""
    each, sent = 50, 0
    while sent < count:
        session, size = rng.randbytes(16), min(each, count - sent)
        sent += size
        target.count("requests of sessions dropped", size)
        with quietly(), target.link(rng.choice(EVIL)) as (incoming, outgoing):
            outgoing.sendall(hello(target, session))
            outgoing.sendall(b"".join(request(target, session, n, MAX_TOKENS) for n in range(size)))
            reset(outgoing)
            reset(incoming)


def answers_cut(target: Target, rng: random.Random, count: int) -> None:
    """Greetings in a stream, while the way back has been reset: none may leave a session behind."""
    each, sent = 20, 0
    while sent < count:
        size = min(each, count - sent)
        sent += size
        target.count("greetings with the way back cut", size)
        with quietly(), target.link(rng.choice(EVIL)) as (incoming, outgoing):
            reset(incoming)
            outgoing.sendall(b"".join(hello(target, rng.randbytes(16)) for _ in range(size)))


def oversize(target: Target, rng: random.Random, count: int) -> None:
    """Announcements of more than is right; and of just what is right, of which nothing comes."""
    frame_max = target.catalogue.largest_frame(MAX_TOKENS)
    head = request(target, rng.randbytes(16), 1, 1)[: HEADER_BYTES - 4]
    for index in range(count // 2):
        size = (frame_max - HEADER_BYTES + 1, 1 << 30, (1 << 32) - 1)[index % 3]
        with quietly(), target.link() as (_, outgoing):
            outgoing.sendall(head + size.to_bytes(4, "little"))
    promise = head + (frame_max - HEADER_BYTES).to_bytes(4, "little")
    held: list[Any] = []
    for index in range(count - count // 2):
        if len(held) >= 12:
            for one in held.pop(0):
                one.close()
        with quietly():
            *made, _ = dial(target.host, target.port, target.tls(EVIL[index % 3]))
            held.append(made)
            made[1].sendall(promise)
    for made in held:
        for one in made:
            one.close()
    target.count("sizes announced", count)


# --- connections ------------------------------------------------------------------------------


def silent_connections(target: Target, rng: random.Random, count: int) -> None:
    """Slow-loris: many that say a byte now and then, in the handshake, the preface, a frame."""
    head = request(target, rng.randbytes(16), 1, 1)
    until = time.monotonic() + target.patience_s
    held: list[tuple[Any, Iterator[int]]] = []
    opened = 0
    with quietly(), target.link(EVIL[1]) as (_, outgoing):
        held.append((outgoing, iter(head)))
        while time.monotonic() < until:
            while opened < count and len(held) < min(48, count):
                opened += 1
                with quietly():
                    held.append(_loris(target, opened))
            for one in list(held):
                with suppress(OSError, ValueError, StopIteration):
                    one[0].sendall(bytes((next(one[1]),)))
                    continue
                held.remove(one)
                one[0].close()
            time.sleep(0.2)
    for connection, _ in held:
        connection.close()
    target.count("connections that hardly speak", opened)


def _loris(target: Target, number: int) -> tuple[Any, Iterator[int]]:
    words = preface(OWNER_WRITES, number.to_bytes(16, "little"))
    if number % 8 == 0:
        return target.shaken(EVIL[0]), iter(words)
    return target.connect(), iter(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(500))


def flood_of_connections(target: Target, rng: random.Random, count: int) -> None:
    """Opened and closed, at once or with a word, as fast as they go."""
    for _ in range(count):
        with suppress(OSError):
            connection = target.connect()
            if rng.random() < 0.5:
                connection.sendall(rng.randbytes(rng.choice((1, 24, 300))))
            (reset if rng.random() < 0.5 else socket.socket.close)(connection)
    target.count("connections", count)


def prefaces(target: Target, rng: random.Random, count: int) -> None:
    """Of an owner with a good certificate, but not what a link begins with."""
    for _ in range(count):
        words = bytearray(preface(rng.randrange(4), rng.randbytes(16)))
        if rng.random() < 0.7:
            words[rng.randrange(8)] = rng.randrange(256)
        words = words[: rng.choice((len(words), rng.randrange(len(words))))]
        with quietly():
            connection = target.shaken(rng.choice(EVIL))
            connection.sendall(words)
            connection.close()
    target.count("prefaces", count)


def halves(target: Target, rng: random.Random, count: int) -> None:
    """Links of one half, of the same half twice, of two owners' halves, and reset as they begin."""
    for index in range(count):
        number, names = rng.randbytes(16), rng.sample(EVIL, 2)
        made: list[Any] = []
        with quietly():
            for turn in range(1 if index % 4 == 0 else 2):
                name = names[turn if index % 4 == 2 else 0]
                direction = OWNER_WRITES if index % 4 == 1 or turn else WORKER_WRITES
                made.append(target.shaken(name))
                made[-1].sendall(preface(direction, number))
                if turn and index % 4 == 3:
                    time.sleep(0.002 * rng.random())
                    reset(made.pop())  # before the worker can say that it is taken
                else:
                    made[-1].recv(1)
        for one in made:
            one.close()
    target.count("halves of links", count)


def strangers(target: Target, rng: random.Random, count: int) -> None:
    """Without a certificate, with another authority's, an expired one, a worker's, or TLS 1.2."""
    for index in range(count):
        kind = ("none", "foreign", "expired", "worker", "old TLS", "no hello")[index % 6]
        with quietly():
            connection = target.connect()
            if kind == "no hello":
                connection.sendall(rng.randbytes(40))
            else:
                connection = _stranger(target, kind).wrap_socket(
                    connection, server_hostname=target.host
                )
                connection.sendall(preface(OWNER_WRITES, rng.randbytes(16)))
                connection.recv(1)
            connection.close()
        target.count(f"stranger: {kind}", 1)


def _stranger(target: Target, kind: str) -> ssl.SSLContext:
    certs = target.certs
    assert certs is not None
    if kind == "none":
        return ssl.create_default_context(cafile=str(certs / "good" / "ca.pem"))
    context = Tls(certs / ("good" if kind == "old TLS" else kind)).context(server=False)
    if kind == "old TLS":
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def _together(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    threads = [threading.Thread(target=job, args=words, daemon=True) for job, words in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


PLAN: tuple[tuple[str, float, Attack], ...] = (
    ("plain", 0.25, frames_in_any_order),
    ("plain", 0.10, broken_frames),
    ("plain", 0.05, cut_at_every_point),
    ("tls", 0.18, frames_in_any_order),
    ("tls", 0.01, broken_frames),
    ("tls", 0.01, oversize),
    ("tls", 0.01, halves),
    ("tls", 0.01, strangers),
    ("tls", 0.01, prefaces),
    ("tls", 0.02, flood_of_connections),
    ("tls", 0.10, flood_of_frames),
    ("tls", 0.15, never_reads),
    ("tls", 0.05, sessions_dropped),
    ("tls", 0.04, answers_cut),
    ("tls", 0.01, silent_connections),
)
"""(line, share of the inputs, attack), in this order."""
