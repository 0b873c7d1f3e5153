"""What the real scenarios share: a private session, its training, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.net.audit import Audit
from backends.net.inprocess import in_process, worker_name
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from backends.nn.checkpoint import set_aside
from backends.nn.skeleton import Skeleton
from backends.nn.trainer import Trainer
from scenarios.hardware import CPU, Hardware
from scenarios.real_trace import RealTrace


@dataclass
class Usage:
    """Counters of a private session at one moment, or the difference of two.

    owner_s, worker_s  computing: of this machine's threads, or on the GPU, of its device time
    copied_s           between host and GPU, in device time
    waited_s           lanes blocked in remote linears, summed over lanes
    """

    owner_s: float
    worker_s: float
    copied_s: float
    waited_s: float
    bytes_up: int
    bytes_down: int
    blocks: int

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
        )


def open_ledger(out: Path, checkpoints: Path) -> WorkerLedger:
    """The ledger of the run in directory `out`. No checkpoint rests on who is in it, afterwards.

    Raises LedgerError when it is damaged, or when the worker of this process was caught there.
    """
    ledger = WorkerLedger(out / "retired-workers.json")
    # Before anything is refused: whoever deletes the ledger's file must not go on from those.
    set_aside(checkpoints, ledger.retired)
    ledger.require_one_of([worker_name(0)])
    return ledger


class PrivateSession:
    """An owner connected to a worker in this process, with real encryption."""

    def __init__(
        self, cipher: OwnerCipher, client: OwnerClient, server: WorkerServer, hardware: Hardware
    ) -> None:
        self._cipher = cipher
        self._client = client
        self._server = server
        self._hardware = hardware
        self._spent_s = {"owner": 0.0, "worker": 0.0, "copy": 0.0}

    def usage(self) -> Usage:
        """Counters so far."""
        spent = self._spent_s
        if self._hardware.gpu is None:
            spent["owner"] = self._client.meter.total_busy_s()
            spent["worker"] = self._server.meter.total_busy_s()
        else:
            for name, seconds in self._hardware.gpu.clock.take().items():
                spent[name] += seconds
        return Usage(
            spent["owner"],
            spent["worker"],
            spent["copy"],
            self._client.waited_s,
            self._client.meter.bytes_sent,
            self._server.meter.bytes_sent,
            self._cipher.blocks,
        )

    def warm_up(self, prepared: PreparedModel) -> None:
        """One product, so that compiling the kernels is not taken for a slow first step."""
        ones = torch.ones(1, prepared.groups[0].in_features, device=self._hardware.device)
        self._client.linear(0, ones.numpy() if ones.device.type == "cpu" else ones)


def make_ciphers(
    prepared: PreparedModel, hardware: Hardware, hint_bytes: int | None
) -> tuple[OwnerCipher, WorkerCipher]:
    """The owner's and the worker's half, where `hardware` says."""
    parameters, public = prepared.parameters, prepared.public_matrix()
    assert parameters is not None
    if hardware.gpu is None:
        return MlweOwner(parameters, public), MlweWorker(parameters)
    # Only here: they need Triton and CuPy, which only a GPU needs.
    from backends.he.cuda.owner import CudaOwner
    from backends.he.cuda.worker import CudaWorker

    gpu = hardware.gpu
    local = not hardware.host_frames
    owner = CudaOwner(parameters, public, gpu, local=local, hint_bytes=hint_bytes)
    return owner, CudaWorker(parameters, gpu)


@contextmanager
def private_session(
    skeleton: Skeleton,
    prepared: PreparedModel,
    lanes: int,
    trace: RealTrace | None = None,
    hardware: Hardware = CPU,
    hint_bytes: int | None = None,
    ledger: WorkerLedger | None = None,
) -> Iterator[PrivateSession]:
    """Connects the skeleton's remote linears to an in-process worker under real encryption.

    ledger      who serves and who was caught, shared with the trainer
    trace       is told who did what when
    hint_bytes  on a GPU: memory that hints may take there (None: half of what is free)
    """
    owner, worker = make_ciphers(prepared, hardware, hint_bytes)
    prepared.guard(owner)
    assert prepared.parameters is not None
    audit = Audit(MlweWorker(prepared.parameters), prepared.worker_weights())
    hooks = trace.hooks if trace else lambda side: Hooks()
    with (
        hardware.timed(),
        in_process(
            prepared, owner, [worker], lanes=lanes, hooks=hooks, audit=audit, ledger=ledger
        ) as (client, (server,)),
    ):
        session = PrivateSession(owner, client, server, hardware)
        session.warm_up(prepared)
        if ledger is not None:
            ledger.start_over()  # nothing rests on that product
        with skeleton.remote.connected(client.linear):
            yield session


def train_with_bar(
    trainer: Trainer,
    label: str,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    trace: RealTrace | None = None,
) -> list[float]:
    """Train under a live progress bar; returns the losses of all steps."""
    with tqdm(
        total=trainer.config.steps,
        initial=trainer.progress.step,
        desc=label,
        unit="step",
        dynamic_ncols=True,
    ) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step - bar.n)
            if trace is not None:
                trace.step_ended(trainer.step_seconds[-1])
            after_step(step, loss)

        def on_return(why: str) -> None:
            bar.update(trainer.progress.step - bar.n)
            bar.write(why)

        if trace is None:
            return trainer.train(on_step, on_return)
        trace.start()
        try:
            return trainer.train(on_step, on_return)
        finally:
            trace.stop()
