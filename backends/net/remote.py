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
REACHED_S = 30.0
"""Within so many seconds one of the workers must answer, before anything is computed."""
_GOODBYE_S, _HURRIED_S = 10.0, 0.5


class _Identities:
    """Who is at which address: the first identity that is believed there, for the whole session.

    An answer is checked some time after it came; whoever is caught then must be who gave it.
    """

    def __init__(self, ledger: WorkerLedger) -> None:
        self._ledger = ledger
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def believe(self, worker: str, identity: str) -> str:
        """Whether an identity may serve at this address: why not, or nothing."""
        with self._lock:
            caught = self._ledger.retired.get(identity)
            if caught is not None:
                return f"its key {identity[:16]}... is not to be used: {caught}"
            known = self._known.setdefault(worker, identity)
        if known != identity:
            return (
                f"answers under another key than before ({identity[:16]}..., not "
                f"{known[:16]}...); restart the run to use it"
            )
        return ""

    def of(self, worker: str) -> str:
        """The identity of a worker."""
        with self._lock:
            return self._known.get(worker, worker)

    def named(self, identity: str) -> list[str]:
        """Every address where this identity has been believed."""
        with self._lock:
            return [worker for worker, known in self._known.items() if known == identity]


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

    Raises AddressError, CertificateError for a worker elsewhere without TLS, and
    WorkerUnreachableError when none can be reached: a worker that goes away later is waited for.
    """
    # Owners that name the same workers begin with different ones.
    turn = secrets.randbelow(max(1, len(workers)))
    addresses = {text: address_of(text) for text in (*workers[turn:], *workers[:turn])}
    if tls is None:
        for host, _ in addresses.values():
            require_loopback(host)
    ledger = ledger or WorkerLedger()
    identities = _Identities(ledger)
    catalogue = prepared.catalogue(owner_cipher.packing)
    hooks = hooks or Hooks()
    backlog = Backlog(UNHANDLED_BYTES, hooks)
    client: OwnerClient

    def deliver(worker: str, frame: memoryview) -> None:
        backlog.arrived(worker, frame)
        client.deliver(worker, frame)

    def caught(identity: str) -> None:
        # Written down by now: who is not dropped here is not believed when it is dialled.
        why = f"its key {identity[:16]}... was caught: {ledger.retired.get(identity, '')}"
        for worker in identities.named(identity):
            dialler.drop(worker, why)

    dialler = Dialler(
        addresses, tls, catalogue.largest_frame(MAX_TOKENS), deliver,
        lambda worker: client.disconnected(worker),
        lambda worker, why: client.lost(worker, why), identities.believe, backlog.full,
    )  # fmt: skip
    client = OwnerClient(
        catalogue, prepared.owner_matrices(), owner_cipher, list(addresses), dialler.send,
        config, lanes, replace(hooks, observe=backlog.observe),
        identity_of=identities.of, audit=audit, ledger=ledger, on_caught=caught,
    )  # fmt: skip
    try:
        dialler.require_somebody(REACHED_S)
    except BaseException:
        dialler.close()
        raise
    client.start()
    goodbye_s = _GOODBYE_S
    try:
        yield client
    except BaseException:
        goodbye_s = _HURRIED_S  # whoever has stopped waits for nobody
        raise
    finally:
        client.close(goodbye_s)
        dialler.close()
