"""One shard of a model: some of its layers, mapped from a worker's part that lies on its machine.

Knows nothing of Ray, which runs it as an actor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from platform import node

import numpy as np
from numpy.typing import NDArray

from backends.he.manifest import PreparationError
from backends.he.store import WorkerPart
from backends.serve import require_parameters, worker_cipher
from protocol.catalogue import Catalogue


def split(sizes: Sequence[int], parts: int) -> list[range]:
    """Neighbours together: so many ranges of `sizes`, none empty, about the same sum in each.

    Raises ValueError for more parts than sizes, or none.
    """
    if not 1 <= parts <= len(sizes):
        raise ValueError(f"{len(sizes)} layers cannot be {parts} shards")
    sums = [0, *accumulate(sizes)]
    cuts = [0]
    for part in range(1, parts):
        share = sums[-1] * part / parts
        allowed = range(cuts[-1] + 1, len(sizes) - (parts - part) + 1)
        cuts.append(min(allowed, key=lambda i: abs(sums[i] - share)))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def identity(catalogue: Catalogue) -> bytes:
    """Of a model as it was prepared: the same weights under other parameters travel otherwise."""
    return hashlib.sha256(catalogue.model_digest + catalogue.parameters_digest).digest()


VERSION = 1
"""Of what a shard is asked and answers. Shards outlive the program that started them, and this
tells a newer one that it cannot use them; it grows with every change that the other side sees."""


class Shard:
    """Multiplies with the matrices of some groups.

    directory      of a worker's part, on this machine
    wanted         `identity` of the catalogue that it must hold a part of
    first, last    groups, the last not included
    backend        "cpu" or "cuda"

    Raises PreparationError where the part is missing, damaged or of another model, GpuError and
    KernelError as `worker_cipher`.
    """

    def __init__(self, directory: str, wanted: bytes, first: int, last: int, backend: str) -> None:
        part = WorkerPart.open(Path(directory), range(first, last))
        if identity(part.catalogue) != wanted:
            raise PreparationError(
                f"{directory} on {node()} is of another model; copy it there again"
            )
        self._cipher, self._name = worker_cipher(require_parameters(part), backend)
        self._matrices = {
            2 * first + i: self._cipher.load(matrix.weight, matrix.forward, matrix.format)
            for i, matrix in enumerate(part.matrices)
        }

    def version(self) -> int:
        """Of the program that started it."""
        return VERSION

    def name(self) -> str:
        """What multiplies. Answered once all is loaded."""
        return self._name

    def multiply(
        self, matrix: int, tokens: Sequence[int], *payloads: NDArray[np.uint8]
    ) -> list[NDArray[np.uint8]]:
        """An answer for each payload of so many tokens.

        Raises ValueError where one has the wrong number of bytes.
        """
        requests = [(p.data, t) for p, t in zip(payloads, tokens, strict=True)]
        answers = self._cipher.multiply_many(requests, self._matrices[matrix])
        return [np.asarray(answer) for answer in answers]
