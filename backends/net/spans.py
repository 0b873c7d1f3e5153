"""OpenTelemetry traces of a worker: a span for each request, and in it one for its product.

They say which matrix, how many tokens and when, and nothing about whose it was: see `counts.py`.
Nothing this module imports can hold a secret; a test walks its imports.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from backends.net.loop import Hooks
from protocol.catalogue import Catalogue
from protocol.events import Effect, Event, MultiplyCiphertext, RunTask, Task, TaskDone, TaskFailed

log = logging.getLogger(__name__)

_SERVICE = "private-lora-worker"
_GOODBYE_S = 3.0
"""For what has not been sent, in the end. OpenTelemetry itself would try for half a minute."""
_MINUTE_S = 60.0


class _Complaints(logging.Handler):
    """What OpenTelemetry complains of, a line a minute: it has one for each batch, and one for each
    span that it drops, so that owners would fill the log of a worker whose collector is away."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._where = endpoint
        self._said_s = -_MINUTE_S

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._said_s >= _MINUTE_S:
            self._said_s, why = now, record.getMessage()
            log.warning("spans for %s are lost: %s", self._where, why)


@dataclass
class _Request:
    """One that is in hand. span: from its arrival on."""

    span: Any
    matrix: str


class Spans:
    """Sends spans to a collector, in the background and in batches, until it is closed.

    endpoint  where OTLP over HTTP is taken, as http://collector:4318/v1/traces

    One that does not answer costs the worker a line a minute in its log, and seconds at its end.
    """

    def __init__(self, catalogue: Catalogue, endpoint: str) -> None:
        self._names = [matrix.name for matrix in catalogue.matrices]
        complaints = logging.getLogger("opentelemetry")
        complaints.handlers, complaints.propagate = [_Complaints(endpoint)], False
        self._exporter: Any = OTLPSpanExporter(endpoint)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": _SERVICE}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(_SERVICE)
        self._in_hand: dict[int, _Request] = {}
        self._lock = threading.Lock()

    @property
    def hooks(self) -> Hooks:
        """For `serving`."""
        return Hooks(observe=self._observe, on_task=self._computed)

    def close(self) -> None:
        """Send what has not been sent, as far as that takes seconds."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_GOODBYE_S)
        if last.is_alive():
            self._exporter.shutdown()  # which tries no further

    def _observe(self, event: Event, effects: Sequence[Effect]) -> None:
        with self._lock:
            for effect in effects:
                if isinstance(effect, RunTask):
                    assert isinstance(effect.work, MultiplyCiphertext)
                    self._begin(effect.task, effect.work)
            if isinstance(event, TaskDone | TaskFailed):
                self._end(event.task, isinstance(event, TaskDone))

    def _begin(self, task: int, work: MultiplyCiphertext) -> None:
        matrix = self._names[work.matrix]
        span = self._tracer.start_span(
            "request", attributes={"matrix": matrix, "tokens": work.tokens}
        )
        self._in_hand[task] = _Request(span, matrix)

    def _end(self, task: int, done: bool) -> None:
        request = self._in_hand.pop(task, None)
        if request is not None:
            request.span.set_status(Status(StatusCode.OK if done else StatusCode.ERROR))
            request.span.end()

    def _computed(self, task: int, work: Task, started: float, ended: float) -> None:
        """A product, of this request and maybe of others; told before the request has ended."""
        with self._lock:
            request = self._in_hand.get(task)
        if request is None:
            return
        offset_ns = time.time_ns() - time.perf_counter_ns()
        product = self._tracer.start_span(
            "product",
            set_span_in_context(request.span),
            start_time=round(1e9 * started) + offset_ns,
        )
        product.end(round(1e9 * ended) + offset_ns)
