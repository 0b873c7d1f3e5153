"""TCP with mutual TLS 1.3 between owners and workers: who may speak, and who it is.

    DIR/ca.pem      whom this side believes
    DIR/cert.pem    this side's certificate, and what leads from it to the other side's ca.pem
    DIR/key.pem     its key, without a passphrase, readable by its owner only

Each side shows a certificate and checks the other's; an owner checks the worker's host name, too.
Nothing else is spoken: no older TLS, no session tickets. A side is told apart by its public key,
not by its address. Without TLS (for measuring, and for tests) only loopback is dialled or listened
on.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backends.errors import UserError
from backends.files import read_bounded

HANDSHAKE_S = 10.0
"""Seconds for TLS and the preface together: who is slower is turned away."""
_KEEPALIVE_S = 30
_DEAD_S = 60
"""Without any sign of life from the other side's kernel for so long, a connection is lost."""
# Magic, version, who writes, zero, the link's number.
_PREFACE = struct.Struct("<4sBBH16s")
_PREFACE_MAGIC = b"PLNK"
_PREFACE_VERSION = 1
OWNER_WRITES, WORKER_WRITES = 0, 1
# <openssl/x509_vfy.h>
_NOT_YET, _EXPIRED, _OTHER_HOST = 9, 10, (62, 64)
_CERTIFICATE_BYTES = 1 << 20
TAKEN, FULL = b"\x01", b"\x00"
"""What the listening side answers to a preface."""


class CertificateError(UserError, ValueError):
    """Certificates are missing, unusable or not believed; the text says which and what to do."""


@dataclass(frozen=True)
class Tls:
    """The directory with this side's certificates, looked at once.

    Raises CertificateError when something is missing, unusable, or readable by others.
    """

    directory: Path

    def __post_init__(self) -> None:
        for name in ("ca.pem", "cert.pem", "key.pem"):
            if not (self.directory / name).is_file():
                raise CertificateError(
                    f"{self.directory} has no {name}; `python -m scenarios.certs` makes "
                    "certificates for a first try"
                )
        if (self.directory / "key.pem").stat().st_mode & 0o077:
            raise CertificateError(
                f"{self.directory / 'key.pem'} can be read by other users; chmod 600 it"
            )
        self.context(server=False)

    def require_current(self) -> datetime:
        """When this side's certificate ends. Raises CertificateError unless it is good now."""
        path = self.directory / "cert.pem"
        try:
            certificate = certificate_in(path)
            begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        except (ValueError, OSError) as error:
            raise CertificateError(f"{path} cannot be read: {error}") from error
        now = datetime.now(timezone.utc)
        if now > end:
            raise CertificateError(
                f"{path} has expired, on {end:%Y-%m-%d}: nobody believes it any more; make new "
                "ones for both sides (`python -m scenarios.certs`) or have your authority renew it"
            )
        if now < begin:
            raise CertificateError(
                f"{path} is good from {begin:%Y-%m-%d %H:%M} UTC on, and here it is "
                f"{now:%Y-%m-%d %H:%M}: look at this machine's clock"
            )
        return end

    def context(self, server: bool) -> ssl.SSLContext:
        """A fresh context for one role."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = not server
        # Only the names it lists: what a certificate calls its holder is no host.
        context.hostname_checks_common_name = False
        if server:
            context.num_tickets = 0
        try:
            context.load_verify_locations(self.directory / "ca.pem")
            context.load_cert_chain(
                self.directory / "cert.pem", self.directory / "key.pem", password=_no_passphrase
            )
        except (ssl.SSLError, OSError, ValueError) as error:
            raise CertificateError(
                f"the certificates in {self.directory} cannot be used ({error}); "
                "`python -m scenarios.certs` makes new ones"
            ) from error
        return context


def _no_passphrase() -> str:
    raise ValueError("key.pem has a passphrase, which nobody could type here")


def identity_of(connection: ssl.SSLSocket) -> str:
    """`identity` of the key that the other side has proved to hold."""
    certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None  # CERT_REQUIRED
    return identity(x509.load_der_x509_certificate(certificate))


def certificate_in(path: Path) -> x509.Certificate:
    """The certificate in a PEM file. Raises OSError and ValueError where there is none."""
    return x509.load_pem_x509_certificate(read_bounded(path, _CERTIFICATE_BYTES))


def identity_in(path: Path) -> str:
    """`identity` of the certificate in a PEM file. Raises CertificateError when it is none."""
    try:
        return identity(certificate_in(path))
    except OSError as error:
        raise CertificateError(
            f"no certificate can be read from {path}: {error.strerror or error}"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"{path} is no certificate in PEM; name an owner's cert.pem"
        ) from error


def identity(certificate: x509.Certificate) -> str:
    """64 hex digits: SHA-256 of a certificate's public key."""
    key = certificate.public_key()
    raw = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(raw).hexdigest()


