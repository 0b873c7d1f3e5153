"""Compiles the probe of the tensor cores for GPUs that need not be here.

Run as a program of its own, as `compile_tilings` is: python -m tests.cuda.compile_ceiling FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.gpu import ceiling

PROBES = {80: (ceiling.mma_kernel, ceiling.MMA), 90: (ceiling.wgmma_kernel, ceiling.WGMMA)}
POINTERS = {"a": "*i8", "b": "*i8", "out": "*i32"}


def compiled(target: int) -> Any:
    """The kernel as the launcher would compile it for an sm_`target`."""
    kernel, probe = PROBES[target]
    constants = probe.constants | {"num_warps": probe.warps}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS}
    return triton.compile(
        GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": probe.warps},
    )


def main(folder: Path) -> None:
    """Write TARGET.cubin and TARGET.ptx for each of PROBES."""
    for target in PROBES:
        kernel = compiled(target)
        (folder / f"{target}.cubin").write_bytes(kernel.asm["cubin"])
        (folder / f"{target}.ptx").write_text(kernel.asm["ptx"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
