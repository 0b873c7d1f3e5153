"""What a page can show, as plain values. Nothing here knows HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backends.he.params import Parameters
from sim.trace import Span


@dataclass(frozen=True)
class Sample:
    """One prompt, and how the base and the tuned model go on with it."""

    prompt: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Curve:
    """One training. Losses in nats per token; values that are not finite are left out.

    name      one of "private" and "clear", which have colours
    losses    of steps 1, 2, ...
    held_out  (steps done, loss), the base model at 0
    """

    name: str
    losses: Sequence[float]
    held_out: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Part:
    """Seconds of the run that went to one thing; kind is "model", "cipher", "wire" or "worker"."""

    kind: str
    name: str
    seconds: float


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from workers in training, and the tokens trained on meanwhile."""

    up_bytes: float
    down_bytes: float
    tokens: int


@dataclass(frozen=True)
class Request:
    """The payload of one request as it was sent, or its beginning, and what it was for.

    size_bytes  of the whole payload
    """

    payload: bytes = field(repr=False)
    size_bytes: int
    tokens: int
    matrix: str


@dataclass(frozen=True)
class Checks:
    """What was verified.

    answers           products that were decrypted, checked and used
    caught            workers found giving a wrong answer
    blocks            encrypted, each under its own secret
    median, largest   relative errors of products, expected of the scales in use; where: the matrix
    wraps             results that wrapped and were repaired
    gradient_ratio    mean of the private gradient's norm over that in clear
    """

    answers: int | None = None
    caught: int | None = None
    blocks: int | None = None
    median: float | None = None
    largest: float | None = None
    where: str = ""
    wraps: int | None = None
    gradient_ratio: float | None = None


@dataclass(frozen=True)
class Budget:
    """What differential privacy has spent on the adapter, for any one sequence."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Content:
    """A run. Losses are held out, in nats per token.

    steps_here          of the steps those that this process took, which times and counts are of
    private_s, clear_s  that the steps took, of this process and in clear
    spans               those of a `RealTrace`
    """

    title: str
    steps: int = 0
    steps_here: int | None = None
    base_loss: float | None = None
    private_loss: float | None = None
    clear_loss: float | None = None
    samples: Sequence[Sample] = ()
    curves: Sequence[Curve] = ()
    parts: Sequence[Part] = ()
    private_s: float | None = None
    clear_s: float | None = None
    spans: Sequence[Span] = ()
    traffic: Traffic | None = None
    parameters: Parameters | None = None
    request: Request | None = None
    checks: Checks | None = None
    budget: Budget | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
