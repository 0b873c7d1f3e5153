"""Serve owners who fine-tune privately: a worker that multiplies what it cannot read.

    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls certs/worker
    python -m scenarios.worker --model DIR --listen localhost:7443            this machine only
    python -m scenarios.worker --model DIR --listen 0.0.0.0:7443 --tls DIR --backend cuda

DIR is a prepared model, as `python -m scenarios.prepare` makes it and names it at its end. A worker
needs manifest.json and the folder worker/ of it (int8 weights, 1 GB for the 1B). Certificates for
a first try come from `python -m scenarios.certs`. Several owners may connect at once; each shows a
certificate that ca.pem stands for. Then, where the text is:

    python -m scenarios.llama1b --real-cpu --worker gpu.example:7443 --tls certs/owner ...

A worker holds no secret and keeps nothing. Ctrl-C or SIGTERM ends it at once: owners find it again
when it is back, or go on with another.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from pathlib import Path
from types import FrameType

from backends.errors import UserError
from backends.he.interface import WorkerCipher
from backends.he.manifest import PreparationError
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from backends.he.store import WorkerPart
from backends.net.addresses import address_of
from backends.net.serving import serving
from backends.net.tls import Tls
from backends.units import human_bytes
from protocol.worker import WorkerConfig
from scenarios.cli import add_kernel_option, clean_exit, positive, use_kernel


class ListenError(UserError):
    """The worker cannot listen where it was told to."""


def cipher_of(backend: str, parameters: Parameters) -> WorkerCipher:
    """What multiplies. Raises GpuError for `cuda` without a usable GPU."""
    if backend == "cpu":
        return MlweWorker(parameters)
    # Only here: they need Triton and CuPy, which only a GPU needs.
    from backends.he.cuda.device import find_gpu
    from backends.he.cuda.worker import CudaWorker

    return CudaWorker(parameters, find_gpu())


def run(args: argparse.Namespace) -> None:
    """Serve until told to stop."""
    host, port = address_of(args.listen)
    tls = None if args.tls is None else Tls(args.tls)
    part = WorkerPart.open(args.model)
    if part.parameters is None:
        raise PreparationError(f"{args.model} was prepared for the clear backend; prepare it anew")
    size = human_bytes(sum(weight.nbytes for weight in part.weights))
    print(f"{len(part.groups)} groups of linears, {size} of weights, from {args.model}")
    cipher = cipher_of(args.backend, part.parameters)
    config = WorkerConfig(max_tokens=args.max_tokens)
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    try:
        with serving(part, cipher, host, port, tls, config) as service:
            how = "TLS" if tls else "plain text, this machine only"
            print(f"serving on {host}:{service.port} ({how}); Ctrl-C ends it", flush=True)
            stop.wait()
    except OSError as error:
        raise ListenError(
            f"cannot listen on {args.listen} ({error.strerror}); choose another --listen"
        ) from error
    print("stopped")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scenarios.worker", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a prepared model")
    add("--listen", default="localhost:7443", metavar="HOST:PORT", help="where (localhost:7443)")
    add("--tls", type=Path, metavar="DIR", help="this side's ca.pem, cert.pem and key.pem")
    add("--backend", choices=("cpu", "cuda"), default="cpu",
        help="what multiplies (cpu); cuda has not been measured yet")  # fmt: skip
    add("--max-tokens", type=positive, default=4096, help="of one request (4096)")
    add("--verbose", action="store_true", help="say who comes and goes")
    add_kernel_option(parser)
    args = parser.parse_args()
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    with clean_exit():
        if args.backend == "cpu":
            use_kernel(args.kernel)
        run(args)


if __name__ == "__main__":
    main()
