"""The owner's end of the line to workers on other machines.

A worker is known by where it is, "host:port", until it has shown its certificate; in the ledger of
caught workers it is known by its public key, so that another address gives it no second life.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from backends.he.interface import OwnerCipher
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.net.addresses import address_of
from backends.net.audit import Audit
from backends.net.backlog import UNHANDLED_BYTES, Backlog
from backends.net.dialling import Dialler
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient
from backends.net.tls import Tls, require_loopback
from protocol.owner_memory import OwnerConfig

MAX_TOKENS = 4096
"""Tokens of one request: what an owner will take an answer to."""


class _Identities:
    """Who is at which address, as far as it has been proved."""

    def __init__(self, ledger: WorkerLedger) -> None:
        self._ledger = ledger
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def believe(self, worker: str, identity: str) -> bool:
        """Note an identity; whether it may serve this run."""
        with self._lock:
            self._known[worker] = identity
        return identity not in self._ledger.retired

    def of(self, worker: str) -> str:
        """The latest identity of a worker."""
        with self._lock:
            return self._known.get(worker, worker)


@contextmanager
def connected(
    prepared: PreparedModel,
    owner_cipher: OwnerCipher,
    workers: Sequence[str],
    tls: Tls | None,
    config: OwnerConfig | None = None,
    lanes: int = 1,
    hooks: Hooks | None = None,
    audit: Audit | None = None,
    ledger: WorkerLedger | None = None,
) -> Iterator[OwnerClient]:
    """An owner connected to workers at these addresses, started; closed at the end of the `with`.

    tls  this side's certificates; None speaks plain text, with workers on loopback only

    Raises AddressError, or CertificateError for a worker elsewhere without TLS.
    """
    # Owners that name the same workers begin with different ones.
    turn = secrets.randbelow(max(1, len(workers)))
    addresses = {text: address_of(text) for text in (*workers[turn:], *workers[:turn])}
    if tls is None:
        for host, _ in addresses.values():
            require_loopback(host)
    ledger = ledger or WorkerLedger()
    identities = _Identities(ledger)
    catalogue = prepared.catalogue()
    hooks = hooks or Hooks()
    backlog = Backlog(UNHANDLED_BYTES, hooks)
    client: OwnerClient

    def deliver(worker: str, frame: memoryview) -> None:
        backlog.arrived(frame)
        client.deliver(worker, frame)

    dialler = Dialler(
        addresses, tls, catalogue.largest_frame(MAX_TOKENS), deliver,
        lambda worker: client.disconnected(worker),
        lambda worker, why: client.lost(worker, why), identities.believe, backlog.full,
    )  # fmt: skip
    client = OwnerClient(
        catalogue, prepared.owner_matrices(), owner_cipher, list(addresses), dialler.send,
        config, lanes, replace(hooks, observe=backlog.observe),
        identity_of=identities.of, audit=audit, ledger=ledger,
    )  # fmt: skip
    client.start()
    try:
        yield client
    finally:
        client.close()
        dialler.close()
