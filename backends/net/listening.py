"""The worker's side of the line: it accepts links from owners, within limits, and names each.

A peer is one link; its name is never used twice. Its name begins with the owner's identity, so
what a log says of a peer can be told of an owner.
"""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from backends.net.backlog import UNHANDLED_BYTES
from backends.net.counts import (
    CROWDED,
    ENDED,
    OPENED,
    OWNER_FULL,
    REFUSED,
    TURNED_AWAY,
    LineEvent,
    guarded,
)
from backends.net.counts import FULL as ALL_FULL
from backends.net.link import Link
from backends.net.tls import (
    FULL,
    HANDSHAKE_S,
    OWNER_WRITES,
    TAKEN,
    Tls,
    identity_of,
    read_preface,
    require_loopback,
    tune,
)
from protocol.messages import Frame

_HEARING_S = 1.0
_UNREAD_BYTES = 4096
_LOOK_S = 0.005


@dataclass(frozen=True)
class Limits:
    """What a worker takes before it turns somebody away, or waits.

    links_each, links  of one owner, of all
    opening            connections whose handshake is under way, the oldest of which makes room for
                       a new one; and as many halves of links, where whoever has most makes room
    unsent_bytes       of answers that have not been read yet at the other end of a link (or two
                       frames, where that is more): beyond that nothing is read of it
    unsent_each        the same of all links of one owner: beyond that nothing is read of any
    unhandled_bytes    of frames of all links that have been read and wait to be handled: beyond
                       that nothing is read; and of one link there are few at a time
    """

    links_each: int = 4
    links: int = 64
    opening: int = 32
    unsent_bytes: int = 8 << 20
    unsent_each: int = 512 << 20
    unhandled_bytes: int = UNHANDLED_BYTES


@dataclass
class _Half:
    """A connection whose other half has not come yet."""

    connection: Any
    direction: int
    since: float
    told: threading.Event = field(default_factory=threading.Event)
    """That TAKEN was sent: until then a thread writes, and OpenSSL allows no other."""


@dataclass(eq=False)
class _Opening:
    """A connection whose handshake is under way."""

    connection: socket.socket
    evicted: bool = False

    def evict(self) -> None:
        """End it, whatever its thread waits for."""
        self.evicted = True  # first: a thread that has just put another object here looks at it
        with suppress(OSError):
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)


