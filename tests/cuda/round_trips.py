"""Requests of ragged sizes through kernels built with AddressSanitizer: no stray read or write.

A program of its own, with libasan preloaded, so that torch's memory is watched as well:
LD_PRELOAD=$(g++ -print-file-name=libasan.so) python -m tests.cuda.round_trips
"""

from __future__ import annotations

import sys

import numpy as np

from backends.he.cuda import launch
from backends.he.cuda.device import emulated
from backends.he.cuda.owner import CudaOwner
from backends.he.params import preset
from backends.he.reference import ReferenceWorker
from tests.he.conftest import make_case

# (inputs, outputs, tokens): tiles odd and even in number, full and not; blocks full and not.
SIZES = ((5, 7, 3), (16, 33, 256), (48, 16, 257), (100, 130, 40))


CLAMPED = "min(BLOCK_Y * (ROWS / LANES) + row / LANES, tiles - 1)"


def main(planted: bool) -> None:
    """Encrypt, multiply, check and decrypt once for each size and preset.

    planted  with a defect: a last odd tile is read past the end of its matrix
    """
    launch.HOST_FLAGS = (*launch.HOST_FLAGS, "-g", "-fsanitize=address")
    text = launch.source()
    assert CLAMPED in text
    if planted:
        text = text.replace(CLAMPED, "BLOCK_Y * (ROWS / LANES) + row / LANES")
        launch.source = lambda probes="": text
    for name in ("exact", "paranoid"):
        for inputs, outputs, tokens in SIZES:
            case = make_case(inputs, outputs, parameters=preset(name))
            # Two tiles at a time when streamed: every slab's end is an end of memory.
            for hint_bytes in (1 << 30, 0):
                owner = CudaOwner(case.parameters, case.public, emulated(), hint_bytes=hint_bytes)
                owner.guard(case.matrix, case.weight, True)
                x = np.random.default_rng(0).standard_normal((tokens, inputs)).astype(np.float32)
                sent = owner.encrypt(x, case.matrix)
                worker = ReferenceWorker()
                answer = worker.multiply(sent.payload, tokens, case.load(worker))
                y = owner.decrypt(sent.sealed, answer, case.matrix)
                assert np.isfinite(y).all()
                print(name, inputs, outputs, tokens, hint_bytes, flush=True)


if __name__ == "__main__":
    main("--planted" in sys.argv)
