"""One TCP connection between two hosts of the modelled network, and what TCP makes of the line.

Frames go out one after the other, in the order given. Three things keep a connection from filling
the line with a frame's bytes alone:

Overhead. Bytes travel in packets with headers, and in TLS records with theirs: 1 Gb/s of Ethernet
carries 0.94 Gb/s of frames.

Window. At most `window_bytes` are under way without having been acknowledged; when they are sent,
the rest waits for the round trip. Linux keeps what it may have to send again in at most 4 MB
(tcp_wmem): a line that carries more in a round trip is not filled by one connection.

Slow start. A connection begins with ten packets a round trip, and doubles that with every round
trip that uses at least half of it. It forgets: with every retransmission timeout without anything
to send, half of it is lost (RFC 5681, 4.1; RFC 2861; tcp_slow_start_after_idle).

Time is cut into rounds: in each the connection may send as much as its window, at the rate that the
network gives it, and the next begins a round trip later. Losses that a full queue makes, and what
a congestion control does after them, are not modelled; `sim.flows` has a cap for random ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sim.network import Network

if TYPE_CHECKING:
    import simpy

_RTO_MIN_S = 0.2


@dataclass(frozen=True)
class Tcp:
    """How TCP behaves, as Linux does when nobody has changed it.

    overhead      bytes on the line for a byte of frames: Ethernet's 1538 for 1448, and TLS's 22
                  for 16384
    window_bytes  not acknowledged, at most
    first_bytes   of a new connection's first round trip
    """

    overhead: float = 1538 / 1448 * (1 + 22 / 16384)
    window_bytes: float = 4e6
    first_bytes: float = 14_480.0

    def __post_init__(self) -> None:
        if self.overhead < 1:
            raise ValueError(f"an overhead is at least 1, got {self.overhead}")
        if not 0 < self.first_bytes <= self.window_bytes:
            raise ValueError(
                f"a window grows from first_bytes to window_bytes, got {self.first_bytes} and "
                f"{self.window_bytes}"
            )


class Stream:
    """One direction of a connection. Without `tcp` it has no overhead and no window."""

    def __init__(
        self, env: simpy.Environment, network: Network, source: str, target: str,
        tcp: Tcp | None = None,
    ) -> None:  # fmt: skip
        self._env, self._network, self._ends, self._tcp = env, network, (source, target), tcp
        self._queue: deque[tuple[float, Callable[[], None] | None, Callable[[], None]]] = deque()
        self._stalled_s = 0.0
        self._stalled_from_s = math.inf
        self._sending = False
        self._rtt_s = network.round_trip_s(source, target) if tcp else 0.0
        self._window = tcp.first_bytes if tcp else 0.0
        self._round_from_s = 0.0
        self._round_left = self._window
        self._last_sent_s = 0.0
        self._waited = False

    @property
    def stalled_s(self) -> float:
        """Seconds so far in which there was something to send and no window to send it in."""
        return self._stalled_s + max(0.0, self._env.now - self._stalled_from_s)

    def send(
        self, size_bytes: int, arrived: Callable[[], None], left: Callable[[], None] | None = None
    ) -> None:
        """As `Network.send`, once everything sent before has left."""
        size = size_bytes * self._tcp.overhead if self._tcp else float(size_bytes)
        self._queue.append((size, arrived, left or _nothing))
        if not self._sending:
            self._next()

    def _next(self) -> None:
        """Something has left, or may be sent: go on."""
        self._sending = bool(self._queue)
        if not self._sending:
            return
        size, arrived, left = self._queue.popleft()
        part = min(size, self._allowed())
        if part < size:
            self._queue.appendleft((size - part, arrived, left))
            arrived, left = None, _nothing
        if part <= 0:
            wait_s = max(0.0, self._round_from_s + self._rtt_s - self._env.now)
            self._stalled_from_s = self._env.now
            self._env.timeout(wait_s).callbacks.append(lambda _: self._next_round())
            return
        self._round_left -= part
        # Whole bytes: a fraction of one would change nothing but the times' last digits.
        size = max(1, round(part)) if size else 0
        self._network.send(*self._ends, size, arrived, lambda: self._left(left))

    def _next_round(self) -> None:
        self._waited = True  # whatever rounding says of the time
        self._stalled_s, self._stalled_from_s = self.stalled_s, math.inf
        self._next()

    def _left(self, left: Callable[[], None]) -> None:
        self._last_sent_s = self._env.now
        left()
        self._next()

    def _allowed(self) -> float:
        """Bytes that may be sent now."""
        if self._tcp is None or self._rtt_s == 0:
            return float("inf")
        now, tcp = self._env.now, self._tcp
        if now < self._round_from_s + self._rtt_s and not self._waited:
            return self._round_left
        self._waited = False
        used = self._window - self._round_left
        if used >= self._window / 2:
            self._window = min(tcp.window_bytes, 2 * self._window)
        idle = int((now - self._last_sent_s) / (self._rtt_s + _RTO_MIN_S))
        if idle > 0:
            self._window = max(tcp.first_bytes, self._window / 2.0 ** min(idle, 64))
        self._round_from_s, self._round_left = now, self._window
        return self._window


def _nothing() -> None:
    """What a part of a frame does when it arrives."""
