"""Owner and workers in one process: real clock, real threads, encoded bytes between them.

The sides share nothing but frames, so the trust boundary is the one of a real network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.store import PreparedModel
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from protocol.catalogue import Catalogue
from protocol.owner import OwnerConfig
from protocol.worker import WorkerConfig


@contextmanager
def in_process(
    prepared: PreparedModel,
    owner_cipher: OwnerCipher,
    worker_ciphers: Sequence[WorkerCipher],
    owner_config: OwnerConfig | None = None,
    worker_config: WorkerConfig | None = None,
    lanes: int = 1,
) -> Iterator[tuple[OwnerClient, list[WorkerServer]]]:
    """An owner and a worker per cipher, started; closed in order at the end of the `with`.

    Workers are called "worker0", "worker1", ...
    """
    catalogue = prepared.catalogue(owner_cipher)
    servers: dict[str, WorkerServer] = {}
    client = OwnerClient(
        catalogue,
        prepared.owner_matrices(),
        owner_cipher,
        workers=[f"worker{index}" for index in range(len(worker_ciphers))],
        transmit=lambda peer, frame: servers[peer].deliver("owner", frame),
        config=owner_config,
        threads=lanes,
    )
    for index, cipher in enumerate(worker_ciphers):
        name = f"worker{index}"
        servers[name] = _worker(prepared, catalogue, cipher, client, name, worker_config)
    with ExitStack() as stack:
        for server in servers.values():
            server.start()
            stack.callback(server.stop)
        client.start()
        stack.callback(client.close)
        yield client, list(servers.values())


def _worker(
    prepared: PreparedModel,
    catalogue: Catalogue,
    cipher: WorkerCipher,
    client: OwnerClient,
    name: str,
    config: WorkerConfig | None,
) -> WorkerServer:
    return WorkerServer(
        catalogue,
        prepared.worker_weights(),
        cipher,
        reply=lambda _peer, frame: client.deliver(name, frame),
        config=config,
    )
