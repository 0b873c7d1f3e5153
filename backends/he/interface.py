"""The small interface every HE backend implements, one half per role.

A *matrix* is one direction of one frozen linear group: forward multiplies by Wq^T, backward
by Wq. The owner sees its shape, its scales and its plan; the worker sees its int8 weights.
A backend never sees both through one object, and the worker half never sees a secret.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.errors import UserError
from backends.he.plan import MatrixPlan
from backends.he.wire import Format, Packing

Float32Array: TypeAlias = NDArray[np.float32]
Payload: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.uint8]"
"""Bytes on the wire, without a copy where possible."""
AnyPayload: TypeAlias = Any
"""A `Payload`, or a uint8[n] tensor on a GPU that owner and worker share, which crosses no wire."""
Values: TypeAlias = Any
"""float32[T, n]: an array, or a tensor where the owner's model and cipher are on a GPU."""


def carried(payload: AnyPayload) -> AnyPayload:
    """What a message carries of it: a view of an array's bytes; memory on a device as it is."""
    return payload.data if isinstance(payload, np.ndarray) else payload


class NonFiniteInputError(UserError, ValueError):
    """An activation or gradient holds NaN or infinity; it is refused before encryption."""


def unchecked(
    unverified: bool, guarded: Collection[str], matrices: Sequence[OwnerMatrix]
) -> str | None:
    """`OwnerCipher.weakness` of a cipher that does encrypt; `guarded` names matrices."""
    if unverified:
        return "it decrypts answers that nothing checks (unverified=True)"
    missing = [matrix.name for matrix in matrices if matrix.name not in guarded]
    return f"nothing guards {missing[0]} and {len(missing) - 1} more matrices" if missing else None


def check_input(x: Values, matrix: OwnerMatrix) -> None:
    """Raise ValueError unless x, an array or a tensor, is contiguous float32[T >= 1, K]."""
    if x.ndim != 2 or x.shape[1] != matrix.in_features or x.shape[0] < 1:
        raise ValueError(
            f"{matrix.name}: takes [tokens, {matrix.in_features}], got {list(x.shape)}"
        )
    if isinstance(x, np.ndarray):
        right = x.dtype == np.float32 and x.flags.c_contiguous
    else:  # a tensor, of a library that ciphers on a CPU do without
        right = str(x.dtype) == "torch.float32" and x.is_contiguous()
    if not right:
        raise ValueError(f"{matrix.name}: takes contiguous float32, got {x.dtype}")


def require_finite(finite: NDArray[np.bool_], matrix: OwnerMatrix) -> None:
    """Raise NonFiniteInputError unless the norms of all tokens, bool[T], are finite.

    The message names the matrix and the token's position, never a value.
    """
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise NonFiniteInputError(
            f"{matrix.name}: NaN or infinity in token {bad[0]} ({len(bad)} of {len(finite)} "
            "tokens); lower the learning rate or look at the data of this batch"
        )


