"""TenSEAL: tokens packed into slots (BFV, CKKS), and one token as a vector (CKKS)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import tenseal

from benchmarks.peers.problem import (
    SIDE,
    Row,
    cores,
    inputs,
    on_every_core,
    relative_error,
    rounded,
    seconds,
    weights,
)

OUTPUTS = 2
"""Rows of the weights that are computed on each core."""


def rows() -> Iterator[Row]:
    """Each way of it."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.BFV, poly_modulus_degree=4096, plain_modulus=132_120_577, n_threads=1
    )
    yield _packed(context, "BFV, packed", 4096)
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[50, 30, 50],
        n_threads=1,
    )  # fmt: skip
    context.global_scale = 2.0**30
    yield _packed(context, "CKKS, packed", 4096)
    yield _vector()


def _public_bytes(context: Any, rotations: bool = False) -> int:
    return len(
        context.serialize(
            save_public_key=True, save_secret_key=False, save_galois_keys=rotations,
            save_relin_keys=False,
        )
    )  # fmt: skip


def _packed(context: Any, scheme: str, tokens: int) -> Row:
    x, table = inputs(tokens), weights()
    exact = scheme.startswith("BFV")
    codes, scale = rounded(x) if exact else (x.astype(np.float64), np.ones((tokens, 1)))
    make: Any = tenseal.bfv_vector if exact else tenseal.ckks_vector
    encrypt_s, sent = seconds(lambda: [make(context, column.tolist()) for column in codes.T])

    def output(row: Any) -> Any:
        total: Any = None
        for value, ciphertext in zip(row.tolist(), sent, strict=True):
            if value:  # a product with zero is refused: its result would be in clear
                product = ciphertext * (value if exact else float(value))
                total = product if total is None else total.add_(product)
        return total

    multiply_s = on_every_core(
        lambda core: [output(table[core * OUTPUTS + n]) for n in range(OUTPUTS)]
    )
    answer = output(table[0])
    decrypt_s, found = seconds(lambda: np.array(answer.decrypt(), np.float64)[:, None] * scale)
    return Row(
        "TenSEAL", version("tenseal"), scheme, tokens,
        multiply_s * SIDE / (OUTPUTS * cores()) / tokens, (encrypt_s + decrypt_s * SIDE) / tokens,
        len(sent[0].serialize()) * SIDE / tokens, len(answer.serialize()) * SIDE / tokens,
        _public_bytes(context), relative_error(found, x, table[:1]), True,
        f"{tokens} slots, a process for each core, {OUTPUTS * cores()} of {SIDE} outputs",
    )  # fmt: skip


def _vector() -> Row:
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[50, 30, 50],
        n_threads=cores(),
    )  # fmt: skip
    context.global_scale = 2.0**30
    context.generate_galois_keys()
    x, table = inputs(1), weights()
    matrix = table.T.astype(np.float64).tolist()
    encrypt_s, sent = seconds(lambda: tenseal.ckks_vector(context, x[0].astype(float).tolist()))
    multiply_s, answer = seconds(lambda: sent.matmul(matrix))
    decrypt_s, found = seconds(lambda: np.array(answer.decrypt())[None])
    return Row(
        "TenSEAL", version("tenseal"), "CKKS, ckks_vector.matmul", 1, multiply_s,
        encrypt_s + decrypt_s, len(sent.serialize()), len(answer.serialize()),
        _public_bytes(context, rotations=True), relative_error(found, x, table), False,
        f"one token, {cores()} threads",
    )  # fmt: skip
