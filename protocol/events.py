"""Events a machine takes and effects it asks for.

Frozen and checked on construction. `object` fields are opaque handles of the driver's: a
machine carries them from one task to the next and never looks inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from protocol.messages import Bytes, Frame, LocalFrame, Payload


def _positive(value: int, what: str) -> None:
    if value < 1:
        raise ValueError(f"{what} is at least 1, got {value}")


# --- events -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Open sessions with every worker."""


@dataclass(frozen=True)
class FrameArrived:
    """A frame from `peer`, exactly as it came off the wire."""

    peer: str
    frame: Bytes | LocalFrame = field(repr=False)


@dataclass(frozen=True)
class Disconnected:
    """The connection to a peer has ended, with all that was on its way; a new one can be opened.

    The next Send to the peer tries to. For owners: a worker's peers are connections.
    """

    peer: str


@dataclass(frozen=True)
class PeerLost:
    """The transport to `peer` is gone for good; `reason` is for a person."""

    peer: str
    reason: str = "connection lost"


@dataclass(frozen=True)
class TimerFired:
    """A timer set by an earlier effect has run out."""

    timer: str


@dataclass(frozen=True)
class TaskDone:
    """A compute task ended; `result` is what its kind says it returns."""

    task: int
    result: object = field(repr=False)


@dataclass(frozen=True)
class TaskFailed:
    """A compute task raised. `reason` stays on this side of the wire."""

    task: int
    reason: str


@dataclass(frozen=True)
class AnswerRejected:
    """A decryption found that the answer is not the product it asked for; nothing was opened."""

    task: int
    reason: str


@dataclass(frozen=True)
class LinearWanted:
    """A lane met a remote linear. `call` is unique and increasing; `x` holds `tokens` rows."""

    call: int
    matrix: int
    tokens: int
    x: object = field(repr=False)

    def __post_init__(self) -> None:
        _positive(self.call, "call")
        _positive(self.tokens, "tokens")


@dataclass(frozen=True)
class CloseWanted:
    """No more linears will be asked for; end the sessions."""


Event: TypeAlias = (
    Start | FrameArrived | Disconnected | PeerLost | TimerFired | TaskDone | TaskFailed
    | AnswerRejected | LinearWanted | CloseWanted
)  # fmt: skip

# --- tasks: what an effect can ask to compute ----------------------------------------------


@dataclass(frozen=True)
class Encrypt:
    """Encrypt `x` for a matrix. Result: (payload, sealed handle)."""

    matrix: int
    tokens: int
    x: object = field(repr=False)


@dataclass(frozen=True)
class Decrypt:
    """Check and decrypt an answer. Result: whatever the lane waits for.

    Ends with AnswerRejected, and `sealed` still closed, when the answer is not the product.

    worker  whose answer it is: little lies are summed up for each
    """

    matrix: int
    tokens: int
    sealed: object = field(repr=False)
    payload: Payload = field(repr=False)
    worker: str = field(default="", compare=False)


@dataclass(frozen=True)
class MultiplyCiphertext:
    """Ciphertext x public matrix, on a worker. Result: the payload."""

    matrix: int
    tokens: int
    payload: Payload = field(repr=False)


Task: TypeAlias = Encrypt | Decrypt | MultiplyCiphertext

# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Hand a frame to the transport."""

    peer: str
    frame: Frame = field(repr=False)


@dataclass(frozen=True)
class RunTask:
    """Compute, then report TaskDone or TaskFailed with this number."""

    task: int
    work: Task


@dataclass(frozen=True)
class SetTimer:
    """Fire `timer` once after `delay_s`; setting it again replaces it."""

    timer: str
    delay_s: float

    def __post_init__(self) -> None:
        if self.delay_s <= 0:
            raise ValueError(f"timer {self.timer!r}: delay_s is positive, got {self.delay_s}")


@dataclass(frozen=True)
class CancelTimer:
    """Forget a timer; harmless when it is not set."""

    timer: str


@dataclass(frozen=True)
class Deliver:
    """The result of a call, for the lane that waits for it."""

    call: int
    result: object = field(repr=False)


@dataclass(frozen=True)
class FailCall:
    """A call ends without a result."""

    call: int
    reason: str


@dataclass(frozen=True)
class Discard:
    """Nobody will open an answer with `sealed`, the handle of a call that has ended: wipe it."""

    call: int
    sealed: object = field(repr=False)


@dataclass(frozen=True)
class Retired:
    """A worker will not be used again; the reason is for a person."""

    peer: str
    reason: str


@dataclass(frozen=True)
class Dropped:
    """A frame was ignored: late, duplicate, or against the rules. For counters only."""

    peer: str
    reason: str


@dataclass(frozen=True)
class Abort:
    """Nothing can go on; the reason is for a person."""

    reason: str


@dataclass(frozen=True)
class Closed:
    """Every session has ended in order."""


Effect: TypeAlias = (
    Send
    | RunTask
    | SetTimer
    | CancelTimer
    | Deliver
    | FailCall
    | Discard
    | Retired
    | Dropped
    | Abort
    | Closed
)


class Machine(Protocol):
    """What `protocol.owner.Owner` and `protocol.worker.Worker` have in common."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """React to one event at `now`, seconds of a clock that does not run back."""
