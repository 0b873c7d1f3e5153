"""The owner's side of the line: a link to each worker, opened when there is something to send."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.errors import UserError
from backends.net.link import Link
from backends.net.tls import CertificateError, Tls, dial
from protocol.messages import Frame

log = logging.getLogger(__name__)

_WAIT_S = (0.2, 15.0)
"""Between attempts to open a link: first, and most; it doubles."""
_DOUBLINGS = 30
"""More than it takes to come to the most, and few enough for a float."""
_LOOK_S = 0.2


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
    believed: bool = False
    lost: bool = False
    dropped: bool = False


class WorkerUnreachableError(UserError):
    """None of the workers that were named can be reached; the text says which, and why."""


class Dialler:
    """Carries frames to workers and back.

    workers          name -> (host, port)
    tls              this side's certificates; None speaks plain text, on loopback only
    frame_max        bytes of the largest frame that is taken
    on_frame         is told (worker, frame)
    on_disconnected  is told that a worker's link is gone; the next frame opens another
    on_lost          is told (worker, why) that there will be none: it is not believed, and never
                     was, or was dropped
    on_identity      is told (worker, identity) whenever a link has been opened, before a frame
                     is sent on it; returns why it may not be used, or nothing
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
        on_identity: Callable[[str, str], str] = lambda worker, identity: "",
        flooded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._lines = {name: _Line(host, port) for name, (host, port) in workers.items()}
        self._tls, self._frame_max = tls, frame_max
        self._on_frame, self._on_disconnected = on_frame, on_disconnected
        self._on_lost, self._on_identity, self._flooded = on_lost, on_identity, flooded
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def send(self, worker: str, frame: Frame) -> None:
        """Queue a frame; never blocks. Opens a link where there is none, and none was dropped."""
        with self._lock:
            line = self._lines[worker]
            link = line.link
            if line.dropped or self._closed.is_set():
                return
            opens = link is None and not line.opening
            if link is None:
                line.waiting.append(frame)
                line.opening = True
        if opens:
            thread = threading.Thread(
                target=self._open, args=(worker, line), name=f"dial-{worker}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # no more threads for now
                self._unopened(worker, line, error)
        if link is not None:
            link.send(frame)

    def require_somebody(self, seconds: float) -> None:
        """Open links until one is open, or none is to be had; frames find it then.

        Raises WorkerUnreachableError when there is none after so long.
        """
        until, told = time.monotonic() + seconds, False
        while True:
            for worker, line in self._lines.items():
                if not line.lost:
                    with self._lock:
                        line.opening = True
                    self._open_aside(worker, line)
            lines = self._lines.values()
            if any(line.link for line in lines) or all(line.lost for line in lines):
                return
            why = "; ".join(f"{name}: {line.warned}" for name, line in self._lines.items())
            if time.monotonic() >= until:
                raise WorkerUnreachableError(
                    f"no worker can be reached ({why}); start it there (python -m "
                    "scenarios.worker), and look at the address, the port and the firewall"
                )
            if not told:
                log.warning("no worker yet; trying on for a while")
                told = True

    def drop(self, worker: str, why: str) -> None:
        """End the link to a worker and open no more; `on_lost` is told. Once is enough."""
        with self._lock:
            line = self._lines[worker]
            before, line.dropped, line.waiting = line.dropped, True, []
            link = line.link
        if link is not None:
            link.close(why)
        if not before:
            self._on_lost(worker, why)

    def close(self) -> None:
        """End all links and open no more."""
        self._closed.set()
        with self._lock:
            links = [line.link for line in self._lines.values() if line.link is not None]
        for link in links:
            link.close("the owner closes")

    def _open_aside(self, worker: str, line: _Line) -> None:
        """Open a link and wait for it, so that Ctrl-C does not: looking up a name cannot be
        interrupted."""
        thread = threading.Thread(
            target=self._open, args=(worker, line), name=f"dial-{worker}", daemon=True
        )
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_S)

    def _open(self, worker: str, line: _Line) -> None:
        self._closed.wait(max(0.0, line.next_try - time.monotonic()))
        if self._closed.is_set():
            return
        try:
            incoming, outgoing, identity = dial(line.host, line.port, self._tls)
            refused = self._on_identity(worker, identity)
            if not refused:
                self._carry(worker, line, incoming, outgoing)
                return
        except Exception as error:  # whatever it is: another frame must find the line as it was
            self._unopened(worker, line, error)
            return
        incoming.close()
        outgoing.close()
        self._failed(line)
        self._lost(worker, line, refused)

    def _carry(self, worker: str, line: _Line, incoming: Any, outgoing: Any) -> None:
        """Have a new link carry frames."""
        link = Link(
            f"link-{worker}", incoming, outgoing, self._frame_max,
            lambda frame: self._on_frame(worker, frame),
            lambda why: self._ended(worker, line, link, why),
            lambda unsent: self._flooded(),
        )  # fmt: skip
        with self._lock:
            if line.warned:
                log.warning("linked to worker %s", worker)
            line.link, line.opening, line.failures, line.warned = link, False, 0, ""
            line.believed = True
            for frame in line.waiting:  # before any that comes now
                link.send(frame)
            line.waiting = []
        link.start()
        if self._closed.is_set() or line.dropped:
            link.close("the owner closes")

    def _unopened(self, worker: str, line: _Line, error: Exception) -> None:
        """No link came of it; why decides whether there may be one later."""
        self._failed(line)
        # Who has been believed is not gone because another answers in its place for a moment.
        if isinstance(error, CertificateError) and not line.believed:
            self._lost(worker, line, str(error))
            return
        expected = isinstance(error, OSError | CertificateError)
        why = str(error) if expected else type(error).__name__
        # Once for each reason: whoever waits wants to know what for.
        if line.warned != why:
            line.warned = why
            log.warning("no link to worker %s: %s", worker, why)
        if not line.dropped:
            self._on_disconnected(worker)

    def _lost(self, worker: str, line: _Line, why: str) -> None:
        line.lost = True
        if not line.dropped:
            self._on_lost(worker, why)

    def _failed(self, line: _Line) -> None:
        with self._lock:
            wait_s = min(_WAIT_S[1], _WAIT_S[0] * 2.0 ** min(line.failures, _DOUBLINGS))
            line.failures += 1
            line.next_try = time.monotonic() + wait_s
            line.link, line.opening, line.waiting = None, False, []

    def _ended(self, worker: str, line: _Line, link: Link, why: str) -> None:
        with self._lock:
            if line.link is link:
                line.link = None
        if not self._closed.is_set():
            log.info("the link to worker %s ended: %s", worker, why)
            if not line.dropped:
                self._on_disconnected(worker)
