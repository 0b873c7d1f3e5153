"""A worker's life: loading, listening, draining."""

from __future__ import annotations

import argparse
import logging
import math
import os
import queue
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType

from backends.errors import UserError
from backends.he.descriptors import require_descriptors
from backends.he.store import WorkerPart
from backends.net.addresses import address_of
from backends.net.counts import Counts
from backends.net.devices import Devices, OneDevice
from backends.net.listening import Limits
from backends.net.loop import Hooks
from backends.net.pages import StatusPages
from backends.net.serving import Service, serving
from backends.net.tls import Tls, identity_in, require_loopback
from backends.serve import require_parameters, worker_cipher
from protocol.admission import Quota
from protocol.worker import WorkerConfig
from scenarios.cli import choose_kernel
from scenarios.worker_log import EventLog

_SOON_DAYS = 14
_LOOK_S = 0.5


class ListenError(UserError):
    """The worker cannot listen where it was told to."""


class ShareError(UserError):
    """The shares that owners were given contradict each other."""


class MissingError(UserError):
    """What an option needs is not installed."""


class WorkerFailedError(UserError):
    """The worker stopped by itself."""


def devices_of(args: argparse.Namespace, log: EventLog, stack: ExitStack) -> tuple[Devices, str]:
    """What multiplies, loaded, and its name.

    Raises PreparationError for a model that is none, GpuError for `cuda` without a usable GPU,
    KernelError for one that cannot run here, and ClusterError of `--ray`.
    """
    if args.ray:
        return shards_of(args, log, stack)
    part = WorkerPart.open(args.model)
    kernel = choose_kernel(args.kernel) if args.backend == "cpu" else None
    if kernel is not None and kernel.warning:
        logging.warning("%s", kernel.warning)
    cipher, name = worker_cipher(require_parameters(part), args.backend, kernel)
    return OneDevice.holding(part, cipher), name


def shards_of(args: argparse.Namespace, log: EventLog, stack: ExitStack) -> tuple[Devices, str]:
    """The same of shards on a Ray cluster, which is left when `stack` ends."""
    part = WorkerPart.open(args.model, range(0))
    require_parameters(part)
    cluster = joined(args.ray)
    stack.callback(cluster.leave)
    shards = cluster.RayShards(
        # A shard's process is in whichever directory its machine's Ray was started in.
        part, args.model.absolute(), args.shards, args.backend,
        lambda what: log.event("waiting", what=what),
    )  # fmt: skip
    return shards, f"{shards.name}, {shards.count} shards"


def extra(module: str, option: str, name: str) -> ModuleType:
    """A module that needs what not every worker has. Raises MissingError where it is not there."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{option} needs more; in the sources: pip install -c constraints.txt -e '.[{name}]'"
        ) from error


def traced(endpoint: str | None, devices: Devices, stack: ExitStack) -> Hooks | None:
    """What sends OpenTelemetry spans to an endpoint, until `stack` ends; None without one."""
    if endpoint is None:
        return None
    spans = extra("backends.net.spans", "--traces", "traces").Spans(devices.catalogue, endpoint)
    stack.callback(spans.close)
    hooks: Hooks = spans.hooks
    return hooks


def joined(address: str) -> ModuleType:
    """`backends.cluster.devices`, in a Ray cluster that it has joined.

    Raises ClusterError when there is none, MissingError where Ray is not installed.
    """
    cluster = extra("backends.cluster.devices", "--ray", "ray")
    cluster.connect(address)
    return cluster


def release(args: argparse.Namespace, log: EventLog) -> None:
    """End the shards of a model on a Ray cluster."""
    part = WorkerPart.open(args.model, range(0))
    cluster = joined(args.ray)
    try:
        log.event("released", shards="ended" if cluster.release(part) else "there were none")
    finally:
        cluster.leave()


def quota_of(args: argparse.Namespace) -> Quota:
    """What one owner may have in hand, and over time."""
    rate = math.inf if args.owner_mb_per_s is None else 1e6 * args.owner_mb_per_s
    return Quota(args.owner_requests, round(1e6 * args.owner_mb), bytes_per_s=rate)


def shares_of(args: argparse.Namespace) -> dict[str, int]:
    """What owners have shares of their own in, by their certificates.

    Raises CertificateError for a file that holds none, ShareError for one named twice.
    """
    shares: dict[str, int] = {}
    for path, share in args.share:
        owner = identity_in(path)
        if owner in shares:
            raise ShareError(f"--share names the owner of {path} twice; name each once")
        shares[owner] = share
    return shares


def warn_of_expiry(directory: Path, end: datetime) -> None:
    """While there is time to make new ones."""
    left = (end - datetime.now(timezone.utc)).days
    if left < _SOON_DAYS:
        logging.warning("the certificate in %s ends in %d days, on %s", directory, left, end.date())


class State:
    """Where the worker is in its life, and what asks it to end."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._asked = False
        self._ended = False
        # Unlike an event's, its lock may be taken anew by a signal's handler.
        self._why_end: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.serving = False
        self.service: Service | None = None

    def listen_to_signals(self) -> None:
        """From now on SIGTERM and Ctrl-C drain, and the second one ends the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._log.event("stopped", how="at once, by a second signal")
            os._exit(1)
        self._asked = True
        self.serving = False
        self.end()

    def end(self) -> None:
        """It is to end. From any thread, and from a signal's handler."""
        self._ended = True
        self._why_end.put(None)

    def ending(self) -> bool:
        """Whether it is to end."""
        return self._ended

    def wait_for_end(self) -> None:
        """Until it is to end."""
        while not self._ended:
            with suppress(queue.Empty):
                # A signal that another thread has received wakes nobody up.
                self._why_end.get(timeout=_LOOK_S)

    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.serving and not self._ended and self.healthy()

    def healthy(self) -> bool:
        """Whether it works, loading and draining included."""
        return self.service is None or not self.service.server.failure