class UnguardedError(RuntimeError):
    """An answer was to be decrypted that nothing checks. This is a bug in the caller.

    A cipher that was made with `unverified=True` decrypts such answers: for tests and benchmarks.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: its answers are not checked; guard the matrix before its first request, or "
            "say unverified=True where a worker need not be watched"
        )


@dataclass(frozen=True)
class OwnerMatrix:
    """What the owner knows of one matrix. All of it is public.

    name          for messages to people, e.g. "model.layers.0.self_attn.qkv.forward"
    in_scale      float32[K], applied to inputs before encryption (forward 1/c, see `quantise.py`)
    out_scale     float32[N], applied to decrypted results (backward 1/c)
    hint          int32[tiles, rank, 256, 16], H = Wq*A for the N outputs; None for `clear`
    """

    name: str
    in_scale: Float32Array
    out_scale: Float32Array
    plan: MatrixPlan
    hint: NDArray[np.int32] | None = field(default=None, repr=False)

    @property
    def in_features(self) -> int:
        """K."""
        return len(self.in_scale)

    @property
    def out_features(self) -> int:
        """N."""
        return len(self.out_scale)


@dataclass(frozen=True)
class WorkerMatrix:
    """What a worker knows of one matrix.

    weight   int8[N, K] as stored, one copy for both directions
    forward  multiply by weight^T (K in, N out) or by weight (N in, K out)
    format   how requests and answers travel
    """

    weight: NDArray[np.int8] = field(repr=False)
    forward: bool
    format: Format


@dataclass(frozen=True)
class Encrypted:
    """One encrypted request: the bytes to send, and what it takes to read the answer."""

    payload: AnyPayload
    sealed: Any = field(repr=False)


@dataclass(frozen=True)
class Exactness:
    """How exact products are, as the owner's cipher expects of the scales that it uses by now.

    median   of all matrices: relative error of a product
    largest  of them, and the matrix that has it
    wraps    results that wrapped and were repaired so far
    """

    median: float
    largest: float
    where: str
    wraps: int


class OwnerCipher(ABC):
    """The owner's half. Holds secrets; must never be reachable from worker code.

    blocks   encrypted so far, each under a secret of its own
    packing  how many bytes travel, where not each matrix's `Format` says it
    """

    blocks: int = 0
    packing: Packing | None = None

    def exactness(self, matrices: Sequence[OwnerMatrix]) -> Exactness | None:
        """Of products with these matrices; None for a cipher that predicts no error."""
        return None

    def start_over(self) -> None:  # noqa: B027
        """Forget what was learnt from results so far: a session's first are of made-up inputs."""

    @property
    @abstractmethod
    def simulated_randomness(self) -> bool:
        """True when secrets come from a seeded generator; real drivers refuse that."""

    @abstractmethod
    def weakness(self, matrices: Sequence[OwnerMatrix]) -> str | None:
        """Why no worker elsewhere may serve it for these matrices; None when nothing is amiss.

        That it does not encrypt, or that it would decrypt an answer that nothing checks.
        """

    @abstractmethod
    def guard(self, matrix: OwnerMatrix, weight: NDArray[np.int8], forward: bool) -> None:
        """Check every answer to later requests for `matrix` against the weight int8[N, K]."""

    @abstractmethod
    def up_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        """Bytes of an encrypted request. Depends on public shapes only."""

    @abstractmethod
    def down_bytes(self, matrix: OwnerMatrix, tokens: int) -> int:
        """Bytes of its answer. Depends on public shapes only."""

    @abstractmethod
    def encrypt(self, x: Values, matrix: OwnerMatrix) -> Encrypted:
        """Encrypt float32[T, K] for `matrix`.

        Raises NonFiniteInputError for NaN or infinity, ValueError for a wrong shape.
        """

    @abstractmethod
    def decrypt(
        self, sealed: Any, payload: AnyPayload, matrix: OwnerMatrix, worker: str = ""
    ) -> Values:
        """float32[T, N] from the worker's answer, where x was.

        A sealed value opens once, then all that it holds is wiped.

        worker  who answered: what is too little to see once is summed up for each

        Raises ValueError when the answer has the wrong number of bytes, UnguardedError when the
        matrix was not guarded, WrongAnswerError, with `sealed` still closed, when the answer is
        not the product.
        """

    @abstractmethod
    def discard(self, sealed: Any) -> None:
        """Overwrite a sealed value that no answer will be opened with; it opens nothing after.

        Harmless for one that was opened.
        """


class WorkerCipher(ABC):
    """The worker's half: one public integer matrix product, no state, no secrets.

    launches  products it may work on at once; requests that come meanwhile are joined
    packing   as the owner's
    """

    launches = 1
    packing: Packing | None = None

    @abstractmethod
    def load(self, weight: NDArray[np.int8], forward: bool, format: Format) -> Any:
        """A `WorkerMatrix` in the form this backend computes with; opaque to everyone else."""

    @abstractmethod
    def multiply(self, payload: AnyPayload, tokens: int, matrix: Any) -> AnyPayload:
        """Answer bytes for `tokens` encrypted rows times a matrix that `load` made.

        They are where the request was. Raises ValueError when it has the wrong number of bytes.
        """

    def multiply_many(
        self, requests: Sequence[tuple[AnyPayload, int]], matrix: Any
    ) -> list[AnyPayload]:
        """The answers to several requests (payload, tokens) for one matrix, at once if it pays."""
        return [self.multiply(payload, tokens, matrix) for payload, tokens in requests]
