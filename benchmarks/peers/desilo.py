"""desilofhe: CKKS, tokens packed into slots, its weighted sums of ciphertexts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import desilofhe
import numpy as np

from benchmarks.peers.problem import SIDE, Row, cores, inputs, relative_error, seconds, weights

OUTPUTS = 8


def rows() -> Iterator[Row]:
    """With the smallest ring that it offers."""
    engine = desilofhe.Engine(max_level=1, mode="parallel", thread_count=cores())
    key = engine.create_secret_key()
    tokens = engine.slot_count
    x, table = inputs(tokens), weights()
    encrypt_s, sent = seconds(
        lambda: [engine.encrypt(column, key, 0) for column in x.T.astype(np.float64)]
    )

    def output(row: Any) -> Any:
        return engine.weighted_sum(sent, [0, *row.tolist()])  # the first is a constant

    multiply_s, _ = seconds(lambda: [output(table[n]) for n in range(OUTPUTS)])
    answer = output(table[0])
    decrypt_s, found = seconds(lambda: np.real(engine.decrypt(answer, key))[:, None])
    yield Row(
        "desilofhe", version("desilofhe"), "CKKS, packed", tokens,
        multiply_s * SIDE / OUTPUTS / tokens, (encrypt_s + decrypt_s * SIDE) / tokens,
        len(engine.serialize_ciphertext(sent[0])) * SIDE / tokens,
        len(engine.serialize_ciphertext(answer)) * SIDE / tokens, 0,
        relative_error(found, x, table[:1]), True,
        f"weighted_sum, {tokens} slots, {cores()} threads, {OUTPUTS} of {SIDE} outputs",
    )  # fmt: skip
