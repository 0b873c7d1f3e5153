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
from backends.he.plan import nominal_plan
from backends.he.wire import EXACT, Format
from benchmarks.gpu.scale import Matrix
from benchmarks.gpu.task import Figures, Task
from benchmarks.gpu.timing import device_ms, in_turns

_FORMATS = (EXACT, Format(16, 8), Format(18, 10), Format(20, 12))  # each width, up and down


def random_weight(inputs: int, outputs: int, seed: int = 0) -> NDArray[np.int8]:
    """int8[N, K], as a quantised weight may be."""
    return np.random.default_rng(seed).integers(-127, 128, (outputs, inputs), np.int8)


def format_of(inputs: int, outputs: int, parameters: Parameters) -> Format:
    """The planner's, for a weight of which only the shape is known."""
    return nominal_plan(inputs, outputs, parameters).format


def random_request(gpu: Gpu, tokens: int, inputs: int, format: Format) -> torch.Tensor:
    """uint8[T * up_bytes(K)] on the device: a ciphertext looks like random bytes."""
    size = tokens * format.up_bytes(inputs)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=gpu.device)


def identical(task: Task) -> Figures:
    """GPU against CPU, same bytes in, for every shape of the model and ragged token counts.

    Both ways of the GPU, requests on the device and on the host, and several joined in one. The
    matrices take turns at the formats, whatever the preset.
    """
    gpu, scale = task.gpu, task.scale
    on_cpu = MlweWorker()
    ways = {"fused": CudaWorker(gpu), "library": CudaWorker(gpu, False)}
    compared = 0
    different: list[str] = []
    for index, matrix in enumerate(scale.matrices):
        format = _FORMATS[index % len(_FORMATS)]
        weight = random_weight(matrix.inputs, matrix.outputs, compared)
        expected_of = on_cpu.load(weight, True, format)
        loaded = {name: worker.load(weight, True, format) for name, worker in ways.items()}
        for tokens in scale.ragged:
            request = random_request(gpu, tokens, matrix.inputs, format)
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
        task.keep({"compared": compared, "different": sorted(set(different))})
    return {"compared": compared, "different": sorted(set(different))}


def library(task: Task) -> Figures:
    """What the libraries' products, our own of the same size, and copies reach, on random data.

    torch gives its int8 product no workspace, which may cost it its best algorithms.
    """
    gpu, scale, device = task.gpu, task.scale, task.gpu.device
    side = scale.square
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
    rates = {
        f"{name}_ops_per_s": operations / median(times[name]) * 1e3
        for name in ("int8", "fused", "bf16")
    }
    bytes_per_s = 2 * source.numel() / median(times["copy"]) * 1e3
    return {"square": side, **rates, "bytes_per_s": bytes_per_s}


def layers(task: Task) -> list[Figures]:
    """Single layers under encryption against clear bf16, device-resident, in one run."""
    gpu, parameters, scale = task.gpu, task.parameters, task.scale
    fused, library = CudaWorker(gpu), CudaWorker(gpu, False)
    tokens = scale.layer_tokens
    rows: list[Figures] = []
    for inputs, outputs in scale.layers:
        weight, format = random_weight(inputs, outputs), format_of(inputs, outputs, parameters)
        request = random_request(gpu, tokens, inputs, format)
        by_fused, by_library = (worker.load(weight, True, format) for worker in (fused, library))
        x = torch.randn(tokens, inputs, device=gpu.device, dtype=torch.bfloat16)
        clear = torch.randn(outputs, inputs, device=gpu.device, dtype=torch.bfloat16)
        times = in_turns(
            gpu,
            {
                "fused": lambda r=request, w=by_fused: fused.multiply(r, tokens, w),
                "library": lambda r=request, w=by_library: library.multiply(r, tokens, w),
                "bf16": lambda a=x, b=clear: a @ b.t(),
            },
            scale.rounds,
            scale.repeats,
        )
        row: Figures = {"in": inputs, "out": outputs, "tokens": tokens}
        row |= {f"{name}_ms": median(values) for name, values in times.items()}
        row["he_over_bf16"] = _median_ratio(times, "fused", "bf16")
        row["library_over_bf16"] = _median_ratio(times, "library", "bf16")
        row |= {
            "format": asdict(format),
            "operations": 2 * format.limbs * tokens * inputs * outputs,
        }
        travelled = format.up_bytes(inputs) + format.down_bytes(outputs)
        row["bytes"] = tokens * travelled + inputs * outputs
        if "ceiling" in task.known:
            floor_ms = row["operations"] / task.known["ceiling"]["int8_ops_per_s"] * 1e3
            row |= {"floor_ms": floor_ms, "of_int8_ceiling": floor_ms / row["fused_ms"]}
        rows.append(row)
        task.keep(rows)
    return rows


def _median_ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


def throughput(task: Task) -> Figures:
    """All products of a training step's tokens, one after the other, weights resident."""
    gpu, parameters, scale = task.gpu, task.parameters, task.scale
    worker = CudaWorker(gpu)
    work: list[tuple[Matrix, torch.Tensor, list[Any]]] = []
    for matrix in scale.matrices:
        weight, format = (
            random_weight(matrix.inputs, matrix.outputs),
            format_of(matrix.inputs, matrix.outputs, parameters),
        )
        # Every layer has a weight of its own, as in a real step: no cache holds them all.
        copies = [worker.load(weight, True, format) for _ in range(matrix.count)]
        work.append((matrix, random_request(gpu, scale.tokens, matrix.inputs, format), copies))

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


def launch(task: Task) -> Figures:
    """Seconds of the smallest things: one torch kernel, and a product of one token."""
    gpu, parameters = task.gpu, task.parameters
    small = torch.zeros(32, device=gpu.device)
    matrix = task.scale.matrices[0]
    worker = CudaWorker(gpu)
    weight, format = (
        random_weight(matrix.inputs, matrix.outputs),
        format_of(matrix.inputs, matrix.outputs, parameters),
    )
    loaded = worker.load(weight, True, format)
    request = random_request(gpu, 1, matrix.inputs, format)
    worker.multiply(request, 1, loaded)
    small.add_(1)  # the first launch of a kernel loads it
    return {
        "local_s": device_ms(gpu, lambda: small.add_(1), 100) / 1e3,
        "multiply_s": device_ms(gpu, lambda: worker.multiply(request, 1, loaded), 100) / 1e3,
    }
