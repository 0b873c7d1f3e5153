"""The owner's side of the line: a link to each worker, opened when there is something to send."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backends.net.link import Link
from backends.net.tls import CertificateError, Tls, dial
from protocol.messages import Frame

log = logging.getLogger(__name__)

_WAIT_S = (0.2, 15.0)
"""Between attempts to open a link: first, and most; it doubles."""


@dataclass
class _Line:
    """What is known of the line to one worker."""

    host: str
    port: int
    link: Link | None = None
    opening: bool = False
    waiting: list[Frame] = field(default_factory=list)
    failures: int = 0
    warned: str = ""
    next_try: float = 0.0


class Dialler:
    """Carries frames to workers and back.

    workers          name -> (host, port)
    tls              this side's certificates; None speaks plain text, on loopback only
    frame_max        bytes of the largest frame that is taken
    on_frame         is told (worker, frame)
    on_disconnected  is told that a worker's link is gone; the next frame opens another
    on_lost          is told (worker, why) that there will be none: it is not believed
    on_identity      is told (worker, identity) whenever a link has been opened, before a frame
                     is sent on it; returns whether it may be used
    flooded          whether frames that were handed over wait in such numbers that no more are read
    """

    def __init__(
        self,
        workers: Mapping[str, tuple[str, int]],
        tls: Tls | None,
        frame_max: int,
        on_frame: Callable[[str, memoryview], None],
        on_disconnected: Callable[[str], None],
        on_lost: Callable[[str, str], None],
        on_identity: Callable[[str, str], bool] = lambda worker, identity: True,
        flooded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._lines = {name: _Line(host, port) for name, (host, port) in workers.items()}
        self._tls, self._frame_max = tls, frame_max
        self._on_frame, self._on_disconnected = on_frame, on_disconnected
        self._on_lost, self._on_identity, self._flooded = on_lost, on_identity, flooded
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def send(self, worker: str, frame: Frame) -> None:
        """Queue a frame; never blocks. Opens a link where there is none."""
        with self._lock:
            line = self._lines[worker]
            link = line.link
            if link is None and not self._closed.is_set():
                line.waiting.append(frame)
                if not line.opening:
                    line.opening = True
                    threading.Thread(
                        target=self._open, args=(worker, line), name=f"dial-{worker}", daemon=True
                    ).start()
        if link is not None:
            link.send(frame)

    def close(self) -> None:
        """End all links and open no more."""
        self._closed.set()
        with self._lock:
            links = [line.link for line in self._lines.values() if line.link is not None]
        for link in links:
            link.close("the owner closes")

    def _open(self, worker: str, line: _Line) -> None:
        self._closed.wait(max(0.0, line.next_try - time.monotonic()))
        try:
            if self._closed.is_set():
                return
            incoming, outgoing, identity = dial(line.host, line.port, self._tls)
        except CertificateError as error:
            self._failed(line)
            self._on_lost(worker, str(error))
            return
        except OSError as error:
            self._failed(line)
            # Once for each reason: whoever waits wants to know what for.
            if line.warned != str(error):
                line.warned = str(error)
                log.warning("no link to worker %s: %s", worker, error)
            self._on_disconnected(worker)
            return
        if not self._on_identity(worker, identity):
            incoming.close()
            outgoing.close()
            self._failed(line)
            self._on_lost(worker, f"its identity {identity[:16]}... is not to be used")
            return
        link = Link(
            f"link-{worker}", incoming, outgoing, self._frame_max,
            lambda frame: self._on_frame(worker, frame), lambda why: self._ended(worker, line, why),
            lambda unsent: self._flooded(),
        )  # fmt: skip
        with self._lock:
            line.link, line.opening, line.failures, line.warned = link, False, 0, ""
            waiting, line.waiting = line.waiting, []
        link.start()
        for frame in waiting:
            link.send(frame)
        if self._closed.is_set():
            link.close("the owner closes")

    def _failed(self, line: _Line) -> None:
        with self._lock:
            wait_s = min(_WAIT_S[1], _WAIT_S[0] * 2.0**line.failures)
            line.failures += 1
            line.next_try = time.monotonic() + wait_s
            line.opening, line.waiting = False, []

    def _ended(self, worker: str, line: _Line, why: str) -> None:
        with self._lock:
            line.link = None
        if not self._closed.is_set():
            log.info("the link to worker %s ended: %s", worker, why)
            self._on_disconnected(worker)
