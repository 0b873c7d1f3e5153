"""The same frames over gRPC, to compare with: one stream a link, raw bytes, mutual TLS.

Only `benchmarks.transport --grpc` loads this; grpcio is no dependency of the project. Synchronous
API, identity serialisers (no protobuf), a message a frame. Both sides show certificates, as ours.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

VERSION: str = grpc.__version__
_METHOD = "/private_lora.Worker/Link"
_OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20),
    ("grpc.optimization_target", "throughput"),
]  # fmt: skip


def _read(certs: Path) -> tuple[bytes, bytes, bytes]:
    ca, cert, key = (certs / f"{name}.pem" for name in ("ca", "cert", "key"))
    return ca.read_bytes(), cert.read_bytes(), key.read_bytes()


def serve(certs: Path, answer: Callable[[bytes], bytes]) -> tuple[int, Callable[[], object]]:
    """(port, close) of a server that answers every frame by `answer(frame)`."""

    def link(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for frame in frames:
            yield answer(frame)

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            if details.method == _METHOD:
                return grpc.stream_stream_rpc_method_handler(link)
            return None

    ca, cert, key = _read(certs)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=_OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return port, lambda: server.stop(0)


def dial(
    certs: Path, port: int, on_frame: Callable[[bytes], object]
) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """(send, close) of a stream to such a server; answers go to `on_frame`, on another thread."""
    ca, cert, key = _read(certs)
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    channel = grpc.secure_channel(f"localhost:{port}", credentials, options=_OPTIONS)
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers = channel.stream_stream(_METHOD)(iter(outgoing.get, None))

    def read() -> None:
        for frame in answers:
            on_frame(frame)

    reader = futures.ThreadPoolExecutor(1)
    reader.submit(read)

    def close() -> None:
        outgoing.put(None)
        reader.shutdown()
        channel.close()

    return outgoing.put, close