@contextmanager
def status_pages(address: str | None, counts: Counts, state: State) -> Iterator[str]:
    """/metrics, /healthz and /readyz at an address; yields where. Nothing without an address.

    Raises ListenError when it cannot be had, AddressError when it is none.
    """
    if address is None:
        yield ""
        return
    host, port = address_of(address, least_port=0)
    try:
        pages = StatusPages(host, port, counts, state.ready, state.healthy)
    except OSError as error:
        raise _cannot_listen("--metrics", address, error) from error
    try:
        yield f"{host}:{pages.port}"
    finally:
        pages.close()


def _cannot_listen(option: str, address: str, error: OSError) -> ListenError:
    return ListenError(
        f"cannot listen on {address} ({error.strerror or error}); choose another {option}"
    )


def run(args: argparse.Namespace, log: EventLog) -> None:
    """Serve until told to stop, then drain."""
    host, port = address_of(args.listen, least_port=0)
    tls = None if args.tls is None else Tls(args.tls)
    if tls is None:
        require_loopback(host)
    else:
        warn_of_expiry(args.tls, tls.require_current())
    shares, state, counts = shares_of(args), State(log), Counts()
    with status_pages(args.metrics, counts, state) as pages, ExitStack() as stack:
        log.event("loading", model=str(args.model), **({"metrics": pages} if pages else {}))
        devices, multiplies = devices_of(args, log, stack)
        hooks = traced(args.traces, devices, stack)
        quota = quota_of(args)
        each = min(args.links_per_owner, args.links)
        limits = Limits(each, args.links, unsent_each=quota.size)
        require_descriptors(2 * limits.links + limits.opening, f"--links {limits.links} needs")
        state.listen_to_signals()
        try:
            service = stack.enter_context(
                serving(
                    devices, host, port, tls,
                    WorkerConfig(args.max_tokens, quota, shares), limits, hooks,
                    counts=counts, tell=log.on_line, on_crash=state.end,
                )
            )  # fmt: skip
        except OSError as error:
            raise _cannot_listen("--listen", args.listen, error) from error
        state.service, state.serving = service, not state.ending()
        held = devices.catalogue.matrices
        log.event(
            "listening", address=f"{host}:{service.port}",
            tls="mutual-1.3" if tls else "none, this machine only",
            model=devices.catalogue.model_digest.hex(), multiplies=multiplies,
            matrices=len(held), weight_bytes=sum(m.in_features * m.out_features for m in held[::2]),
        )  # fmt: skip
        state.wait_for_end()
        drain(service, args.drain_s, log)
    log.event("stopped", how="drained", unanswered=0)


def drain(service: Service, drain_s: float, log: EventLog) -> None:
    """Drain a worker that was told to stop.

    Raises WorkerFailedError for one that stopped by itself.
    """
    if service.server.failure:
        raise WorkerFailedError(
            f"the worker cannot go on ({service.server.failure}); start it again"
        )
    counts = service.server.counts
    log.event("draining", in_hand=counts.in_hand, links=counts.links, at_most_s=drain_s)
    answered = service.drain(drain_s)
    if not answered:
        log.event("stopped", how="out of time", unanswered=counts.in_hand)
        os._exit(0)  # whatever still computes has had its time
