"""OpenTelemetry spans of a real worker, as a collector gets them: what they tell, and what not."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_pem_x509_certificate

from backends.he.mlwe_worker import MlweWorker
from backends.he.store import WorkerPart
from backends.net.devices import OneDevice
from backends.net.serving import serving
from backends.net.tls import Tls, identity
from benchmarks.load.made import make_place
from benchmarks.load.owners import owners_at, work_all
from protocol.events import MultiplyCiphertext
from scenarios.worker.__main__ import parsed

pytest.importorskip("opentelemetry.sdk")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """(address, what was sent to it): takes OTLP over HTTP."""
    taken: list[bytes] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", taken
    server.shutdown()
    server.server_close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the log of the process."""
    lines: list[str] = []

    class Saying(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger(), "handlers", [Saying()])
    return lines


def spans_in(bodies: list[bytes]) -> list[Any]:
    """Every span, decoded."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            found += [span for scope in resource.scope_spans for span in scope.spans]
    return found


def test_a_request_is_a_span_and_its_product_one_within(
    tmp_path: Path, collector: tuple[str, list[bytes]], said: list[str]
) -> None:
    """Two owners of eight matrices; nothing says which of them asked."""
    from backends.net.spans import Spans

    endpoint, taken = collector
    make_place(tmp_path, 64, 2, 2)
    part = WorkerPart.open(tmp_path / "model")
    spans = Spans(part.catalogue, endpoint)
    devices = OneDevice.holding(part, MlweWorker())
    with serving(
        devices, "localhost", 0, Tls(tmp_path / "worker"), hooks=spans.hooks
    ) as service:  # fmt: skip
        worker = f"localhost:{service.port}"
        with owners_at(tmp_path, worker, ["owner0", "owner1"], 2) as owners:
            work_all(owners, rounds=1)
            names = [owner.name for owner in owners]
    spans.close()
    found = spans_in(taken)
    requests = {span.span_id: span for span in found if span.name == "request"}
    products = [span for span in found if span.name == "product"]
    assert len(requests) == 2 * len(part.catalogue.matrices) + 2  # and one each to be welcomed
    assert sorted(span.parent_span_id for span in products) == sorted(requests)
    for span in products:
        outer = requests[span.parent_span_id]
        assert outer.start_time_unix_nano <= span.start_time_unix_nano + 1_000_000
        assert span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano <= outer.end_time_unix_nano + 1_000_000
        told = {attribute.key for attribute in (*outer.attributes, *span.attributes)}
        assert told == {"matrix", "tokens"}
    whose = [
        identity(load_pem_x509_certificate((tmp_path / name / "cert.pem").read_bytes()))
        for name in names
    ]
    assert not said
    assert all(whose)
    assert not any(name.encode() in body for name in whose for body in taken)


@pytest.mark.parametrize("there", [False, True])
def test_a_collector_that_does_not_answer_costs_a_line_and_seconds(
    there: bool, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody there, or one that takes connections and says nothing; more spans than are kept."""
    from backends.net import spans

    monkeypatch.setattr(spans, "_GOODBYE_S", 0.3)
    make_place(tmp_path, 64, 2, 0)
    catalogue = WorkerPart.open(tmp_path / "model").catalogue
    with socket.create_server(("127.0.0.1", 0)) as taking:
        port = taking.getsockname()[1]
        if not there:
            taking.close()
        away = spans.Spans(catalogue, f"http://127.0.0.1:{port}/v1/traces")
        for task in range(3000):
            away._begin(task, MultiplyCiphertext(0, 1, b""))
            away._end(task, done=True)
        logging.getLogger("opentelemetry.sdk").warning("Queue full, dropping Span.")
        begun = time.monotonic()
        away.close()
        assert time.monotonic() - begun < 2.0
    (line,) = said
    assert line.startswith(f"spans for http://127.0.0.1:{port}/v1/traces are lost: ")


@pytest.mark.parametrize("text", ["collector:4318", "ftp://collector/v1", "http://", "/v1/traces"])
def test_what_is_no_collector_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["worker", "--model", "m", "--traces", text])
    with pytest.raises(SystemExit):
        parsed()
    assert "is no address like http://HOST:4318/v1/traces" in capsys.readouterr().err
