"""Owner and worker in one process: real clock, real threads, encoded bytes between them.

The two sides share nothing but frames, so the trust boundary is the one of a real network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.store import PreparedModel
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from protocol.owner import OwnerConfig
from protocol.worker import WorkerConfig


@contextmanager
def in_process(
    prepared: PreparedModel,
    owner_cipher: OwnerCipher,
    worker_cipher: WorkerCipher,
    owner_config: OwnerConfig | None = None,
    worker_config: WorkerConfig | None = None,
    lanes: int = 1,
) -> Iterator[tuple[OwnerClient, WorkerServer]]:
    """An owner and one worker, started; closed in order at the end of the `with`."""
    catalogue = prepared.catalogue(owner_cipher)
    server = WorkerServer(
        catalogue,
        prepared.worker_weights(),
        worker_cipher,
        reply=lambda _peer, frame: client.deliver("worker", frame),
        config=worker_config,
    )
    client = OwnerClient(
        catalogue,
        prepared.owner_matrices(),
        owner_cipher,
        workers=["worker"],
        transmit=lambda _peer, frame: server.deliver("owner", frame),
        config=owner_config,
        threads=lanes,
    )
    server.start()
    client.start()
    try:
        yield client, server
    finally:
        client.close()
        server.stop()
