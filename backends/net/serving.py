"""Owners and workers on different machines: the line's two ends, joined to the drivers.

The worker's end imports nothing that could hold a secret; the owner's is in `remote.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from backends.he.interface import WorkerCipher
from backends.he.store import WorkerPart
from backends.net.backlog import Backlog
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


@contextmanager
def serving(
    part: WorkerPart,
    cipher: WorkerCipher,
    host: str,
    port: int,
    tls: Tls | None,
    config: WorkerConfig | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    hooks: Hooks | None = None,
) -> Iterator[Service]:
    """A worker that serves owners who connect, until the end of the `with`.

    tls  None serves in plain text, on loopback only

    Raises OSError when the address cannot be had.
    """
    config, limits, hooks = config or WorkerConfig(), limits or Limits(), hooks or Hooks()
    backlog = Backlog(limits.unhandled_bytes, hooks)
    server: WorkerServer

    def deliver(peer: str, frame: memoryview) -> None:
        backlog.arrived(frame)
        server.deliver(peer, frame)

    listener = Listener(
        host, port, tls, part.catalogue.largest_frame(config.max_tokens), deliver,
        lambda peer: server.lost(peer), limits, backlog.full,
    )  # fmt: skip
    server = WorkerServer(
        part.catalogue, part.weights, cipher, listener.send, config, threads,
        replace(hooks, observe=backlog.observe),
    )  # fmt: skip
    server.start()
    listener.start()
    try:
        yield Service(server, listener)
    finally:
        listener.close()
        server.stop()
