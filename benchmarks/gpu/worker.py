"""The worker on a GPU: the same bits as the CPU, and how far from what the device can do."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.gemm import fused_product
from backends.he.cuda.tuner import Tuner
from backends.he.cuda.worker import CudaWorker
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from benchmarks.gpu.timing import Matrix, Scale, device_ms, in_turns


def random_weight(inputs: int, outputs: int, seed: int = 0) -> NDArray[np.int8]:
    """int8[N, K], as a quantised weight may be."""
    return np.random.default_rng(seed).integers(-127, 128, (outputs, inputs), np.int8)


def random_request(gpu: Gpu, tokens: int, inputs: int, parameters: Parameters) -> torch.Tensor:
    """uint8[limbs*T*K] on the device: a ciphertext looks like random bytes."""
    size = parameters.limbs * tokens * inputs
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=gpu.device)


def identical(gpu: Gpu, parameters: Parameters, scale: Scale) -> dict[str, Any]:
    """GPU against CPU, same bytes in, for every shape of the model and ragged token counts.

    Both ways of the GPU, requests on the device and on the host, and several joined in one.
    """
    on_cpu = MlweWorker(parameters)
    ways = {"fused": CudaWorker(parameters, gpu), "library": CudaWorker(parameters, gpu, False)}
    compared, different = 0, []
    for matrix in scale.matrices:
        weight = random_weight(matrix.inputs, matrix.outputs, compared)
        expected_of = on_cpu.load(weight, True)
        loaded = {name: worker.load(weight, True) for name, worker in ways.items()}
        for tokens in scale.ragged:
            request = random_request(gpu, tokens, matrix.inputs, parameters)
            frame = request.cpu().numpy()
            expected = on_cpu.multiply(frame, tokens, expected_of)
            for name, worker in ways.items():
                near = worker.multiply(request, tokens, loaded[name]).cpu().numpy()
                far = worker.multiply(frame, tokens, loaded[name])
                twice = worker.multiply_many([(frame, tokens)] * 2, loaded[name])[1]
                for answer in (near, far, twice):
                    compared += 1
                    if not np.array_equal(answer, expected):
                        different.append(f"{name}: {matrix.name}, {tokens} tokens")
    return {"compared": compared, "different": sorted(set(different))}


def ceilings(gpu: Gpu, scale: Scale) -> dict[str, Any]:
    """What products and copies reach on this device, on random data.

    The int8 ceiling is the faster of the library's product and our own of the same size: torch
    gives the library no workspace, which may cost it its best algorithms.
    """
    side, device = scale.square, gpu.device
    a8, b8 = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in "ab")
    planes = a8.view(2, side // 2, side)
    tiling = Tuner(gpu).tiling(2, side // 2, b8, 8)
    a16, b16 = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    source = torch.empty(scale.copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns(
        gpu,
        {
            # The second operand transposed is the layout that int8 tensor cores take.
            "int8": lambda: torch._int_mm(a8, b8.t()),
            "fused": lambda: fused_product(planes, b8, 8, tiling),
            "bf16": lambda: a16 @ b16.t(),
            "copy": lambda: target.copy_(source),
        },
        scale.rounds,
        scale.repeats,
    )
    operations = 2 * side**3
    return {
        "square": side,
        "int8_ops_per_s": operations / min(median(times["int8"]), median(times["fused"])) * 1e3,
        "library_int8_ops_per_s": operations / median(times["int8"]) * 1e3,
        "bf16_ops_per_s": operations / median(times["bf16"]) * 1e3,
        "bytes_per_s": 2 * source.numel() / median(times["copy"]) * 1e3,
    }


def layers(
    gpu: Gpu, parameters: Parameters, scale: Scale, int8_ops_per_s: float
) -> list[dict[str, Any]]:
    """Single layers under encryption against clear bf16, device-resident, in one run."""
    fused, library = CudaWorker(parameters, gpu), CudaWorker(parameters, gpu, False)
    rows = []
    for inputs, outputs in scale.layers:
        tokens = scale.layer_tokens
        weight = random_weight(inputs, outputs)
        request = random_request(gpu, tokens, inputs, parameters)
        by_fused, by_library = fused.load(weight, True), library.load(weight, True)
        x = torch.randn(tokens, inputs, device=gpu.device, dtype=torch.bfloat16)
        clear = torch.randn(outputs, inputs, device=gpu.device, dtype=torch.bfloat16)
        times = in_turns(
            gpu,
            {
                "fused": lambda r=request, w=by_fused: fused.multiply(r, scale.layer_tokens, w),
                "library": lambda r=request, w=by_library: library.multiply(
                    r, scale.layer_tokens, w
                ),
                "bf16": lambda a=x, b=clear: a @ b.t(),
            },
            scale.rounds,
            scale.repeats,
        )
        operations = 2 * parameters.limbs * tokens * inputs * outputs
        fused_ms = median(times["fused"])
        rows.append(
            {
                "in": inputs,
                "out": outputs,
                "tokens": tokens,
                **{f"{name}_ms": median(values) for name, values in times.items()},
                "he_over_bf16": _median_ratio(times, "fused", "bf16"),
                "library_over_bf16": _median_ratio(times, "library", "bf16"),
                "of_int8_ceiling": operations / fused_ms * 1e3 / int8_ops_per_s,
                "floor_ms": operations / int8_ops_per_s * 1e3,
                "bytes": parameters.limbs * tokens * inputs
                + inputs * outputs
                + 2 * tokens * outputs,
            }
        )
    return rows


def _median_ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


def throughput(gpu: Gpu, parameters: Parameters, scale: Scale) -> dict[str, Any]:
    """All products of a training step's tokens, one after the other, weights resident."""
    worker = CudaWorker(parameters, gpu)
    work: list[tuple[Matrix, torch.Tensor, list[Any]]] = []
    for matrix in scale.matrices:
        weight = random_weight(matrix.inputs, matrix.outputs)
        # Every layer has a weight of its own, as in a real step: no cache holds them all.
        copies = [worker.load(weight, True) for _ in range(matrix.count)]
        work.append((matrix, random_request(gpu, scale.tokens, matrix.inputs, parameters), copies))

    def step() -> None:
        for _, request, copies in work:
            for weight in copies:
                worker.multiply(request, scale.tokens, weight)

    step()
    step()
    step_ms = median(device_ms(gpu, step, 1) for _ in range(scale.rounds))
    by_matrix = {}
    for matrix, request, copies in work:
        ms = device_ms(
            gpu, lambda r=request, w=copies[0]: worker.multiply(r, scale.tokens, w), scale.repeats
        )
        by_matrix[matrix.name] = ms
    return {
        "tokens": scale.tokens,
        "step_ms": step_ms,
        "tokens_per_s": scale.tokens / step_ms * 1e3,
        "ms_by_matrix": by_matrix,
        "tilings": {
            f"{outputs} x {inputs}, to {size} tokens": asdict(tiling)
            for (_, size, outputs, inputs), tiling in worker.tuner.chosen.items()
        },
    }