def require_loopback(host: str) -> None:
    """Raise CertificateError unless a host can only mean this machine: all else needs TLS."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise CertificateError(
            f"{host} is not this machine: a line that leaves it needs TLS on both sides (--tls "
            "DIR; `python -m scenarios.certs` makes certificates for a first try)"
        )


def tune(connection: socket.socket) -> None:
    """No waiting for more to send; and a line that is dead, or that somebody cut, is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_S), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * _DEAD_S),
    ):  # fmt: skip
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def preface(direction: int, number: bytes) -> bytes:
    """What the dialling side says first on each connection."""
    return _PREFACE.pack(_PREFACE_MAGIC, _PREFACE_VERSION, direction, 0, number)


def read_preface(connection: Any, until: float) -> tuple[int, bytes]:
    """(direction, link's number) of a connection that was just opened.

    until  by when it must have come, of `time.monotonic`

    Raises OSError when it is no preface, or does not come.
    """
    raw = b""
    while len(raw) < _PREFACE.size:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no preface in time")
        connection.settimeout(left_s)
        more = connection.recv(_PREFACE.size - len(raw))
        if not more:
            raise ConnectionError("closed before its preface")
        raw += more
    magic, version, direction, zero, number = _PREFACE.unpack(raw)
    right = (magic, version, zero) == (_PREFACE_MAGIC, _PREFACE_VERSION, 0)
    if not right or direction not in (OWNER_WRITES, WORKER_WRITES):
        raise ConnectionError("not a link of this protocol")
    return direction, number


def dial(host: str, port: int, tls: Tls | None) -> tuple[Any, Any, str]:
    """(incoming, outgoing, identity): the two connections of one link to a worker.

    Raises CertificateError when this side does not believe the other, OSError when nobody answers,
    the other side does not believe this one, or the line fails.
    """
    if tls is None:
        require_loopback(host)
    number, made, identities = secrets.token_bytes(16), [], set()
    try:
        for direction in (WORKER_WRITES, OWNER_WRITES):
            connection: Any = socket.create_connection((host, port), HANDSHAKE_S)
            made.append(connection)
            tune(connection)
            if tls is not None:
                connection = made[-1] = _shake_hands(connection, host, port, tls)
                identities.add(identity_of(connection))
            connection.sendall(preface(direction, number))
            _require_taken(connection, host, port, tls)
        if len(identities) > 1:
            raise CertificateError(f"{host}:{port} answers with two identities")
        for connection in made:
            connection.settimeout(None)
    except BaseException:
        for connection in made:
            connection.close()
        raise
    return made[0], made[1], identities.pop() if identities else f"{host}:{port}"


def _require_taken(connection: Any, host: str, port: int, tls: Tls | None) -> None:
    try:
        answer = connection.recv(1)
    except ssl.SSLError as error:
        # In TLS 1.3 this side has finished before the other looks at its certificate.
        if tls is None or "ALERT" not in str(error.reason):
            raise
        raise CertificateError(
            f"{host}:{port} does not believe {tls.directory / 'cert.pem'} ({error.reason}): it "
            "must be signed by an authority in the worker's ca.pem, and be valid now"
        ) from error
    if answer == FULL:
        raise ConnectionError(f"{host}:{port} has as many links as it takes")
    if answer != TAKEN:
        hint = "" if tls else "; it may speak TLS only (--tls DIR)"
        raise ConnectionError(f"{host}:{port} closed the connection{hint}")


def _shake_hands(raw: socket.socket, host: str, port: int, tls: Tls) -> ssl.SSLSocket:
    try:
        return tls.context(server=False).wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"{host}:{port} is not believed: {_unbelieved(error, host, tls)}"
        ) from error


def _unbelieved(error: ssl.SSLCertVerificationError, host: str, tls: Tls) -> str:
    """What is wrong with the other side's certificate, and what to do."""
    if error.verify_code == _EXPIRED:
        return "its certificate has expired; make new ones for both sides, or have it renewed"
    if error.verify_code == _NOT_YET:
        return "its certificate is not good yet; look at both machines' clocks"
    if error.verify_code in _OTHER_HOST:
        return (
            f"its certificate is for another host and does not name {host!r}; dial it by a name "
            f"that it has, or make one with `python -m scenarios.certs --name {host}`"
        )
    return f"{error.verify_message}; its certificate must be signed by {tls.directory / 'ca.pem'}"
