"""Serve owners who fine-tune privately: a worker that multiplies what it cannot read.

    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls certs/worker
    python -m scenarios.worker --model DIR --listen localhost:7443            this machine only
    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls DIR --backend cuda

DIR is a prepared model, as `python -m scenarios.prepare` makes it, or of that only manifest.json
and the folder worker/ (int8 weights, 1 GB for the 1B). Certificates for a first try come from
`python -m scenarios.certs`. Several owners may connect at once; each shows a certificate that
ca.pem stands for. Then, where the text is:

    python -m scenarios.llama1b --real-cpu --worker gpu.example:7443 --tls certs/owner ...

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

from backends.options import ALL, SECONDS, Modes, Parser, Whole, place
from scenarios.cli import add_kernel_option, clean_exit
from scenarios.worker_log import FORMATS, EventLog, capture_logging

LINKS = Whole(1, 10_000)
"""Each takes two connections, and their threads."""

MODES = Modes(
    {"cpu": "--backend cpu"},
    lambda args: (args.backend,),
    {"--kernel": ("cpu",)}
    | dict.fromkeys(
        (
            "--model", "--listen", "--tls", "--backend", "--max-tokens", "--links-per-owner",
            "--links", "--drain-s", "--metrics", "--log-format", "--verbose",
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
    add("--max-tokens", type=Whole(1, 1 << 20), default=4096, help="of one request (4096)")
    add("--links-per-owner", type=LINKS, default=4, metavar="N",
        help="links of one certificate; an owner's process opens one (4)")  # fmt: skip
    add("--links", type=LINKS, default=64, metavar="N", help="of all together (64)")
    add("--drain-s", type=SECONDS, default=20.0, metavar="S",
        help="seconds to finish the requests in hand when told to stop (20)")  # fmt: skip
    add("--metrics", type=with_host, metavar="[HOST:]PORT",
        help="serve /metrics, /healthz and /readyz there, over plain HTTP to whoever can reach it "
        "(on 127.0.0.1 when only a port is given); nothing without")  # fmt: skip
    add("--log-format", choices=FORMATS, default="text", help="of a line an event (text)")
    add("--verbose", action="store_true", help="also say which frames are dropped, and why")
    add_kernel_option(parser)
    return parser.parse()


def with_host(text: str) -> str:
    """An address, or a port of this machine only."""
    return text if ":" in text else f"127.0.0.1:{text}"


def main() -> None:
    args = parsed()
    from scenarios.worker.run import run  # which takes a second to load

    log = EventLog(args.log_format)
    capture_logging(log, logging.INFO if args.verbose else logging.WARNING)
    with clean_exit():
        run(args, log)


if __name__ == "__main__":
    main()
