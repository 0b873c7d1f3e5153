"""The owner on the real clock: cipher, owner's machine, and blocking calls for lanes.

Refuses a cipher whose randomness is simulated: there is no switch for that. One that does not
encrypt, or does not check, is refused for workers in other processes, and there is none for that.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.errors import UserError
from backends.he.interface import AnyPayload, OwnerCipher, OwnerMatrix, Values, carried
from backends.ledger import LedgerError, WorkerLedger
from backends.net.audit import Audit
from backends.net.loop import Hooks, MachineLoop, Meter
from protocol.catalogue import Catalogue
from protocol.errors import WrongAnswerError
from protocol.events import (
    Abort,
    Closed,
    CloseWanted,
    Decrypt,
    Deliver,
    Discard,
    Disconnected,
    Dropped,
    Effect,
    Encrypt,
    FailCall,
    FrameArrived,
    LinearWanted,
    PeerLost,
    Retired,
    Start,
    Task,
)
from protocol.messages import SESSION_BYTES, Frame
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig

log = logging.getLogger(__name__)


class RemoteLinearError(UserError, RuntimeError):
    """A remote linear ended without a result; the text says which layer, why, and what to do."""


class SimulatedRandomnessError(ValueError):
    """A real run was given a cipher whose secrets come from a seed."""


class UnsafeCipherError(ValueError):
    """A worker elsewhere was to be trusted with what the cipher does not protect."""


@dataclass(eq=False)
class _Held:
    """What opens the answer to one request, and the request where its answer is audited.

    on_host  whether the cipher computes on this machine's processor
    """

    sealed: Any = field(repr=False)
    on_host: bool
    audited: AnyPayload | None = field(default=None, repr=False)


class OwnerClient:
    """Blocking remote linears over the owner's machine. Safe to call from several lanes.

    transmit      sends (worker name, frame)
    identity_of   what a worker is called in the ledger: what it has proved to be, not where it is
    workers_here  all workers are in this process: then, and only then, a cipher may have a weakness
    audit         what recomputes a request now and then; None never does
    ledger        who serves and who was caught: told of every answer, and those caught in earlier
                  sessions are not used; None keeps that for this session only
    on_caught     is told the identity of a worker that was caught, on the thread that opened its
                  answer, once it is in the ledger
    """

    def __init__(
        self,
        catalogue: Catalogue,
        matrices: Sequence[OwnerMatrix],
        cipher: OwnerCipher,
        workers: Sequence[str],
        transmit: Callable[[str, Frame], None],
        config: OwnerConfig | None = None,
        threads: int = 1,
        hooks: Hooks | None = None,
        workers_here: bool = False,
        identity_of: Callable[[str], str] = lambda worker: worker,
        audit: Audit | None = None,
        ledger: WorkerLedger | None = None,
        on_caught: Callable[[str], None] = lambda identity: None,
    ) -> None:
        self._hooks = hooks or Hooks()
        if cipher.simulated_randomness:
            raise SimulatedRandomnessError(
                "this cipher draws its secrets from a seed: anyone who knows the seed reads the "
                "data. Use OsEntropy for real runs; SeededEntropy is for the simulator and tests"
            )
        weakness = None if workers_here else cipher.weakness(matrices)
        if weakness is not None:
            raise UnsafeCipherError(
                f"this cipher is not for a worker in another process: {weakness}. Use the "
                "module-LWE cipher, with every matrix guarded"
            )
        self._matrices = matrices
        self._cipher = cipher
        self._audit = audit
        self._ledger = ledger or WorkerLedger()
        self._identity_of, self._on_caught = identity_of, on_caught
        # A new incarnation at every start: nothing random survives a crash or a resume.
        session = os.urandom(SESSION_BYTES)
        machine = Owner(session, catalogue, workers, config, retired=self._ledger.retired)
        self._loop = MachineLoop(
            "owner", machine, self._compute, transmit, self._report, self._crashed, threads,
            self._hooks.observe, self._hooks.on_task, _is_small,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._calls = itertools.count(1)
        self._pending: dict[int, Future[Values]] = {}
        self._closed = threading.Event()
        self._failure: str | None = None
        # What may still open an answer, by its id; None once all are wiped.
        self._held: dict[int, _Held] | None = {}
        self.waited_s = 0.0
        """Seconds lanes have spent blocked in `linear`, summed over lanes."""

    @property
    def meter(self) -> Meter:
        """Counters of the owner's side of the wire."""
        return self._loop.meter

    def start(self) -> None:
        """Open the sessions. Calls may be made at once; they wait for a worker."""
        self._loop.start()
        self._loop.post(Start())

    def deliver(self, worker: str, frame: Frame | memoryview) -> None:
        """Hand over a frame that arrived from `worker`."""
        self._loop.meter.bytes_received += len(frame)
        self._loop.post(FrameArrived(worker, frame))

    def disconnected(self, worker: str) -> None:
        """The connection to `worker` has ended; the next frame to it finds another."""
        self._loop.post(Disconnected(worker))

    def lost(self, worker: str, reason: str) -> None:
        """The transport to `worker` is gone for good."""
        log.error("worker %s cannot be had: %s", worker, reason)
        self._loop.post(PeerLost(worker, reason))

    def linear(self, matrix: int, x: Values) -> Values:
        """float32[T, N] = x[T, K] times matrix `matrix`, computed under encryption.

        An array gives an array; the GPU's cipher takes tensors too, and gives tensors for them.

        Blocks. Raises RemoteLinearError when it cannot be had.
        """
        future: Future[Values] = Future()
        with self._lock:
            if self._failure is not None:
                raise RemoteLinearError(self._failure)
            call = next(self._calls)
            self._pending[call] = future
            # Posted under the lock: the machine takes calls in increasing order.
            self._loop.post(LinearWanted(call, matrix, len(x), x))
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            end = time.perf_counter()
            with self._lock:
                self.waited_s += end - start
            self._hooks.on_call(call, start, end)

    def close(self, timeout_s: float = 10.0) -> None:
        """Say goodbye to every worker and stop."""
        try:
            if self._failure is None:
                self._loop.post(CloseWanted())
                self._closed.wait(timeout_s)
        finally:
            # Whoever asks from now on would wait for a machine that has stopped.
            self._fail_all("the session is closed")
            self._loop.stop()
            self._wipe_held()

    def _compute(self, task: Task) -> object:
        if isinstance(task, Encrypt):
            encrypted = self._cipher.encrypt(task.x, self._matrices[task.matrix])
            held = self._hold(_Held(encrypted.sealed, isinstance(task.x, np.ndarray)))
            payload = carried(encrypted.payload)
            held.audited = None if self._audit is None else self._audit.keep(payload)
            return payload, held
        assert isinstance(task, Decrypt)
        try:
            return self._open(task)
        except WrongAnswerError as error:
            self._caught(task.worker, str(error))
            raise

    def _open(self, task: Decrypt) -> Values:
        assert isinstance(task.sealed, _Held)
        matrix, held = self._matrices[task.matrix], task.sealed
        if self._audit is not None and held.audited is not None:
            self._audit.require(task.matrix, task.tokens, held.audited, task.payload)
        result = self._cipher.decrypt(held.sealed, task.payload, matrix, task.worker)
        self._let_go(held)
        self._ledger.accepted(self._identity_of(task.worker))
        return result

    def _caught(self, worker: str, found: str) -> None:
        """On the disk before anybody hears of it, and whatever has become of the call meanwhile."""
        identity = self._identity_of(worker)
        try:
            self._ledger.retire(identity, found)
        except (OSError, LedgerError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self._fail_all(
                f"worker {worker!r} gave a wrong answer, and that cannot be written down "
                f"({why}): a restart would trust it again"
            )
        self._on_caught(identity)

    def _hold(self, held: _Held) -> _Held:
        with self._lock:
            if self._held is not None:
                self._held[id(held)] = held
                return held
        self._cipher.discard(held.sealed)  # the machine is gone, and will not ask for it
        return held

    def _let_go(self, held: _Held) -> None:
        with self._lock:
            if self._held is not None:
                self._held.pop(id(held), None)

    def _wipe_held(self) -> None:
        """What the machine has not said goodbye to, when it can say nothing any more."""
        with self._lock:
            left, self._held = self._held, None
        for held in (left or {}).values():
            self._cipher.discard(held.sealed)

    def _report(self, effect: Effect) -> None:
        match effect:
            case Deliver(call, result):
                # Gone like those that failed, see below.
                waiting = self._no_longer_waits(call)
                if waiting is not None:
                    waiting.set_result(result)
            case FailCall(call, reason):
                # Gone when an abort has failed it while its request was still queued.
                waiting = self._no_longer_waits(call)
                if waiting is not None:
                    waiting.set_exception(RemoteLinearError(reason))
            case Discard(_, held):
                assert isinstance(held, _Held)
                self._let_go(held)
                self._cipher.discard(held.sealed)
            case Retired(peer, reason):
                log.error("worker %s is not used any more: %s", peer, reason)
            case Abort(reason):
                self._fail_all(reason)
            case Dropped(peer, reason):
                self._loop.meter.dropped += 1
                log.info("dropped a frame of %s: %s", peer, reason)
            case Closed():
                self._closed.set()

    def _crashed(self, error: BaseException) -> None:
        self._fail_all(f"the owner's protocol machine stopped: {type(error).__name__}: {error}")
        self._wipe_held()

    def _no_longer_waits(self, call: int) -> Future[Values] | None:
        """Whoever takes it out, and nobody else, says how it ended."""
        with self._lock:
            return self._pending.pop(call, None)

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason  # the first is the cause
            failed, self._pending = self._pending, {}
        for future in failed.values():
            future.set_exception(RemoteLinearError(reason))
        self._closed.set()


def _is_small(task: Task) -> bool:
    """Of one token, and not of a GPU, whose kernels another thread had better wait for."""
    if task.tokens != 1:
        return False
    if isinstance(task, Encrypt):
        return isinstance(task.x, np.ndarray)
    return isinstance(task, Decrypt) and isinstance(task.sealed, _Held) and task.sealed.on_host
