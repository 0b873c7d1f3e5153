"""Serve owners from this process: the library behind `python -m scenarios.worker`.

Imports nothing that could hold a secret.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from backends.he.interface import WorkerCipher
from backends.he.manifest import PreparationError
from backends.he.matmul.choice import chosen_kernel
from backends.he.matmul.interface import Kernel
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from backends.he.store import WorkerPart
from backends.net.addresses import address_of
from backends.net.devices import OneDevice
from backends.net.serving import Service, serving
from backends.net.tls import Tls, require_loopback

DRAIN_S = 20.0

_LOOK_S = 0.5


def worker_cipher(
    parameters: Parameters, backend: str = "cpu", kernel: Kernel | None = None
) -> tuple[WorkerCipher, str]:
    """What multiplies, "cpu" or "cuda", and its name.

    kernel  of a CPU; None is the fastest here

    Raises GpuError for `cuda` without a usable GPU, KernelError for one that cannot run here.
    """
    if backend == "cpu":
        kernel = kernel or chosen_kernel()
        return MlweWorker(kernel), kernel.name
    # Only here: they need torch, Triton and CuPy, which only a GPU needs.
    from backends.he.cuda.device import find_gpu
    from backends.he.cuda.worker import CudaWorker

    gpu = find_gpu()
    return CudaWorker(gpu), gpu.name


def require_parameters(part: WorkerPart) -> Parameters:
    """The cipher's. Raises PreparationError for a model that was prepared without one."""
    if part.parameters is None:
        raise PreparationError("the model was prepared for the clear backend, which serves nobody")
    return part.parameters


def serve(
    model: WorkerPart | str | Path,
    listen: str = "localhost:7443",
    tls: str | Path | None = None,
    backend: str = "cpu",
    on_ready: Callable[[Service], None] = lambda service: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve owners until `stop` is set or Ctrl-C, then answer what is in hand, and return.

    model     a worker's part of a prepared model, or where it is
    listen    HOST:PORT; port 0 is chosen by the system
    tls       directory of this side's ca.pem, cert.pem and key.pem; without, this machine only
    on_ready  is told when it listens; `service.port` is where

    Raises PreparationError, AddressError, CertificateError, GpuError, KernelError, or OSError when
    the address cannot be had.
    """
    host, port = address_of(listen, least_port=0)
    if tls is None:
        require_loopback(host)
        certificates = None
    else:
        certificates = Tls(Path(tls))
        certificates.require_current()
    part = model if isinstance(model, WorkerPart) else WorkerPart.open(Path(model))
    cipher, _ = worker_cipher(require_parameters(part), backend)
    stop = stop or threading.Event()
    with serving(
        OneDevice.holding(part, cipher),
        host,
        port,
        certificates,
        on_crash=stop.set,
    ) as service:
        on_ready(service)
        with suppress(KeyboardInterrupt):
            while not stop.wait(_LOOK_S):
                pass  # a signal that another thread has received wakes nobody up
        if service.server.failure:
            raise RuntimeError(f"the worker cannot go on: {service.server.failure}")
        service.drain(DRAIN_S)
