"""What an owner remembers of each worker and of each call, and how patient it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages import Frame, Reason
from protocol.owner_tables import CallState, State

REFUSAL_TEXT = {
    Reason.OTHER_PARAMETERS: "it was prepared with other cipher parameters (check --preset)",
    Reason.OTHER_MODEL: "it holds another model (check --weights on both sides)",
    Reason.OTHER_VERSION: "it speaks another protocol version",
    Reason.BUSY: "it is busy with other requests or owners",
    Reason.UNKNOWN_MATRIX: "it does not know this layer",
    Reason.WRONG_SIZE: "it expected another number of bytes",
    Reason.TOO_MANY_TOKENS: "the micro-batch has more tokens than it takes at once",
    Reason.FAILED: "its computation failed",
    Reason.NO_SESSION: "it knows no such session",
}


@dataclass(frozen=True)
class OwnerConfig:
    """Patience and width.

    hello_timeout_s, request_timeout_s  first wait; it doubles with each attempt, up to
                                        timeout_s_max
    attempts_max                        sendings without an answer before a worker is lost
    retry_s                             first wait after BUSY or FAILED; it doubles too
    refusals_max                        BUSY or FAILED answers, or workers lost waiting for its
                                        answer, before a call fails
    revive_s                            how often a lost worker is greeted again
    window                              requests in flight per worker
    """

    hello_timeout_s: float = 5.0
    request_timeout_s: float = 60.0
    timeout_s_max: float = 240.0
    attempts_max: int = 5
    retry_s: float = 0.25
    refusals_max: int = 10
    revive_s: float = 60.0
    window: int = 8

    def __post_init__(self) -> None:
        if min(self.window, self.attempts_max, self.refusals_max) < 1:
            raise ValueError("window, attempts_max and refusals_max are at least 1")
        waits = (self.hello_timeout_s, self.request_timeout_s, self.timeout_s_max)
        if min(*waits, self.retry_s, self.revive_s) <= 0:
            raise ValueError("waits are positive")


@dataclass
class Peer:
    """A worker, and the session with it.

    forgot, dropped  how often it has lost the session, and the connection, without an answer since
    """

    name: str
    state: State = State.NEW
    attempts: int = 0
    max_tokens: int = 0
    why_lost: str = ""
    forgot: int = 0
    dropped: int = 0


@dataclass
class Call:
    """One linear a lane waits for. `sealed` opens the answer to `frame`; both live until it has."""

    id: int
    matrix: int
    tokens: int
    state: CallState = CallState.ENCRYPTING
    frame: Frame = field(default=b"", repr=False)
    sealed: object = field(default=None, repr=False)
    peer: str = ""
    attempts: int = 0
    refusals: int = 0
    refused_by: set[str] = field(default_factory=set)
    silences: int = 0
