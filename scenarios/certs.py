"""Make a certificate authority and certificates for a first try of a worker on another machine.

    python -m scenarios.certs --out certs --worker gpu.example --worker 203.0.113.7

    certs/owner/     for the owner's machine: --tls certs/owner
    certs/worker/    for the worker's machine: --tls certs/worker

Each folder has ca.pem (whom to believe), cert.pem and key.pem; copy each to its machine and nowhere
else. Both sides believe only certificates that this authority has signed, and its key is thrown
away as soon as it has signed these two: for more owners or workers, or to replace a lost key, make
new ones, or use an authority of your own. Name every host name and address that the owner will use
for the worker. They are good for a year.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backends.errors import UserError
from backends.files import replacing_directory
from scenarios.cli import clean_exit

_DAYS = 365


class OutError(UserError):
    """There is something already where the certificates would go."""


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class Authority:
    """A new certificate authority; its key lives as long as this object.

    days  its certificates are good from now on
    """

    def __init__(self, days: float = _DAYS) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("private-lora authority")
        now = datetime.now(timezone.utc)
        self._span = now - timedelta(days=1), now + timedelta(days=days)
        self.certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._span[0])
            .not_valid_after(self._span[1])
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(identifier, critical=False)
        )

    def issue(self, directory: Path, hosts: Sequence[str] = ()) -> None:
        """Write ca.pem, cert.pem and key.pem of a new side: a worker at `hosts`, or an owner."""
        key = ec.generate_private_key(ec.SECP256R1())
        role = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._builder(_name("worker" if hosts else "owner"), key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([role]), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        secret = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with replacing_directory(directory) as aside:
            aside.chmod(0o700)
            for name, content in (
                ("ca.pem", self.certificate.public_bytes(pem)),
                ("cert.pem", signed.public_bytes(pem)),
                ("key.pem", secret),
            ):
                descriptor = os.open(aside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs, crl_sign=signs,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scenarios.certs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("certs"), help="where to (certs)")
    parser.add_argument(
        "--worker", action="append", metavar="HOST", help="a name or address of the worker "
        "(several times; localhost and 127.0.0.1 without any)",
    )  # fmt: skip
    args = parser.parse_args()
    hosts = args.worker or ["localhost", "127.0.0.1"]
    with clean_exit():
        for side in ("owner", "worker"):
            if (args.out / side).exists():
                raise OutError(f"{args.out / side} is there already; choose another --out")
        authority = Authority()
        authority.issue(args.out / "owner")
        authority.issue(args.out / "worker", hosts)
    print(f"{args.out / 'owner'}: for the owner's machine (--tls)")
    print(f"{args.out / 'worker'}: for the worker at {', '.join(hosts)} (--tls)")


if __name__ == "__main__":
    main()
