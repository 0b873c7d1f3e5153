"""HTTP on loopback: only who has the key, never a page of a browser, and nothing without bound."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from backends.errors import UserError
from backends.files import read_bounded, require_own, write_secret
from scenarios.endpoint.address import EndpointError
from scenarios.endpoint.fields import RequestError
from scenarios.endpoint.futures import Answer
from scenarios.endpoint.service import Service

BODY_BYTES_MAX = 8 << 20
"""The client is told to send chunks of 2 MB."""
PROTO = "application/x-protobuf"
_JSON = "application/json"
_KEY_PREFIX = "tml-"
"""What the client demands of a key."""
_KEY_LETTERS_LEAST = 24
CONNECTIONS_MAX = 256
FIRST_S = 10.0
"""From a connection to the end of its first request with the key."""
_SILENT_S = 75.0
"""From an answer to the end of the next request: clients keep connections for a while."""
_ROOM_S = 1.0
_STRANGERS = (401, 403)
"""What is answered to whoever has not the key, or is a page."""


def api_key(file: Path | None) -> str:
    """A new key; or the one in a file, which is made when it is not there.

    Raises EndpointError for a file that others can read, or that holds no key.
    """
    fresh = _KEY_PREFIX + secrets.token_urlsafe(32)
    if file is None:
        return fresh
    try:
        if not file.exists():
            write_secret(file, fresh.encode() + b"\n")
        require_own(file)
        if file.stat().st_mode & 0o077:
            raise PermissionError(f"others may read it; chmod 600 {file}")
        found = read_bounded(file, 1000).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EndpointError(f"the key's file {file}: {error}") from error
    if not found.startswith(_KEY_PREFIX) or len(found) < _KEY_LETTERS_LEAST or " " in found:
        raise EndpointError(
            f"{file} holds no key: {_KEY_PREFIX!r} and at least {_KEY_LETTERS_LEAST} letters in "
            "all; delete it, and a new one is made"
        )
    return found


@dataclass(frozen=True)
class _Wait:
    until: float
    known: bool


def _end(connection: socket.socket) -> None:
    """Wake the thread that reads it, which then closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    """A service under an address."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, key: str) -> None:
        host = address[0]
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.service, self.key = service, key.encode()
        self._room = threading.Semaphore(CONNECTIONS_MAX)
        self._waits: dict[socket.socket, _Wait] = {}
        self._lock = threading.Lock()
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise EndpointError(
                f"cannot listen on {host}, port {address[1]}: {error.strerror or error}; end what "
                "listens there, or choose another --listen"
            ) from error
        self.port: int = self.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        self.hosts = {f"{h}:{self.port}" for h in (shown, "127.0.0.1", "localhost", "[::1]")}

    def server_bind(self) -> None:
        """Without asking a resolver for this machine's name, as http.server does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more connection; of those that have not shown the key, the oldest makes room."""
        if not self._room.acquire(blocking=False):
            self._end_one()
            if not self._room.acquire(timeout=_ROOM_S):
                self.shutdown_request(request)
                return
        self.await_request(request, FIRST_S, known=False)
        super().process_request(request, client_address)

    def _end_one(self) -> None:
        with self._lock:
            oldest = next((one for one, wait in self._waits.items() if not wait.known), None)
            if oldest is not None:
                _end(oldest)

    def await_request(self, connection: socket.socket, seconds: float, known: bool) -> None:
        """End this connection unless a whole request comes in so long a time.

        known  whether it has shown the key
        """
        with self._lock:
            self._waits[connection] = _Wait(time.monotonic() + seconds, known)

    def came(self, connection: socket.socket) -> None:
        """A whole request did."""
        with self._lock:
            self._waits.pop(connection, None)

    def service_actions(self) -> None:
        """Between connections, several times a second: end those whose time is over."""
        now = time.monotonic()
        with self._lock:
            for connection, wait in self._waits.items():
                if now > wait.until:
                    _end(connection)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.came(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke: the client comes again. Nothing is printed of what was in it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _SILENT_S
    server: Server
    server_version, sys_version = "private-lora", ""

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        try:
            self._require_allowed()
            body = self._body()
            self.server.came(self.connection)
            status, answer = self.server.service.answer(self.command, self.path, body)
        except RequestError as error:
            # Of a body that was not read, the next request would be made.
            unread = error.status in (*_STRANGERS, 411, 413, 415)
            self.close_connection = self.close_connection or unread
            status, answer = error.status, {"error": str(error), "category": "user"}
        except UserError as error:
            status, answer = 400, {"error": " ".join(str(error).split()), "category": "user"}
        self._reply(status, answer)
        if status not in _STRANGERS:
            self.server.await_request(self.connection, _SILENT_S, known=True)

    def _require_allowed(self) -> None:
        """A page in a browser of this machine names another host, or its origin; other users of
        this machine do not know the key."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise RequestError("this endpoint is asked by the name of this machine only", 403)
        if any(name in self.headers for name in ("Origin", "Sec-Fetch-Site", "Referer")):
            raise RequestError("this endpoint is not for browsers", 403)
        given = self.headers.get("X-API-Key", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.server.key):
            raise RequestError(
                "another API key: set TINKER_API_KEY to the one that this endpoint printed", 401
            )

    def _body(self) -> bytes:
        if self.command == "GET":
            return b""
        size = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (size.isascii() and size.isdigit()):
            raise RequestError("a request needs its Content-Length", 411)
        if len(size) > 12 or int(size) > BODY_BYTES_MAX:
            raise RequestError(f"a request has at most {BODY_BYTES_MAX >> 20} MB", 413)
        binary = self.path == "/api/v1/forward_backward"
        kind = self.headers.get_content_type()
        if kind != (PROTO if binary else _JSON) or "Content-Encoding" in self.headers:
            raise RequestError(f"this call takes {PROTO if binary else _JSON}, not encoded", 415)
        body = self.rfile.read(int(size))
        if len(body) < int(size):
            self.close_connection = True
            raise RequestError("a request that was cut")
        return body

    def _reply(self, status: int, answer: Answer) -> None:
        binary = isinstance(answer, bytes)
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", PROTO if binary else _JSON)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the client's own form."""
        self.close_connection = True
        self._reply(code, {"error": "no request that this endpoint takes", "category": "user"})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: lines of a log tell of private data."""


@contextmanager
def serving(server: Server) -> Iterator[None]:
    """Within the `with` the server answers, in threads of its own."""
    thread = threading.Thread(
        target=server.serve_forever, args=(0.2,), name="endpoint", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
