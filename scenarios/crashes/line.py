"""The line between an owner and a worker: TCP on loopback, which the harness cuts and heals.

Two ways to be cut. `reset`: connections end at once, new ones are turned away, as when a router
restarts. `stall`: nothing ends and nothing passes, as when a cable is pulled; what was sent arrives
when the line is healed. Bytes pass unchanged; with TLS they tell the line nothing.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

HOST = "127.0.0.1"
Reader = Callable[[bytes], None]
_READ_BYTES = 1 << 16
_PORTS = (16_000, 32_000)  # below those that Linux draws from
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets


def free_port() -> int:
    """A port that nobody uses, and that no outgoing connection will be given meanwhile."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with suppress(OSError), socket.create_server((HOST, port)):
            return port


class Line:
    """Listens on `port` and passes every connection on to `target`, until it is closed.

    reader  makes, for each connection, what is shown the bytes from the owner before they pass
    passed  bytes so far, both ways
    """

    def __init__(self, target: int, reader: Callable[[], Reader] | None = None) -> None:
        self._target = target
        self._reader = reader or (lambda: lambda data: None)
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self.passed = 0
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._flowing, self._refusing, self._closed = threading.Event(), False, False
        self._flowing.set()
        self._thread = threading.Thread(target=self._accept, name="line", daemon=True)
        self._thread.start()

    def cut(self, how: str) -> None:
        """Cut it: `reset` or `stall`."""
        if how == "stall":
            self._flowing.clear()
        else:
            self._refusing = True
            self.drop()

    def heal(self) -> None:
        """Let everything pass again."""
        self._refusing = False
        self._flowing.set()

    def drop(self) -> None:
        """End the connections there are; what waited in them is lost. New ones are taken."""
        with self._lock:
            pairs = list(self._pairs)
            self._pairs.clear()
        for pair in pairs:
            for end in pair:
                _reset(end)

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self.drop()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.heal()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            self._flowing.wait()
            if self._refusing or self._closed:
                _reset(near)
                continue
            try:
                far = socket.create_connection((HOST, self._target), 5.0)
            except OSError:  # nobody is there
                _reset(near)
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.add((near, far))
            read = self._reader()
            for way in ((near, far, read), (far, near, lambda data: None)):
                threading.Thread(
                    target=self._pass_on, args=((near, far), *way), daemon=True
                ).start()

    def _pass_on(
        self, pair: tuple[socket.socket, socket.socket], start: socket.socket,
        end: socket.socket, read: Reader,
    ) -> None:  # fmt: skip
        with suppress(OSError):
            while data := start.recv(_READ_BYTES):
                self._flowing.wait()
                with self._lock:
                    if pair not in self._pairs:
                        break  # dropped meanwhile: it never passed
                    read(data)
                    self.passed += len(data)
                end.sendall(data)
        with self._lock:
            self._pairs.discard(pair)
        for side in pair:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        start.close()


def _reset(end: socket.socket) -> None:
    """End a connection that another thread may be blocked in."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
