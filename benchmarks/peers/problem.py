"""The product that everyone computes, and what is said of it. Only numpy: peers run elsewhere.

Y = X*Wq^T with Wq int8[2048, 2048] in clear and X float32[T, 2048] encrypted. Who takes integers
only gets X rounded to 8 bits per token, as the scheme of each token wants it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 2048
SEED = 11


def weights() -> NDArray[np.int8]:
    """int8[N, K], with the bell shape of a trained layer's."""
    drawn = np.random.default_rng(SEED).standard_normal((SIDE, SIDE))
    return np.clip(np.rint(drawn * 30), -127, 127).astype(np.int8)


def inputs(tokens: int) -> NDArray[np.float32]:
    """float32[T, K], heavy-tailed as activations are: Student t, and a few outlier channels."""
    rng = np.random.default_rng(SEED + 1)
    x = rng.standard_t(4, size=(tokens, SIDE))
    x[:, rng.choice(SIDE, SIDE // 256, replace=False)] *= 8
    return x.astype(np.float32)


def rounded(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(int64[T, K] of 8 bits, float64[T, 1]): each token as integers times its scale."""
    scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    return np.rint(x / scale).astype(np.int64), scale


def relative_error(found: NDArray[Any], x: NDArray[Any], outputs: NDArray[np.int8]) -> float:
    """Of [T, n] against x[T, K] times rows int8[n, K] of the weights."""
    right = x.astype(np.float64) @ outputs.T.astype(np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@dataclass(frozen=True)
class Row:
    """What one library needs, for each token of a request.

    tokens        of a request
    key_bytes     that the server must be given once, its evaluation keys and public context
    extrapolated  whether some of the outputs were computed and the time of all reckoned from them
    note          parameters, and how it was asked
    """

    name: str
    version: str
    scheme: str
    tokens: int
    server_s_per_token: float
    owner_s_per_token: float
    up_bytes_per_token: float
    down_bytes_per_token: float
    key_bytes: int
    relative_error: float
    extrapolated: bool
    note: str


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """(wall seconds, result)."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def on_every_core(work: Callable[[int], object]) -> float:
    """Wall seconds until work(0), work(1) … have ended, one on each core, each in a fork.

    A library that multiplies on one core is at its best with one process for each.
    Raises RuntimeError when one of them failed.
    """
    start = time.perf_counter()
    children = []
    for core in range(cores()):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(core)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    if any(ended):
        raise RuntimeError("a process of the measurement failed")
    return time.perf_counter() - start
