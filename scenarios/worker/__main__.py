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
for the same layer are computed together. --owner-... say what one may have at once and over time,
--share gives one of them more.

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
from pathlib import Path
from urllib.parse import urlsplit

from backends.options import ALL, SECONDS, Modes, Number, Parser, Whole, place
from scenarios.cli import add_kernel_option, clean_exit
from scenarios.worker_log import FORMATS, EventLog, capture_logging

LINKS = Whole(1, 10_000)
"""Each takes two connections, and their threads."""

MODES = Modes(
    {"own-cpu": "--backend cpu without --ray", "ray": "--ray"},
    lambda args: ("ray",) if args.ray else (f"own-{args.backend}",),
    {"--kernel": ("own-cpu",), "--shards": ("ray",), "--release": ("ray",)}
    | dict.fromkeys(
        (
            "--model", "--listen", "--tls", "--backend", "--max-tokens", "--links-per-owner",
            "--links", "--owner-requests", "--owner-mb", "--owner-mb-per-s", "--share", "--drain-s",
            "--metrics", "--log-format", "--verbose", "--ray", "--traces",
        ),
        ALL,
    ),
)  # fmt: skip


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
        help="parts of the model, on a GPU or CPU each (as many as are there, or one for each GPU "
        "or machine)")  # fmt: skip
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
    add("--share", type=share, action="append", default=[], metavar="CERT=N",
        help="an owner's cert.pem, and how many times the bytes it has of another owner's while "
        "both always ask; repeat for each (all have 1)")  # fmt: skip
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
    args = parser.parse()
    if args.share and args.tls is None:
        parser.error("--share knows owners by their certificates, and without --tls there are none")
    return args


def share(text: str) -> tuple[Path, int]:
    """An owner's certificate, and a whole number."""
    path, _, times = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing like owner/cert.pem=2")
    return place(path), Whole(1, 1000)(times)


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
    from scenarios.worker.run import release, run  # which takes a second to load

    log = EventLog(args.log_format)
    capture_logging(log, logging.INFO if args.verbose else logging.WARNING)
    with clean_exit():
        (release if args.release else run)(args, log)


if __name__ == "__main__":
    main()
