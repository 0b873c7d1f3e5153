"""A private session: an owner's model, connected to workers under real encryption. Prints nothing.

    with opened(skeleton, prepared, workers=Workers(("gpu.example:7443",), Tls(certs))) as session:
        ...  # the skeleton's remote linears compute

`private_lora` makes it usable on a model of transformers; scenarios add bars, probes and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from backends.defaults import SCHEMES
from backends.errors import UserError
from backends.hardware import CPU, Hardware
from backends.he.interface import Exactness, OwnerCipher, OwnerMatrix, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.openfhe.library import openfhe
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.memory import give_back, keep_one_heap
from backends.net.addresses import address_of
from backends.net.audit import Audit
from backends.net.inprocess import in_process
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient
from backends.net.remote import connected
from backends.net.tls import Tls, require_loopback
from backends.net.worker import WorkerServer
from backends.nn.kept import Kept, kept_activations
from backends.nn.skeleton import Skeleton

keep_one_heap()  # when this is imported: once a thread has a heap of its own, it is too late


@dataclass(frozen=True)
class Workers:
    """Who multiplies: workers at these addresses, over TLS; without any, one in this process."""

    addresses: tuple[str, ...] = ()
    tls: Tls | None = None

    @classmethod
    def at(cls, addresses: Sequence[str], certificates: Path | None) -> Workers:
        """Workers at "host:port" each, and this side's certificates in a directory.

        Raises AddressError, or CertificateError for certificates that cannot be used, and for
        workers elsewhere without any.
        """
        for text in addresses:
            host, _ = address_of(text)
            if certificates is None:
                require_loopback(host)
        tls = None if certificates is None else Tls(certificates)
        if tls is not None:
            tls.require_current()
        return cls(tuple(addresses), tls)


HERE = Workers()


@dataclass
class Usage:
    """Counters of a private session at one moment, or the difference of two.

    owner_s, worker_s  computing: of this machine's threads, or on the GPU, of its device time
    copied_s           between host and GPU, in device time
    waited_s           lanes blocked in remote linears, summed over lanes
    answers            decrypted and found to be the product that was asked for
    """

    owner_s: float
    worker_s: float
    copied_s: float
    waited_s: float
    bytes_up: int
    bytes_down: int
    blocks: int
    answers: int

    def since(self, before: Usage) -> Usage:
        """What was used after `before`."""
        return Usage(
            self.owner_s - before.owner_s,
            self.worker_s - before.worker_s,
            self.copied_s - before.copied_s,
            self.waited_s - before.waited_s,
            self.bytes_up - before.bytes_up,
            self.bytes_down - before.bytes_down,
            self.blocks - before.blocks,
            self.answers - before.answers,
        )


class Session:
    """An owner connected to workers.

    server  the worker in this process, if there is one
    kept    counts of activations that are kept, where they are
    """

    def __init__(
        self, cipher: OwnerCipher, matrices: Sequence[OwnerMatrix], client: OwnerClient,
        server: WorkerServer | None, hardware: Hardware, kept: Kept | None = None,
    ) -> None:  # fmt: skip
        self._cipher = cipher
        self._matrices = matrices
        self._client = client
        self._server = server
        self.kept = kept
        self.hardware = hardware
        self._spent_s = {"owner": 0.0, "worker": 0.0, "copy": 0.0}

    def usage(self) -> Usage:
        """Counters so far."""
        spent = self._spent_s
        if self.hardware.gpu is None:
            spent["owner"] = self._client.meter.total_busy_s()
            spent["worker"] = self._server.meter.total_busy_s() if self._server else 0.0
        else:
            for name, seconds in self.hardware.gpu.clock.take().items():
                spent[name] += seconds
        return Usage(
            spent["owner"],
            spent["worker"],
            spent["copy"],
            self._client.waited_s,
            self._client.meter.bytes_sent,
            self._client.meter.bytes_received,
            self._cipher.blocks,
            self._client.meter.tasks.get("Decrypt", 0),
        )

    def exactness(self) -> Exactness | None:
        """How exact products are by now, of matrices that were asked for."""
        return self._cipher.exactness(self._matrices)

    def product_of_ones(self, matrix: int, tokens: int, inputs: int) -> None:
        """One product, whose result nobody needs: to compile kernels, or to look at the line."""
        ones = torch.ones(tokens, inputs, device=self.hardware.device)
        self._client.linear(matrix, ones.numpy() if ones.device.type == "cpu" else ones)


class SchemeError(UserError, ValueError):
    """A cipher was chosen where it cannot run; the text says where it can."""


def require_scheme(scheme: str, hardware: Hardware, workers: Workers) -> None:
    """Raise SchemeError or OpenFheError where a session with this cipher cannot be had."""
    if scheme == SCHEMES[0]:
        return
    if workers.addresses or hardware.gpu is not None:
        raise SchemeError(
            f"{scheme} is here to be compared with, on this machine's CPU, with the worker in this "
            f"process; leave --worker out, or the scheme at {SCHEMES[0]}"
        )
    openfhe()


def make_ciphers(
    prepared: PreparedModel, hardware: Hardware, hint_bytes: int | None, workers: Workers,
    scheme: str = SCHEMES[0],
) -> tuple[OwnerCipher, list[WorkerCipher]]:  # fmt: skip
    """The owner's half, where `hardware` says, and beside it the worker's when it is here.

    Raises what `require_scheme` does.
    """
    require_scheme(scheme, hardware, workers)
    if scheme != SCHEMES[0]:
        # Only here: who does without it need not have it.
        from backends.he.openfhe.owner import OpenFheOwner
        from backends.he.openfhe.worker import OpenFheWorker

        return OpenFheOwner(scheme), [OpenFheWorker(scheme)]
    parameters, public = prepared.parameters, prepared.public_matrix()
    assert parameters is not None
    elsewhere = bool(workers.addresses)
    if hardware.gpu is None:
        here: list[WorkerCipher] = [] if elsewhere else [MlweWorker()]
        return MlweOwner(parameters, public), here
    # Only here: they need Triton and CuPy, which only a GPU needs.
    from backends.he.cuda.owner import CudaOwner
    from backends.he.cuda.worker import CudaWorker

    gpu = hardware.gpu
    local = not (hardware.host_frames or elsewhere)
    owner = CudaOwner(parameters, public, gpu, local=local, hint_bytes=hint_bytes)
    return owner, [] if elsewhere else [CudaWorker(gpu)]


@contextmanager
def opened(
    skeleton: Skeleton,
    prepared: PreparedModel,
    lanes: int = 1,
    hooks: Callable[[str], Hooks] = lambda side: Hooks(),
    hardware: Hardware = CPU,
    hint_bytes: int | None = None,
    ledger: WorkerLedger | None = None,
    workers: Workers = HERE,
    keep_bytes: int = 0,
    first: Callable[[Session], None] = lambda session: None,
    scheme: str = SCHEMES[0],
) -> Iterator[Session]:
    """Connects the skeleton's remote linears to workers under real encryption.

    lanes       micro-batches that may be in flight at once
    hooks       makes those of "owner" and of the worker in this process
    hint_bytes  on a GPU: memory that hints may take there (None: half of what is free)
    ledger      who serves and who was caught, shared with whoever trains
    keep_bytes  memory for activations that do not change (`kept_activations`); 0 keeps none
    first       is called when the session works, before anything rests on it
    scheme      one of SCHEMES; any but the first takes of the prepared model its weights alone

    Raises what `make_ciphers` and `backends.net.remote.connected` do, and CannotKeepError.
    """
    owner, here = make_ciphers(prepared, hardware, hint_bytes, workers, scheme)
    prepared.guard(owner)
    honest = MlweWorker() if owner.packing is None else here[0]
    audit = Audit(honest, prepared.worker_matrices())
    with ExitStack() as stack:
        kept = None
        if keep_bytes:
            caught = (lambda: 0) if ledger is None else lambda: len(ledger.retired)
            kept = stack.enter_context(
                kept_activations(
                    skeleton.model, skeleton.remote, skeleton.groups, keep_bytes, caught
                )
            )  # fmt: skip
        stack.enter_context(hardware.timed())
        server: WorkerServer | None = None
        if workers.addresses:
            client = stack.enter_context(
                connected(
                    prepared, owner, workers.addresses, workers.tls, None, lanes, hooks("owner"),
                    audit, ledger,
                )
            )  # fmt: skip
        else:
            client, (server,) = stack.enter_context(
                in_process(prepared, owner, here, lanes=lanes, hooks=hooks, audit=audit,
                           ledger=ledger)
            )  # fmt: skip
        session = Session(owner, prepared.owner_matrices(), client, server, hardware, kept)
        # So that compiling the kernels is not taken for a slow first step.
        session.product_of_ones(0, 1, prepared.groups[0].in_features)
        first(session)
        owner.start_over()
        give_back()  # what setting up and looking at the line have left
        if ledger is not None:
            ledger.start_over()  # nothing rests on those products
        with skeleton.remote.connected(client.linear, skeleton.local_head(prepared)):
            yield session
