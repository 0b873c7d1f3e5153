"""A worker's log: one line an event, as text or as JSON, on standard output.

    2026-11-26T20:11:02Z listening address=0.0.0.0:7443 tls=mutual-1.3 model=1f0c...
    {"time": "2026-11-26T20:11:02Z", "event": "listening", "address": "0.0.0.0:7443", ...}

What is logged are names, reasons and counts. An owner is named by the first 16 hex digits of its
identity, the SHA-256 of its public key.
"""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from backends.net.counts import REFUSED, LineEvent

FORMATS = ("text", "json")
_MINUTE_S = 60.0
_LINES_A_MINUTE = 30
"""Of links refused, opened and ended, and of messages of a level, each. Strangers may knock, owners
come and go, ask and be refused as often as they like; the log's disk is not theirs to fill."""


_PATIENCE_MS = 500.0
_LETTERS_MAX = 500
"""Of a message: six bytes each in JSON, and all within what a pipe takes at once."""


def short(owner: str) -> str:
    """An owner as the log names it."""
    return owner[:16] or "unknown"


class EventLog:
    """Writes events. Safe to use from several threads, and in a signal handler."""

    def __init__(self, form: str, descriptor: int = 1) -> None:
        self._json = form == "json"
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._minute_s = 0.0
        self._stuck = False
        self._said, self._unsaid = Counter[str](), Counter[str]()

    def event(self, name: str, **facts: str | int | float) -> None:
        """One line. Values are names, reasons and counts, never what an owner computes with."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._json:
            line = json.dumps({"time": now, "event": name, **facts})
        else:
            line = " ".join([now, name, *(f"{key}={_plain(facts[key])}" for key in facts)])
        self._write(line.encode())

    def _write(self, line: bytes) -> None:
        """A full disk, or a reader that is gone or does not read, is no reason to serve nobody, nor
        to miss a signal: what cannot be written soon is lost, and those after it do not wait."""
        with suppress(OSError):
            room = select.poll()
            room.register(self._descriptor, select.POLLOUT)
            self._stuck = not room.poll(0.0 if self._stuck else _PATIENCE_MS)
            if not self._stuck:
                # A pipe that has any room has it for this much.
                os.write(self._descriptor, line[: select.PIPE_BUF - 1] + b"\n")

    def on_line(self, event: LineEvent) -> None:
        """What happened to a link."""
        unsaid = self._room_for(event.kind)
        if unsaid is None:
            return
        more: dict[str, str | int] = {"unsaid": unsaid} if unsaid else {}
        if event.kind != REFUSED:
            why = {"why": event.reason} if event.reason else {}
            self.event(f"link-{event.kind}", owner=short(event.owner), **why, **more)
            return
        detail = {"detail": event.detail} if event.detail else {}
        self.event("refused", owner=short(event.owner), reason=event.reason, **detail, **more)

    def message(self, level: str, text: str) -> None:
        """What a module has to say."""
        unsaid = self._room_for(f"message-{level}")
        if unsaid is not None:
            more = {"unsaid": unsaid} if unsaid else {}
            self.event("message", level=level, text=text[:_LETTERS_MAX], **more)

    def _room_for(self, kind: str) -> int | None:
        """How many of a kind were left out before this one; None when it is left out, too."""
        with self._lock:
            now = time.monotonic()
            if now - self._minute_s >= _MINUTE_S:
                self._minute_s = now
                self._said.clear()
            if self._said[kind] >= _LINES_A_MINUTE:
                self._unsaid[kind] += 1
                return None
            self._said[kind] += 1
            return self._unsaid.pop(kind, 0)


def _plain(value: Any) -> str:
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(' "=')
    return text if plain else json.dumps(text)


class _Through(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.message(record.levelname.lower(), record.getMessage())


def capture_logging(log: EventLog, level: int) -> None:
    """Have what modules log by Python's `logging` written as events too."""
    logging.basicConfig(level=level, handlers=[_Through(log)], force=True)
