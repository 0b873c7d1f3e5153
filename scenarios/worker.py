"""Serve owners who fine-tune privately: a worker that multiplies what it cannot read.

    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls certs/worker
    python -m scenarios.worker --model DIR --listen localhost:7443            this machine only
    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls DIR --backend cuda
    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls DIR --ray head:6379

DIR is a prepared model, as `python -m scenarios.prepare` makes it, or of that only manifest.json
and the folder worker/ (int8 weights, 1 GB for the 1B). Certificates for a first try come from
`python -m scenarios.certs`. Several owners may connect at once; each shows a certificate that
ca.pem stands for. Then, where the text is:

    python -m scenarios.llama1b --real-cpu --worker gpu.example:7443 --tls certs/owner ...

Owners share it fairly: those that always ask for something get the same bytes each, and requests
for the same layer are computed together. --owner-... say what one may have at once and over time.

A worker holds no secret and keeps nothing. SIGTERM or Ctrl-C drains it: no more links, BUSY to new
requests, then, when the requests in hand are answered or after --drain-s, the end with status 0; a
second signal ends it at once, with status 1. Owners find it again when it is back, or go on with
another.

--metrics HOST:PORT serves over plain HTTP, in numbers that tell nothing of any one owner:

    /metrics    counters for Prometheus       /healthz    200 while it works
    /readyz     200 while it takes requests, 503 while it loads or drains

docs/remote.md has all of it in order, from an empty machine on.
"""

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
from urllib.parse import urlsplit

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
from backends.net.tls import Tls, require_loopback
from backends.options import ALL, SECONDS, Modes, Number, Parser, Whole, place
from backends.serve import require_parameters, worker_cipher
from protocol.admission import Quota
from protocol.worker import WorkerConfig
from scenarios.cli import add_kernel_option, choose_kernel, clean_exit
from scenarios.worker_log import FORMATS, EventLog, capture_logging

_SOON_DAYS = 14
_LOOK_S = 0.5
LINKS = Whole(1, 10_000)
"""Each takes two connections, and their threads."""

MODES = Modes(
    {"own-cpu": "--backend cpu without --ray", "ray": "--ray"},
    lambda args: ("ray",) if args.ray else (f"own-{args.backend}",),
    {"--kernel": ("own-cpu",), "--shards": ("ray",), "--release": ("ray",)}
    | dict.fromkeys(
        (
            "--model", "--listen", "--tls", "--backend", "--max-tokens", "--links-per-owner",
            "--links", "--owner-requests", "--owner-mb", "--owner-mb-per-s", "--drain-s",
            "--metrics", "--log-format", "--verbose", "--ray", "--traces",
        ),
        ALL,
    ),
)  # fmt: skip


class ListenError(UserError):
    """The worker cannot listen where it was told to."""


class MissingError(UserError):
    """What an option needs is not installed."""


class WorkerFailedError(UserError):
    """The worker stopped by a mistake of its own."""


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
        part, args.model, args.shards, args.backend,
        lambda what: log.event("waiting", what=what),
    )  # fmt: skip
    return shards, f"{shards.name}, {shards.count} shards"


def extra(module: str, option: str, name: str) -> ModuleType:
    """A module that needs what not every worker has. Raises MissingError where it is not there."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingError(f"{option} needs more: pip install 'private-lora[{name}]'") from error


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
    state, counts = State(log), Counts()
    with status_pages(args.metrics, counts, state) as pages, ExitStack() as stack:
        log.event("loading", model=str(args.model), **({"metrics": pages} if pages else {}))
        devices, multiplies = devices_of(args, log, stack)
        hooks = traced(args.traces, devices, stack)
        limits = Limits(min(args.links_per_owner, args.links), args.links)
        require_descriptors(2 * limits.links + limits.opening, f"--links {limits.links} needs")
        state.listen_to_signals()
        try:
            service = stack.enter_context(
                serving(
                    devices, host, port, tls,
                    WorkerConfig(args.max_tokens, quota_of(args)), limits, hooks,
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
            f"the worker cannot go on ({service.server.failure}), which is a mistake in it; start "
            "it again"
        )
    counts = service.server.counts
    log.event("draining", in_hand=counts.in_hand, links=counts.links, at_most_s=drain_s)
    answered = service.drain(drain_s)
    if not answered:
        log.event("stopped", how="out of time", unanswered=counts.in_hand)
        os._exit(0)  # whatever still computes has had its time


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.worker", MODES)
    add = parser.add_argument
    add("--model", type=place, required=True, metavar="DIR",
        help="a prepared model, or a worker's part of one")  # fmt: skip
    add("--listen", default="localhost:7443", metavar="HOST:PORT", help="where (localhost:7443)")
    add("--tls", type=place, metavar="DIR", help="this side's ca.pem, cert.pem and key.pem")
    add("--backend", choices=("cpu", "cuda"), default="cpu", help="what multiplies (cpu)")
    add("--ray", nargs="?", const="auto", metavar="HOST:PORT",
        help="spread the layers over a Ray cluster that runs: its head, or this machine's without "
        "HOST:PORT; DIR lies on every machine of it")  # fmt: skip
    add("--shards", type=Whole(1, 10_000), metavar="N",
        help="parts of the model, on a GPU or CPU each (one for each GPU or machine)")  # fmt: skip
    add("--release", action="store_true",
        help="only end the shards of this model, which outlive their front doors")  # fmt: skip
    add("--max-tokens", type=Whole(1, 1 << 20), default=4096, help="of one request (4096)")
    add("--links-per-owner", type=LINKS, default=4, metavar="N",
        help="links of one certificate; an owner's process opens one (4)")  # fmt: skip
    add("--links", type=LINKS, default=64, metavar="N", help="of all together (64)")
    add("--owner-requests", type=Whole(1, 100_000), default=64, metavar="N",
        help="requests of one owner in hand, over all its links (64)")  # fmt: skip
    add("--owner-mb", type=Number(1, 1 << 20), default=512.0, metavar="MB",
        help="of those and their answers (512)")  # fmt: skip
    add("--owner-mb-per-s", type=Number(0.001, 1e6), metavar="MB",
        help="requests and answers of one owner over time, with a burst of two seconds; beyond "
        "it is told when to come back (no limit)")  # fmt: skip
    add("--drain-s", type=SECONDS, default=20.0, metavar="S",
        help="seconds to finish the requests in hand when told to stop (20)")  # fmt: skip
    add("--metrics", type=with_host, metavar="[HOST:]PORT",
        help="serve /metrics, /healthz and /readyz there, over plain HTTP to whoever can reach it "
        "(on 127.0.0.1 when only a port is given); nothing without")  # fmt: skip
    add("--traces", type=collector, metavar="URL",
        help="send OpenTelemetry spans of requests there, as http://localhost:4318/v1/traces; they "
        "name no owner")  # fmt: skip
    add("--log-format", choices=FORMATS, default="text", help="of a line an event (text)")
    add("--verbose", action="store_true", help="also say which frames are dropped, and why")
    add_kernel_option(parser)
    return parser.parse()


def collector(text: str) -> str:
    """Where OTLP over HTTP is taken."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no address like http://HOST:4318/v1/traces")
    return text


def with_host(text: str) -> str:
    """An address, or a port of this machine only."""
    return text if ":" in text else f"127.0.0.1:{text}"


def main() -> None:
    args = parsed()
    log = EventLog(args.log_format)
    capture_logging(log, logging.INFO if args.verbose else logging.WARNING)
    with clean_exit():
        (release if args.release else run)(args, log)


if __name__ == "__main__":
    main()
