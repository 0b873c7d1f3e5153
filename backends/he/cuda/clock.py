"""Device time by what it was spent on: owner, copies, worker. For reports; off by default."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_UNTIMED = nullcontext()


class DeviceClock:
    """Adds up spans of a device's streams, in seconds by name.

    A span lasts from when the stream reaches its beginning to when it reaches its end, so what
    other threads queue on the same stream in between counts too: exact for one lane.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._device = device
        self._lock = threading.Lock()
        self._spans: list[tuple[str, Any, Any]] = []

    def span(self, name: str) -> AbstractContextManager[None]:
        """What is queued inside counts as `name`, while the clock is running."""
        return self._timed(name) if self.running else _UNTIMED

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        end = self._mark()
        with self._lock:
            self._spans.append((name, start, end))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def take(self) -> dict[str, float]:
        """Seconds of every name since the last `take`; waits until the device has ended them."""
        with self._lock:
            spans, self._spans = self._spans, []
        totals: dict[str, float] = {}
        for name, start, end in spans:
            if self._device.type == "cuda":
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                seconds = end - start
            totals[name] = totals.get(name, 0.0) + seconds
        return totals
