"""Owner and workers in one process: real clock, real threads, encoded bytes between them.

The sides share nothing but frames, so the trust boundary is the one of a real network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.net.audit import Audit
from backends.net.devices import OneDevice
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from protocol.messages import Frame
from protocol.owner_memory import OwnerConfig
from protocol.worker import WorkerConfig


def worker_name(index: int) -> str:
    """What the owner calls its worker of that number."""
    return f"worker{index}"


@contextmanager
def in_process(
    prepared: PreparedModel,
    owner_cipher: OwnerCipher,
    worker_ciphers: Sequence[WorkerCipher],
    owner_config: OwnerConfig | None = None,
    worker_config: WorkerConfig | None = None,
    lanes: int = 1,
    hooks: Callable[[str], Hooks] = lambda side: Hooks(),
    audit: Audit | None = None,
    ledger: WorkerLedger | None = None,
) -> Iterator[tuple[OwnerClient, list[WorkerServer]]]:
    """An owner and a worker per cipher, started; closed in order at the end of the `with`.

    `hooks` makes those of "owner" and each worker.
    """
    catalogue = prepared.catalogue(owner_cipher.packing)
    servers: dict[str, WorkerServer] = {}

    def transmit(worker: str, frame: Frame) -> None:
        servers[worker].deliver("owner", frame)

    client = OwnerClient(
        catalogue,
        prepared.owner_matrices(),
        owner_cipher,
        workers=[worker_name(index) for index in range(len(worker_ciphers))],
        transmit=transmit,
        config=owner_config,
        threads=lanes,
        hooks=hooks("owner"),
        workers_here=True,
        audit=audit,
        ledger=ledger,
    )
    for index, cipher in enumerate(worker_ciphers):
        name = worker_name(index)
        servers[name] = WorkerServer(
            OneDevice(catalogue, cipher, prepared.worker_matrices()),
            reply=lambda _peer, frame, name=name: client.deliver(name, frame),  # type: ignore[misc]
            config=worker_config,
            hooks=hooks(name),
        )
    with ExitStack() as stack:
        for server in servers.values():
            server.start()
            stack.callback(server.stop)
        client.start()
        stack.callback(client.close)
        yield client, list(servers.values())
