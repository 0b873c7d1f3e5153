"""A worker's status over plain HTTP: /metrics for Prometheus, /healthz and /readyz for whoever
starts and stops workers.

Written on the standard library's server: a dozen numbers in a text format of two kinds of line are
less than another package to trust on every worker. It answers GET of these three paths and nothing
else, reads no body, and is slow for nobody: few connections, and little time for each.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from backends.net.counts import Counts

_CONNECTIONS = 8
_PATIENCE_S = 5.0
"""For a whole connection."""
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._room = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of this machine's name, which may take seconds."""
        super(HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handler's own time-out begins anew with every byte.
        late = threading.Timer(_PATIENCE_S, _hang_up, (request,))
        late.daemon = True
        try:
            late.start()
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's concern."""


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class StatusPages:
    """Serves the three pages until `close`.

    host, port  where; port 0 takes any free one
    counts      what /metrics shows
    ready       whether new requests are taken: /readyz says 200 or 503
    healthy     whether it works at all: /healthz says 200 or 503

    Raises OSError when the address cannot be had.
    """

    def __init__(
        self, host: str, port: int, counts: Counts, ready: Callable[[], bool],
        healthy: Callable[[], bool],
    ) -> None:  # fmt: skip
        def page(path: str) -> tuple[int, str, str]:
            if path == "/metrics":
                return 200, _METRICS, counts.exposition(ready())
            if path in ("/healthz", "/readyz"):
                good = healthy() if path == "/healthz" else ready()
                return (200, _TEXT, "ok\n") if good else (503, _TEXT, "not now\n")
            return 404, _TEXT, "/metrics, /healthz or /readyz\n"

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE_S
            server_version, sys_version = "private-lora-worker", ""

            def do_GET(self) -> None:
                status, kind, text = page(self.path.partition("?")[0])
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Who looks, and how often, is not worth a line."""

        self._server = _Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="status-pages",
            daemon=True,
        )  # fmt: skip
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()
