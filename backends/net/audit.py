"""Now and then the owner multiplies a request itself, and compares the worker's answer bit by bit.

The check of every answer (`backends/he/integrity.py`) leaves room for what is smaller than the
cipher's own noise. An honest answer is an exact integer product, so here there is no room at all:
a worker that touches one bit of every answer is caught after `one_in` of them on average. Which
requests those are is decided when they are made, by the owner alone, and nothing on the wire tells.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from backends.he.interface import AnyPayload, WorkerCipher, WorkerMatrix
from protocol.errors import WrongAnswerError

ONE_IN = 10_000


class Audit:
    """Recomputes one in so many requests. Safe to use from several threads.

    worker    what an honest worker computes with; any kind gives the same bits
    matrices  in the catalogue's order
    one_in    requests for each that is recomputed, on average; its weight is read and packed then
    """

    def __init__(
        self, worker: WorkerCipher, matrices: Sequence[WorkerMatrix], one_in: int = ONE_IN
    ) -> None:
        if one_in < 1:
            raise ValueError(f"one request in {one_in} is none; at least 1")
        self._worker = worker
        self._matrices = matrices
        self._one_in = one_in

    def keep(self, request: AnyPayload) -> AnyPayload | None:
        """The request's bytes where its answer is to be compared, else None."""
        chosen = (
            isinstance(request, bytes | bytearray | memoryview)
            and secrets.randbelow(self._one_in) == 0
        )
        return request if chosen else None

    def require(self, matrix: int, tokens: int, request: AnyPayload, answer: AnyPayload) -> None:
        """Raise WrongAnswerError unless the answer to a request that was kept is exact."""
        asked = self._matrices[matrix]
        operand = self._worker.load(asked.weight, asked.forward, asked.format)
        right = self._worker.multiply(request, tokens, operand)
        if not np.array_equal(np.frombuffer(right, np.uint8), np.frombuffer(answer, np.uint8)):
            raise WrongAnswerError(
                f"matrix {matrix}: the worker's answer is not bit for bit the product that was "
                "asked for; the worker is broken or lying: stop using it (the request revealed "
                "nothing to it)"
            )
