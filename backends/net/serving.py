"""Owners and workers on different machines: the line's two ends, joined to the drivers.

The worker's end imports nothing that could hold a secret; the owner's is in `remote.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from backends.net.backlog import Backlog
from backends.net.counts import Counts, LineEvent
from backends.net.devices import Devices
from backends.net.listening import Limits, Listener
from backends.net.loop import Hooks
from backends.net.tls import Tls
from backends.net.worker import WorkerServer
from protocol.worker import WorkerConfig


@dataclass(frozen=True)
class Service:
    """A worker that listens. port: where, which the system chose for port 0."""

    server: WorkerServer
    listener: Listener

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.listener.port

    def drain(self, seconds: float) -> bool:
        """Take no more links and requests, and answer what is in hand.

        Owners are told BUSY, so that they ask another worker. False when it takes longer.
        """
        until = time.monotonic() + seconds
        self.listener.refuse()
        answered = self.server.finish(seconds)
        return self.listener.flush(max(0.0, until - time.monotonic())) and answered


@contextmanager
def serving(
    devices: Devices,
    host: str,
    port: int,
    tls: Tls | None,
    config: WorkerConfig | None = None,
    limits: Limits | None = None,
    hooks: Hooks | None = None,
    counts: Counts | None = None,
    tell: Callable[[LineEvent], None] = lambda event: None,
    on_crash: Callable[[], None] = lambda: None,
) -> Iterator[Service]:
    """A worker that serves owners who connect, until the end of the `with`.

    devices   hold the matrices
    tls       None serves in plain text, on loopback only
    counts    where to count what it does
    tell      is told of links that open or end and of all that is refused, on any thread
    on_crash  is told that the worker cannot go on (`server.failure`)

    Raises OSError when the address cannot be had.
    """
    config, limits, hooks = config or WorkerConfig(), limits or Limits(), hooks or Hooks()
    # Whoever is let in is welcomed: a link that has just ended may still have its session.
    config = replace(
        config, max_sessions=max(config.max_sessions, 2 * limits.links_each),
        max_peers=max(config.max_peers, 2 * limits.links),
    )  # fmt: skip
    backlog = Backlog(limits.unhandled_bytes, hooks)
    server: WorkerServer

    def on_line(event: LineEvent) -> None:
        server.counts.on_line(event)
        tell(event)

    def deliver(peer: str, frame: memoryview) -> None:
        backlog.arrived(peer, frame)
        if not server.deliver(peer, frame):
            backlog.handled(peer, frame)

    listener = Listener(
        host, port, tls, devices.catalogue.largest_frame(config.max_tokens), deliver,
        lambda peer: server.lost(peer), limits, on_line, backlog.full,
    )  # fmt: skip
    server = WorkerServer(
        devices, listener.send, config,
        replace(hooks, observe=backlog.observe), counts, tell, on_crash,
    )  # fmt: skip
    server.start()
    listener.start()
    try:
        yield Service(server, listener)
    finally:
        listener.close()
        server.stop()
