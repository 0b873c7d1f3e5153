"""What reaches the CUDA driver by the short way is what would have by the long one.

A program of its own, without TRITON_INTERPRET, on the driver that does nothing:
python -m tests.cuda.launch_path
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch

from backends.he.cuda import gemm
from backends.he.cuda.gemm import Product
from backends.he.cuda.launch import Kernels, signatures, source
from backends.he.cuda.tiling import AMPERE_SMALL, HOPPER_LARGE, HOPPER_SMALL, Kernel, Tiling
from benchmarks.gpu_host import null_kernels
from benchmarks.null_cuda import Launched, keep_arguments, last_launch, null_gpu

MAP, SCRATCH = 128, [8, 8]
# Bytes of arguments: descriptors bring shapes and strides along; then out, tokens, outputs, inputs.
SIZES = {
    Kernel.POINTERS: [8, 8, 8, 4, 4, 4, *SCRATCH],
    Kernel.BULK: [MAP, 4, 4, 4, 8, 8, 8, MAP, 4, 4, 8, 8, 8, 4, 4, 4, *SCRATCH],
    Kernel.ASYNC: [MAP, 4, 4, 8, 8, MAP, 4, 4, 8, 8, 8, 4, 4, 4, *SCRATCH],
}
INPUTS, OUTPUTS = 128, 80


def launched(product: Product, planes: torch.Tensor) -> Launched:
    """One launch, its result's address replaced by zero."""
    before = last_launch().count
    out = product(planes, planes.shape[1])
    found = last_launch()
    assert found.count == before + 1
    address = struct.pack("<Q", out.data_ptr())
    assert found.arguments.count(address) == 1
    return replace(found, count=0, arguments=found.arguments.replace(address, bytes(8)))


def products(tiling: Tiling) -> None:
    """Requests of several sizes and places by one kept product, each as by a new one."""
    keep_arguments(SIZES[tiling.kernel])
    weight = torch.zeros((OUTPUTS, INPUTS), dtype=torch.int8)
    kept = Product(weight, 3, 8, tiling)
    seen = set()
    requests = [torch.zeros((3, n, INPUTS), dtype=torch.int8) for n in (64, 1, 4096, 64, 33)]
    for planes in requests:
        found = launched(kept, planes)
        assert found == launched(Product(weight, 3, 8, tiling), planes)
        assert found.block == (32 * tiling.warps, 1, 1)
        assert struct.pack("<Q", planes.data_ptr()) in found.arguments
        seen.add(found)
    assert len(seen) == len(requests)
    if kept._descriptors is not None:
        assert kept._descriptors[0].base is weight  # no request's memory is held


def owner_kernels() -> None:
    """A key and a tensor arrive as they are, and the key does not stay behind."""
    with null_kernels():
        compiled = Kernels(null_gpu(), 5, 3)
    words, key = torch.zeros((2, 5, 256), dtype=torch.int32), (1, 1 << 63, 3, (1 << 64) - 1)
    keep_arguments([8] * 5)
    compiled.launch("draw_secrets", (2, 5), words, *key)
    found = last_launch()
    assert found.grid == (2, 5, 1)
    assert found.block == (signatures(source())["draw_secrets"].threads, 1, 1)
    assert found.arguments == struct.pack("<5Q", words.data_ptr(), *key)
    (slots,) = compiled._launchers["draw_secrets"]._free
    assert not any(slots.bytes)


def main() -> None:
    null_gpu()
    gemm._multiprocessors = lambda device: 132  # type: ignore[assignment]
    for tiling in (HOPPER_SMALL[0], HOPPER_LARGE[-1], AMPERE_SMALL[0]):
        products(tiling)
    owner_kernels()


if __name__ == "__main__":
    main()
