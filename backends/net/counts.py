"""What a worker tells whoever runs it: numbers and reasons, nothing about content or about whom.

Counters are over all owners together. A page that said how much each owner computes, and when,
would tell whoever can read it what the owner's operator sees, which is more than anybody needs to
keep a worker running.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.errors import ProtocolError
from protocol.events import (
    Dropped,
    Effect,
    Event,
    FrameArrived,
    MultiplyCiphertext,
    RunTask,
    Send,
    TaskDone,
    TaskFailed,
)
from protocol.messages import Message, Reason, Refuse, decode

log = logging.getLogger(__name__)

OPENED, ENDED, REFUSED = "opened", "ended", "refused"
OWNER_FULL, FULL, TURNED_AWAY, CROWDED = "owner_links", "links", "handshake", "opening"
"""Why a link is refused, beside the protocol's reasons for a request: as many links as one owner,
or all owners, may have; no TLS of an owner that is believed; too many that have not said who."""
LABELS = (OWNER_FULL, FULL, TURNED_AWAY, CROWDED, *(reason.name.lower() for reason in Reason))
_SMALL_BYTES = 256  # no frame with a payload worth mentioning is shorter


@dataclass(frozen=True)
class LineEvent:
    """A link opened, ended or was refused, or something on it was.

    owner   its identity; empty before it has proved one, "plain" where there is no TLS
    reason  for a link that ended, a phrase; for a refusal one of LABELS
    detail  of a refusal, for a person
    """

    kind: str
    owner: str
    reason: str = ""
    detail: str = ""


def guarded(tell: Callable[[LineEvent], None]) -> Callable[[LineEvent], None]:
    """`tell`, whose failures are nobody's but its own: a worker goes on without its log."""

    def told(event: LineEvent) -> None:
        try:
            tell(event)
        except Exception as error:
            log.error("what happened to a link cannot be told: %s", type(error).__name__)

    return told


def small_message(frame: object) -> Message | None:
    """The message of a frame without a payload to speak of; None for any other frame."""
    try:
        return decode(frame) if len(frame) <= _SMALL_BYTES else None  # type: ignore[arg-type]
    except ProtocolError:
        return None


class Counts:
    """Counters of one worker since it started. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started_s = time.time()
        self.requests = self.tokens = self.products = self.dropped = 0
        self.in_hand = self.links = self.links_opened = 0
        self.bytes_in = self.bytes_out = 0
        self.launches = 0
        self.busy_s = self.waited_s = 0.0
        self.refusals: Counter[str] = Counter(dict.fromkeys(LABELS, 0))

    def observe(self, event: Event, effects: Sequence[Effect]) -> None:
        """What the worker's machine was told, and what it asks for (see `Hooks.observe`)."""
        with self._lock:
            if isinstance(event, FrameArrived):
                self.bytes_in += len(event.frame)
            elif isinstance(event, TaskDone | TaskFailed):
                self.in_hand -= 1
                self.products += isinstance(event, TaskDone)
            for effect in effects:
                self._count(effect)

    def _count(self, effect: Effect) -> None:
        match effect:
            case Send(_, frame):
                self.bytes_out += len(frame)
                message = small_message(frame)
                if isinstance(message, Refuse):
                    self.refusals[message.reason.name.lower()] += 1
            case RunTask(_, MultiplyCiphertext(_, tokens)):
                self.requests += 1
                self.tokens += tokens
                self.in_hand += 1
            case Dropped():
                self.dropped += 1

    def multiplied(self, seconds: float) -> None:
        """A launch has taken so long, with however many requests in it."""
        with self._lock:
            self.launches += 1
            self.busy_s += seconds

    def waited(self, seconds: float) -> None:
        """Requests that are computed now have waited so long together."""
        with self._lock:
            self.waited_s += seconds

    def put_off(self, arrived: int, answered: int) -> None:
        """A request was answered BUSY without the machine, of and with so many bytes."""
        with self._lock:
            self.bytes_in += arrived
            self.bytes_out += answered
            self.refusals[Reason.BUSY.name.lower()] += 1

    def on_line(self, event: LineEvent) -> None:
        """Something happened to a link; refusals by the protocol are counted by `observe`."""
        with self._lock:
            if event.kind == OPENED:
                self.links += 1
                self.links_opened += 1
            elif event.kind == ENDED:
                self.links -= 1
            elif event.reason in (OWNER_FULL, FULL, TURNED_AWAY, CROWDED):
                self.refusals[event.reason] += 1

    def exposition(self, ready: bool) -> str:
        """All of it, in version 0.0.4 of Prometheus's text format."""
        with self._lock:
            values = (
                ("requests_total", "counter", "Requests taken.", self.requests),
                ("products_total", "counter", "Requests computed.", self.products),
                ("tokens_total", "counter", "Tokens of the requests taken.", self.tokens),
                ("busy_seconds_total", "counter", "Seconds in products, over all threads.",
                 round(self.busy_s, 6)),
                ("launches_total", "counter", "Products made, of one request or several joined.",
                 self.launches),
                ("waited_seconds_total", "counter", "Seconds that requests waited to be computed.",
                 round(self.waited_s, 6)),
                ("received_bytes_total", "counter", "Bytes of frames received.", self.bytes_in),
                ("sent_bytes_total", "counter", "Bytes of frames sent.", self.bytes_out),
                ("dropped_frames_total", "counter",
                 "Frames ignored: repeated, or against the rules.", self.dropped),
                ("links_opened_total", "counter", "Links opened.", self.links_opened),
                ("links", "gauge", "Links open.", self.links),
                ("requests_in_hand", "gauge", "Requests that wait or are computed.", self.in_hand),
                ("ready", "gauge", "1 while new requests are taken.", int(ready)),
                ("start_time_seconds", "gauge", "When it started, in Unix time.",
                 round(self._started_s, 3)),
            )  # fmt: skip
            refusals = dict(self.refusals)
        lines = []
        for name, kind, text, value in values:
            lines += [*_head(name, kind, text), f"{_PREFIX}{name} {value}"]
        lines += _head("refusals_total", "counter", "Links and requests refused, by reason.")
        lines += [f'{_PREFIX}refusals_total{{reason="{r}"}} {n}' for r, n in refusals.items()]
        return "\n".join(lines) + "\n"


_PREFIX = "private_lora_worker_"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"]
