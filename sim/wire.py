"""What it costs a core to send or take a byte over TLS: measured on this machine, for a profile.

Two links of the real transport, in this process, over loopback. Time on the wire does not count:
it is the processor time of both ends, halved.
"""

from __future__ import annotations

import datetime
import secrets
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from backends.net.link import Link
from backends.net.tls import tune
from protocol.messages import Multiply, encode

_FRAME_BYTES = 2 << 20
_FRAMES = 24


def _certificate(directory: Path) -> tuple[Path, Path]:
    """(certificate, key) of nobody, good for a minute."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "calibration")])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(minutes=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    found = directory / "cert.pem", directory / "key.pem"
    found[0].write_bytes(signed.public_bytes(pem))
    found[1].write_bytes(
        key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return found


def _connected() -> tuple[Any, Any]:
    """Two ends of a TLS connection over loopback."""
    with tempfile.TemporaryDirectory() as directory:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(*_certificate(Path(directory)))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server.minimum_version = client.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname())
        there, _ = listening.accept()
    for connection in (here, there):
        tune(connection)
    accepted: list[Any] = []
    accepting = threading.Thread(
        target=lambda: accepted.append(server.wrap_socket(there, server_side=True))
    )
    accepting.start()
    dialled = client.wrap_socket(here)
    accepting.join()
    return dialled, accepted[0]


def wire_rate() -> float:
    """Bytes of frames a second that one core sends or takes. Takes a tenth of a second."""
    arrived = threading.Semaphore(0)
    first, second = _connected(), _connected()
    links = [
        Link(
            f"wire-{name}", incoming, outgoing, 2 * _FRAME_BYTES,
            lambda frame: arrived.release(), lambda why: None,
        )
        for name, incoming, outgoing in (("a", second[0], first[0]), ("b", first[1], second[1]))
    ]  # fmt: skip
    frame = encode(Multiply(bytes(16), 1, 0, 1, secrets.token_bytes(_FRAME_BYTES)))
    for link in links:
        link.start()
    try:
        links[0].send(frame)
        arrived.acquire(timeout=10)
        start = time.process_time()
        for _ in range(_FRAMES):
            links[0].send(frame)
        for _ in range(_FRAMES):
            arrived.acquire(timeout=10)
        spent_s = time.process_time() - start
    finally:
        for link in links:
            link.close("measured")
    return 2 * _FRAMES * _FRAME_BYTES / spent_s
