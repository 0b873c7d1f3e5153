"""Compiles tilings of the worker's kernel for GPUs that need not be here.

Run as a program of its own, without TRITON_INTERPRET, where kernels are compiled and not
interpreted: python -m tests.cuda.compile_tilings FOLDER < cases.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from backends.he.cuda.gemm import fused_kernel
from backends.he.cuda.hopper import async_kernel, operand_layout
from backends.he.cuda.tiling import Kernel, Tiling


def compiled(target: int, tiling: Tiling, limbs: int) -> Any:
    """The kernel as the launcher would compile it for an sm_`target`."""
    t = tiling
    constants = {"LIMBS": limbs, "SHIFT": 8, "GROUP": t.group}
    constants |= {"BM": t.tokens, "BN": t.outputs, "BK": t.inputs}
    types = {"planes": "*i8", "weight": "*i8", "out": "*i16"}
    kernel, source, options = fused_kernel, ASTSource, {"num_warps": t.warps}
    if t.kernel is Kernel.ASYNC:
        kernel, source = async_kernel, GluonASTSource
        constants |= {"STAGES": t.stages, "num_warps": t.warps}
        layout = repr(operand_layout(t))
        types["planes"] = f"tensordesc<i8[{t.tokens},{t.inputs}],{layout}>"
        types["weight"] = f"tensordesc<i8[{t.outputs},{t.inputs}],{layout}>"
    else:
        constants["BULK"] = t.kernel is Kernel.BULK
        options["num_stages"] = t.stages
    if t.kernel is Kernel.BULK:
        types["planes"] = f"tensordesc<i8[1,{t.tokens},{t.inputs}]>"
        types["weight"] = f"tensordesc<i8[{t.outputs},{t.inputs}]>"
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # Addresses and row lengths are multiples of 16, and Triton is told; of tokens it is not.
    aligned = [n for n in names if n in ("outputs", "inputs") or types.get(n, "").startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        source(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", target, 32),
        options=options,
    )


def main(folder: Path) -> None:
    """Write N.cubin, N.ptx and N.json for each of the cases on standard input."""
    for index, (target, fields, limbs) in enumerate(json.load(sys.stdin)):
        fields["kernel"] = Kernel(fields["kernel"])
        kernel = compiled(target, Tiling(**fields), limbs)
        (folder / f"{index}.cubin").write_bytes(kernel.asm["cubin"])
        (folder / f"{index}.ptx").write_text(kernel.asm["ptx"])
        facts = {"shared": kernel.metadata.shared, "triton": triton.__version__}
        (folder / f"{index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
