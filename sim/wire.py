"""What it costs a core to send or take a byte over TLS: measured on this machine, for a profile.

Both ends are in this process, joined by loopback, and do with a connection what the real transport
does. Time on the wire does not count: it is the processor time of both ends, halved.
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

_FRAME_BYTES = 2 << 20
_FRAMES = 24
_READ_BYTES = 1 << 20


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
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    here, there = _connected()
    frame, size = secrets.token_bytes(_FRAME_BYTES), _FRAMES * _FRAME_BYTES
    arrived = memoryview(bytearray(_FRAME_BYTES))

    def take() -> None:
        """As the real link reads: into place, one record after the other."""
        got = 0
        while got < size:
            place = got % _FRAME_BYTES
            more = there.recv_into(arrived[place : place + _READ_BYTES])
            if not more:
                raise ConnectionError("the loopback connection ended early")
            got += more

    start = time.process_time()
    with here, there:
        taking = threading.Thread(target=take)
        taking.start()
        for _ in range(_FRAMES):
            here.sendall(frame)
        taking.join()
    return 2 * size / (time.process_time() - start)
