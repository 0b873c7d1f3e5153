"""The owner's ring work on a GPU, per token of a training step, and the making of hints."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.hints import CudaHintBuilder
from backends.he.cuda.owner import CudaOwner
from backends.he.cuda.worker import CudaWorker
from backends.he.interface import OwnerMatrix
from backends.he.params import Parameters
from backends.he.plan import plan_directions
from backends.he.public import PublicMatrix, public_seed
from benchmarks.gpu.scale import Matrix, Scale
from benchmarks.gpu.task import Figures, Task
from benchmarks.gpu.timing import device_ms


def made(
    matrix: Matrix, parameters: Parameters, hints: CudaHintBuilder, gpu: Gpu
) -> tuple[OwnerMatrix, NDArray[np.int8]]:
    """A matrix of random weights, and int8[N, K], the weights."""
    limit, shape = parameters.weight_limit, (matrix.outputs, matrix.inputs)
    weight = np.random.default_rng(0).integers(-limit, limit + 1, shape, np.int8)
    ones = np.ones(matrix.inputs, np.float32)
    scale = np.full(matrix.outputs, 0.01, np.float32)
    plan, _ = plan_directions(weight, scale, parameters, device=gpu.device)
    return OwnerMatrix(matrix.name, ones, scale, plan, hints.build(weight, True)), weight


def owner(task: Task) -> list[Figures]:
    """The owner's work at several token counts; the last one is the one that is judged."""
    works: list[Figures] = []
    for tokens in task.scale.owner_tokens:
        works.append(ring_work(task.gpu, task.parameters, task.scale, tokens))
        task.keep(works)
    return works


def ring_work(gpu: Gpu, parameters: Parameters, scale: Scale, tokens: int) -> Figures:
    """Encrypting and decrypting every linear of a step once, in time per token.

    Requests hold `tokens` tokens. `ring` is encrypting and decrypting; `checked` is with the
    check of answers, which every real session makes. Both include what the host does between
    launches, where the device waits for it. Under `thin` parameters the scale is learnt in the
    first round, and what then wraps is repaired in the time of `checked`.
    """
    public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
    totals = {"encrypt": 0.0, "decrypt": 0.0, "decrypt_checked": 0.0}
    rows = []
    owner = CudaOwner(parameters, public, gpu, local=True, unverified=True)
    worker = CudaWorker(gpu)
    hints = CudaHintBuilder(public, gpu)
    for matrix in scale.matrices:
        public_matrix, weight = made(matrix, parameters, hints, gpu)
        loaded = worker.load(weight, True, public_matrix.plan.format)
        x = torch.randn(tokens, matrix.inputs, device=gpu.device)
        row: dict[str, Any] = {"matrix": matrix.name, "count": matrix.count}
        for guarded in (False, True):
            if guarded:
                owner.guard(public_matrix, weight, True)
            spent = _opened_and_closed(gpu, owner, worker, loaded, x, public_matrix, scale)
            if not guarded:
                row["encrypt_ms"], row["decrypt_ms"] = spent
            else:
                row["decrypt_checked_ms"] = spent[1]
        for name in totals:
            totals[name] += matrix.count * row[f"{name}_ms"]
        rows.append(row)
    per_token = {f"{name}_us_per_token": 1e3 * ms / tokens for name, ms in totals.items()}
    ring = per_token["encrypt_us_per_token"] + per_token["decrypt_us_per_token"]
    checked = per_token["encrypt_us_per_token"] + per_token["decrypt_checked_us_per_token"]
    return {
        "tokens": tokens,
        **per_token,
        "ring_us_per_token": ring,
        "checked_us_per_token": checked,
        "matrices": rows,
    }


def _opened_and_closed(
    gpu: Gpu,
    owner: CudaOwner,
    worker: CudaWorker,
    loaded: Any,
    x: torch.Tensor,
    matrix: OwnerMatrix,
    scale: Scale,
) -> tuple[float, float]:
    """(encrypt, decrypt) in milliseconds: medians over rounds."""
    encrypting, decrypting = [], []
    for turn in range(scale.rounds + 1):
        sent: list[Any] = []
        spent = device_ms(gpu, lambda s=sent: s.append(owner.encrypt(x, matrix)), scale.repeats)
        answers = [worker.multiply(e.payload, len(x), loaded) for e in sent]
        pairs = iter(list(zip(sent, answers, strict=True)))

        def open_next(pairs: Any = pairs) -> None:
            encrypted, answer = next(pairs)
            owner.decrypt(encrypted.sealed, answer, matrix)

        opened = device_ms(gpu, open_next, scale.repeats)
        if turn:  # the first round compiles and uploads
            encrypting.append(spent)
            decrypting.append(opened)
    return median(encrypting), median(decrypting)
