"""What a launch costs the host: Python and the launchers, on a driver that launches nothing.

    python -m benchmarks.gpu_host --json gpu_host.json

Runs without a GPU, on `null_cuda.py`. A worker's launch is one request on the device, answered
there; an owner's encrypt and decrypt are of one request that stays on the device, checked. Values
are few, so that what torch does to them on the CPU costs no more than a launch would. What a real
driver adds is not in it: to queue a kernel, a copy, an event.

Figures are medians over rounds, in microseconds of processor time; nothing here waits. The
quickest round is beside them, because other programs on the machine only ever add.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda import gemm, launch, tuner
from backends.he.cuda.device import Gpu
from backends.he.cuda.driver import Driver, Launch
from backends.he.cuda.launch import kernels
from backends.he.cuda.owner import CudaOwner
from backends.he.cuda.tiling import AMPERE_SMALL, HOPPER_LARGE, HOPPER_SMALL, Tiling
from backends.he.cuda.worker import CudaWorker
from backends.he.interface import OwnerMatrix
from backends.he.params import RING_DEGREE, preset
from backends.he.plan import plan_matrix
from backends.he.public import PublicMatrix, public_seed
from backends.he.ring import tiles_of
from backends.he.vector import LANES
from backends.he.wire import EXACT
from backends.options import TIMES, Parser
from benchmarks.null_cuda import null_gpu
from protocol.errors import WrongAnswerError
from scenarios import record

PARAMETERS = preset("exact")
TOKENS, INPUTS, OUTPUTS = 64, 128, 128
TILINGS = (HOPPER_SMALL[0], HOPPER_LARGE[-1], AMPERE_SMALL[0])


class NullModule:
    """In the place of compiled kernels: handles that the null driver never looks at."""

    def __init__(self, text: str, options: tuple[str, ...]) -> None:
        self._driver = Driver(torch.device("cpu"), stream=lambda index: 0)

    def launcher(self, name: str, threads: int) -> Launch:
        return self._driver.launcher(1, threads)


@contextmanager
def null_kernels() -> Iterator[None]:
    """Inside, an owner's kernels are launched on the null driver."""
    with patch.object(launch, "_HostModule", NullModule):
        kernels.cache_clear()
        yield
    kernels.cache_clear()


def microseconds(actions: Callable[[], Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of one action, from rounds of `calls`; `actions` makes ready a round of them."""
    calls, times = 200, []
    for _ in range(rounds + 1):  # the first compiles, and fills caches
        action = actions()
        start_s = time.thread_time()
        for _ in range(calls):
            action()
        times.append(1e6 * (time.thread_time() - start_s) / calls)
    return {"us": median(times[1:]), "us_quickest": min(times[1:])}


def worker_launch(gpu: Gpu, tiling: Tiling, rounds: int) -> dict[str, float]:
    """A request through CudaWorker, by one tiling."""
    worker = CudaWorker(gpu)
    matrix = worker.load(_weight(), True, EXACT)
    request = torch.zeros(TOKENS * EXACT.up_bytes(INPUTS), dtype=torch.uint8)

    def ready() -> Callable[[], object]:
        return lambda: worker.multiply(request, TOKENS, matrix)

    with (
        patch.object(tuner, "candidates", lambda *_: (tiling,)),
        patch.object(gemm, "_multiprocessors", lambda device: gpu.multiprocessors),
    ):
        return microseconds(ready, rounds)


def owner_calls(gpu: Gpu, rounds: int) -> dict[str, dict[str, float]]:
    """A request's encrypt and decrypt through CudaOwner."""
    public = PublicMatrix(public_seed(bytes(32), PARAMETERS), PARAMETERS.rank)
    matrix = _matrix()
    x = torch.zeros((TOKENS, INPUTS))
    answer = torch.zeros(TOKENS * EXACT.down_bytes(OUTPUTS), dtype=torch.uint8)
    with null_kernels():
        owner = CudaOwner(PARAMETERS, public, gpu, local=True)
        owner.guard(matrix, _weight(), True)

        def encrypt() -> Callable[[], object]:
            return lambda: owner.encrypt(x, matrix)

        def decrypt() -> Callable[[], object]:
            sent = iter([owner.encrypt(x, matrix).sealed for _ in range(200)])

            def refused() -> None:
                # Nothing is launched, so no answer fits: the verdict is the last thing there is.
                with suppress(WrongAnswerError):
                    owner.decrypt(next(sent), answer, matrix)

            return refused

        return {
            "encrypt": microseconds(encrypt, rounds),
            "decrypt": microseconds(decrypt, rounds),
        }


def _weight() -> NDArray[np.int8]:
    return np.ones((OUTPUTS, INPUTS), np.int8)


def _matrix() -> OwnerMatrix:
    """A matrix with a hint of zeros: nothing is computed with it."""
    hint = np.zeros((tiles_of(OUTPUTS), PARAMETERS.rank, RING_DEGREE, LANES), np.int32)
    in_scale, out_scale = np.ones(INPUTS, np.float32), np.ones(OUTPUTS, np.float32)
    return OwnerMatrix("m", in_scale, out_scale, plan_matrix(_weight(), out_scale), hint)


def measure(rounds: int) -> dict[str, Any]:
    """The figures of the report."""
    gpu = null_gpu()
    worker = {t.kernel.value: worker_launch(gpu, t, rounds) for t in TILINGS}
    return {"worker": worker, "owner": owner_calls(gpu, rounds), "rounds": rounds}


def main() -> None:
    parser = Parser(__doc__, "benchmarks.gpu_host")
    parser.add_argument("--rounds", type=TIMES, default=21, help="of 200 calls each (21)")
    record.add_json_option(parser)
    args = parser.parse()
    figures = measure(args.rounds)
    for part in ("worker", "owner"):
        for name, row in figures[part].items():
            print(f"{part} {name:9s} {row['us']:6.1f} us (quickest {row['us_quickest']:.1f})")
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