class Listener:
    """Accepts links and carries frames to and from peers.

    tls        this side's certificates; None listens in plain text, on loopback only
    frame_max  bytes of the largest frame that is taken
    on_frame   is told (peer, frame), on a thread of that peer
    on_lost    is told that a peer is gone; its name does not come again, nor a frame of it
    tell       is told of links that open, end or are refused, on any thread
    flooded    whether frames that were handed over wait in such numbers that no more are read, of
               all links or of that of a peer

    Raises OSError when the address cannot be had, CertificateError for plain text elsewhere.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: Tls | None,
        frame_max: int,
        on_frame: Callable[[str, memoryview], None],
        on_lost: Callable[[str], None],
        limits: Limits | None = None,
        tell: Callable[[LineEvent], None] = lambda event: None,
        flooded: Callable[[str], bool] = lambda peer: False,
    ) -> None:
        if tls is None:
            require_loopback(host)
        self._context = None if tls is None else tls.context(server=True)
        self._frame_max, self._on_frame, self._on_lost = frame_max, on_frame, on_lost
        self._limits, self._tell = limits or Limits(), guarded(tell)
        self._flooded = flooded
        self._unsent_max = max(self._limits.unsent_bytes, 2 * frame_max)
        self._socket = socket.create_server((host, port), backlog=self._limits.opening)
        self.port: int = self._socket.getsockname()[1]
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._theirs: dict[str, list[Link]] = {}  # of each owner that has one
        self._halves: dict[tuple[str, bytes], _Half] = {}
        self._numbers = itertools.count(1)
        self._opening: dict[_Opening, None] = {}  # oldest first
        self._pool = ThreadPoolExecutor(self._limits.opening, thread_name_prefix="handshake")
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def send(self, peer: str, frame: Frame) -> None:
        """Queue a frame for a peer; one that is gone gets nothing. Never blocks."""
        with self._lock:
            link = self._links.get(peer)
        if link is not None:
            link.send(frame)

    def refuse(self) -> None:
        """Accept no more links; those that are open stay."""
        with self._lock:
            self._closed = True
            halves = list(self._halves.values())
            self._halves.clear()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        for half in halves:
            half.connection.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def flush(self, seconds: float) -> bool:
        """Wait until every frame has left that was queued; False when it takes longer."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                if not any(link.unsent for link in self._links.values()):
                    return True
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Accept nothing more, and end all links."""
        self.refuse()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close("the worker closes")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of descriptors: do not spin
                continue
            opening = _Opening(connection)
            with self._lock:
                # Who is slow makes room: strangers who say nothing must not keep others out.
                slowest = next(iter(self._opening)) if self._no_room() else None
                if slowest is not None:
                    del self._opening[slowest]
                self._opening[opening] = None
            if slowest is not None:
                slowest.evict()
                self._tell(LineEvent(REFUSED, "", CROWDED))
            try:
                self._pool.submit(self._welcome, opening)
            except RuntimeError:  # closing
                connection.close()

    def _no_room(self) -> bool:
        return len(self._opening) >= self._limits.opening

    def _welcome(self, opening: _Opening) -> None:
        connection: Any = opening.connection
        until = time.monotonic() + HANDSHAKE_S
        try:
            tune(connection)
            connection.settimeout(HANDSHAKE_S)
            owner = "plain"
            if self._context is not None:
                connection = opening.connection = self._context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                if opening.evicted:
                    raise ConnectionError("made room")
                connection.do_handshake()
                owner = identity_of(connection)
            direction, number = read_preface(connection, until)
            with self._lock:  # from here on it is not evicted
                self._opening.pop(opening, None)
            connection.settimeout(HANDSHAKE_S)
            refused = self._pair(owner, number, direction, connection)
            if refused:
                self._tell(LineEvent(REFUSED, owner, refused))
                connection.sendall(FULL)
                connection.close()
        except (OSError, ssl.SSLError, ValueError) as error:
            # A reason of a library may quote what a stranger sent; its type is enough.
            self._tell(LineEvent(REFUSED, "", TURNED_AWAY, type(error).__name__))
            _let_it_hear(connection)
            connection.close()
        finally:
            with self._lock:
                self._opening.pop(opening, None)

    def _pair(self, owner: str, number: bytes, direction: int, connection: Any) -> str:
        """Keep a connection, or make a link with its other half; why not, if not."""
        with self._lock:
            half = self._halves.get((owner, number))
        if half is not None:
            half.told.wait(HANDSHAKE_S)
        now, kept = time.monotonic(), _Half(connection, direction, time.monotonic())
        with self._lock:
            stale = [k for k, half in self._halves.items() if now - half.since > HANDSHAKE_S]
            dropped = [self._halves.pop(key).connection for key in stale]
            half = self._halves.get((owner, number))
            early = half is not None and not half.told.is_set()
            if half is not None and not early:
                del self._halves[owner, number]
            twice = half is not None and half.direction == direction
            refused = CROWDED if self._closed or twice or early else ""
            if half is None and not refused:
                refused = self._full(owner)
                if not refused and len(self._halves) >= self._limits.opening:
                    left = self._left_half()
                    refused = CROWDED if left is None else ""
                    dropped += [left.connection] if left else []
                if not refused:
                    self._halves[owner, number] = kept
            link = None if half is None or refused else self._link(owner, half, connection)
        for other in dropped:
            other.close()
        if refused:
            if half is not None and not early:
                half.connection.close()
            return refused
        if link is not None:
            self._tell(LineEvent(OPENED, owner))  # first: its end is told, however early it is
        try:
            connection.sendall(TAKEN)
            if half is not None:
                connection.settimeout(None)
                half.connection.settimeout(None)
        except OSError:
            # Whom it was for is gone: what was kept for it must not be.
            with self._lock:
                self._halves.pop((owner, number), None)
            if link is not None:
                link.close("the other side left as it began")
                link.start()  # and ends: its threads let go of all
            raise
        finally:
            kept.told.set()
        if link is not None:
            link.start()
        return ""

    def _full(self, owner: str) -> str:
        """Who has as many links as it may: the owner, all together, nobody. Under the lock."""
        each = Counter(name.partition("#")[0] for name in self._links)
        each.update(key[0] for key in self._halves)
        if each[owner] >= self._limits.links_each:
            return OWNER_FULL
        return ALL_FULL if each.total() >= self._limits.links else ""

    def _left_half(self) -> _Half | None:
        """The oldest half of whoever has most, which is kept no more. Under the lock.

        Owners whose other half does not come, again and again, must not keep those out whose does.
        """
        each = Counter(owner for owner, _ in self._halves)
        most = max(each.values())
        for key, half in self._halves.items():
            if each[key[0]] == most and half.told.is_set():
                return self._halves.pop(key)
        return None

    def _link(self, owner: str, half: _Half, connection: Any) -> Link:
        """Under the lock."""
        name = f"{owner}#{next(self._numbers)}"
        pair = (half.connection, connection)
        incoming, outgoing = pair if half.direction == OWNER_WRITES else pair[::-1]

        def end(why: str) -> None:
            with self._lock:
                self._links.pop(name, None)
                self._theirs[owner].remove(link)
                if not self._theirs[owner]:
                    del self._theirs[owner]
            self._on_lost(name)
            self._tell(LineEvent(ENDED, owner, why))

        link = Link(
            f"link{name[-8:]}", incoming, outgoing, self._frame_max,
            lambda frame: self._on_frame(name, frame), end,
            lambda unsent: unsent > self._unsent_max or self._flooded(name) or self._unread(owner),
        )  # fmt: skip
        self._links[name] = link
        self._theirs.setdefault(owner, []).append(link)
        return link

    def _unread(self, owner: str) -> bool:
        """Whether an owner's links have more answers than they may that it has not read."""
        with self._lock:
            links = list(self._theirs.get(owner, ()))
        return sum(link.unsent for link in links) > max(self._limits.unsent_each, self._unsent_max)


def _let_it_hear(connection: socket.socket) -> None:
    """Wait until the other side has read why it is turned away, or for a second.

    Closing a socket with bytes that nobody has read resets the connection, and the alert that says
    what is wrong with a certificate would be lost with it.
    """
    with suppress(OSError, ValueError):
        connection.settimeout(_HEARING_S)
        socket.socket.shutdown(connection, socket.SHUT_WR)
        unread = bytearray(_UNREAD_BYTES)
        until = time.monotonic() + _HEARING_S
        while time.monotonic() < until and socket.socket.recv_into(connection, unread):
            pass
