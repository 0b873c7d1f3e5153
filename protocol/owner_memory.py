"""What an owner remembers of each worker and of each call, and how patient it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages import Frame, Reason
from protocol.owner_tables import CallState, State
from protocol.pace import Pace

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


_DOUBLINGS = 60
"""Of a wait: a float holds no 1,025."""


@dataclass(frozen=True)
class OwnerConfig:
    """Patience and width.

    hello_timeout_s    first wait for a Welcome; it doubles with each attempt, up to timeout_s_max
    request_timeout_s  the same for an answer of a worker that has not answered yet, and
    quiet_s            at most, of one that has. Added to either is what the bytes on their way may
                       take, at the pace that was seen, or before any at slow_bytes_per_s
    wait_s_max         no wait is longer
    attempts_max       sendings without an answer before a worker is lost
    greetings_max      the same for Hello
    retry_s            first wait after BUSY or FAILED; it doubles too; longer where BUSY says so
    refusals_max       BUSY or FAILED answers, or waits in vain for an answer where another worker
                       could be asked, before a call fails; BUSY with a time counts anew after every
                       answer of that worker
    revive_s           until a lost worker is greeted again; it doubles every time it is lost
                       without an answer, up to revive_s_max
    window             requests in flight per worker
    window_bytes       bytes of requests and answers in flight per worker; one request may be larger
    slower_min         a worker counts as slower than the fastest when it is so many times as slow
    """

    hello_timeout_s: float = 5.0
    request_timeout_s: float = 60.0
    timeout_s_max: float = 240.0
    attempts_max: int = 5
    retry_s: float = 0.25
    refusals_max: int = 10
    revive_s: float = 60.0
    window: int = 8
    window_bytes: int = 256 << 20
    quiet_s: float = 15.0
    wait_s_max: float = 1800.0
    greetings_max: int = 8
    revive_s_max: float = 1800.0
    slow_bytes_per_s: float = 250_000.0
    slower_min: float = 4.0

    def __post_init__(self) -> None:
        counts = (self.window, self.attempts_max, self.greetings_max, self.refusals_max)
        if min(*counts, self.window_bytes) < 1:
            raise ValueError("windows, and the most of anything, are at least 1")
        waits = (self.hello_timeout_s, self.request_timeout_s, self.quiet_s, self.timeout_s_max)
        others = (self.wait_s_max, self.retry_s, self.revive_s, self.revive_s_max)
        if min(*waits, *others, self.slow_bytes_per_s, self.slower_min) <= 0:
            raise ValueError("waits and speeds are positive")

    def doubled(self, base_s: float, attempts: int) -> float:
        """Seconds to wait the `attempts`-th time."""
        return min(base_s * 2.0 ** min(attempts - 1, _DOUBLINGS), self.timeout_s_max)

    def revived_s(self, losses: int) -> float:
        """Seconds until a worker is greeted that was lost so often in a row."""
        return min(self.revive_s * 2.0 ** min(losses - 1, _DOUBLINGS), self.revive_s_max)


@dataclass
class Peer:
    """A worker, and the session with it. The first counts are since its last answer.

    forgot, dropped  how often it has lost the session, and the connection
    losses           how often it was lost
    silences         how often another worker was asked because it did not answer; half of them are
    reluctance       forgiven with every answer, and so are these: refusals are among them
    pace, heard_s    how fast it is, and when it last answered
    """

    name: str
    state: State = State.NEW
    attempts: int = 0
    max_tokens: int = 0
    why_lost: str = ""
    forgot: int = 0
    dropped: int = 0
    losses: int = 0
    silences: int = 0
    reluctance: int = 0
    pace: Pace = field(default_factory=Pace)
    heard_s: float = 0.0

    def answered(self, sent_s: float, now: float, size: int) -> None:
        """Forgive what was before, and learn its pace.

        sent_s  when it was first sent the request. Of two sendings nobody can tell which it has
                answered: then this is too long, and what follows is patience. The other way about,
                a line that has become slow would never be known for it.
        """
        self.forgot = self.dropped = self.losses = 0
        self.silences //= 2
        self.reluctance //= 2
        self.pace.observe(now - max(sent_s, self.heard_s), size)
        self.heard_s = now

    def hesitated(self) -> None:
        """Another worker was asked in its place."""
        self.reluctance += 1


@dataclass
class Call:
    """One linear a lane waits for. `sealed` opens the answer to `frame`; both live until it has.

    size       bytes of the request's and the answer's payloads
    refused_s  when it was refused last
    """

    id: int
    matrix: int
    tokens: int
    size: int
    state: CallState = CallState.ENCRYPTING
    frame: Frame = field(default=b"", repr=False)
    sealed: object = field(default=None, repr=False)
    peer: str = ""
    sent_s: float = 0.0
    attempts: int = 0
    refusals: int = 0
    refused_s: float = 0.0
    refused_by: set[str] = field(default_factory=set)
    silences: int = 0
