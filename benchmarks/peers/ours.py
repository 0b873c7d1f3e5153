"""This project, each preset and each kernel of this processor; and torch in clear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from statistics import median

import numpy as np
import torch

from backends.he.interface import OwnerMatrix
from backends.he.matmul.choice import VARIABLE, runnable
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import PRESETS, preset
from backends.he.plan import plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.quantise import quantise
from benchmarks.peers.problem import SIDE, Row, cores, inputs, relative_error, seconds, weights

TOKENS = 256
ROUNDS = 7
UNCOUNTED = 2


def rows() -> Iterator[Row]:
    """Clear first, then ours."""
    yield from _clear()
    for name in PRESETS:
        for kernel in runnable():
            os.environ[VARIABLE] = kernel
            yield _ours(name, kernel)


def _clear() -> Iterator[Row]:
    x, table = torch.from_numpy(inputs(TOKENS)), torch.from_numpy(weights()).float()
    for dtype in (torch.float32, torch.bfloat16):
        values, matrix = x.to(dtype), table.to(dtype)
        times = [
            seconds(lambda v=values, m=matrix: torch.nn.functional.linear(v, m))  # type: ignore[misc]
            for _ in range(ROUNDS + UNCOUNTED)
        ]
        name = str(dtype).removeprefix("torch.")
        yield Row(
            f"clear {name}", torch.__version__, "none", TOKENS,
            median(s for s, _ in times[UNCOUNTED:]) / TOKENS, 0.0,
            values.element_size() * SIDE, values.element_size() * SIDE, 0,
            relative_error(times[-1][1].float().numpy(), x.numpy(), weights()), False,
            f"torch, {cores()} threads; whoever computes sees everything",
        )  # fmt: skip


def _ours(name: str, kernel: str) -> Row:
    parameters = preset(name)
    codes, scale = quantise(torch.from_numpy(weights()).float(), limit=parameters.weight_limit)
    public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
    hint = HintBuilder(public).build(codes, True)
    plan = plan_matrix(codes, scale, parameters)
    matrix = OwnerMatrix("peers", np.ones(SIDE, np.float32), scale, plan, hint)
    owner, worker = MlweOwner(parameters, public), MlweWorker()
    owner.guard(matrix, codes, True)  # answers are checked, as they are in every real run
    loaded, x = worker.load(codes, True, plan.format), inputs(TOKENS)
    owner_s, server_s = [], []
    for _ in range(ROUNDS + UNCOUNTED):
        encrypt_s, sent = seconds(lambda: owner.encrypt(x, matrix))
        multiply_s, answer = seconds(
            lambda: worker.multiply(memoryview(sent.payload), TOKENS, loaded)  # noqa: B023
        )
        decrypt_s, found = seconds(lambda: owner.decrypt(sent.sealed, answer, matrix))  # noqa: B023
        owner_s.append(encrypt_s + decrypt_s)
        server_s.append(multiply_s)
    exact = codes.astype(np.float64) * scale[:, None].astype(np.float64)
    right = x.astype(np.float64) @ exact.T
    return Row(
        "ours", version("private-lora"), f"module-LWE, {name}", TOKENS,
        median(server_s[UNCOUNTED:]) / TOKENS, median(owner_s[UNCOUNTED:]) / TOKENS,
        len(sent.payload) / TOKENS, len(answer) / TOKENS, 0,
        float(np.linalg.norm(found - right) / np.linalg.norm(right)), False,
        f"kernel {kernel}, {plan.format.up_bits} bits up, {plan.format.down_bits} down, "
        f"{hint.nbytes / 1e6:.1f} MB of public hints at the owner, answers checked",
    )  # fmt: skip
