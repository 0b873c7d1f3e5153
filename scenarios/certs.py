"""Make a certificate authority and certificates for a first try of a worker on another machine.

    python -m scenarios.certs --out certs --name gpu.example --name 203.0.113.7
    python -m scenarios.certs --check certs/worker --name gpu.example

    certs/owner/     for the owner's machine: --tls certs/owner
    certs/worker/    for the worker's machine: --tls certs/worker

Each folder has ca.pem (whom to believe), cert.pem and key.pem; copy each to its machine and nowhere
else, and let nobody but you read key.pem (chmod 600; who uses it refuses one that others can read).
Both sides believe only certificates that this authority has signed, and its key is thrown away as
soon as it has signed them, so that there are no more of them. Name every host name and address that
the owner will use for the worker: what is dialled by another name is not believed. They are good
for a year (--days).

A worker for many owners tells them apart by their certificates, so give each one of its own, by
--owner. With --authority the key that signs is kept in a folder, for owners and workers that come
later; made is then what is named, and nothing else:

    python -m scenarios.certs --authority authority --name gpu.example --owner ann --owner bob
    python -m scenarios.certs --authority authority --owner carol                        later
    python -m scenarios.certs --authority authority --out gpu-b --name gpu-b.example

Whoever has that folder decides who may use the worker, and who may pose as it: it goes nowhere.

--check says what a folder's certificate is: whose, for which names, until when, and its identity,
by which logs and the list of caught workers name this side. It fails, saying why, where a
connection would.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backends.errors import UserError
from backends.files import remove_directory, replacing_directory
from backends.net.tls import CertificateError, Tls, certificate_in, identity
from backends.options import ALL, Modes, Parser, Whole, place
from backends.places import output_directory
from scenarios.cli import clean_exit

_DAYS = 365
_PEM = serialization.Encoding.PEM
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")

MODES = Modes(
    {"making": "making certificates (without --check)"},
    lambda args: ("making",) if args.check is None else (),
    dict.fromkeys(("--out", "--days", "--owner", "--authority"), ("making",))
    | dict.fromkeys(("--name", "--worker", "--check"), ALL),
)


class OutError(UserError):
    """There is something already where the certificates would go."""


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class HostError(UserError):
    """A worker's name that no certificate can have."""


class Authority:
    """A certificate authority; its key lives as long as this object, or in a folder.

    days       its certificates are good from now on
    directory  where its key is kept, found or made there; None forgets it

    Raises CertificateError for one that is there and cannot be used.
    """

    def __init__(self, days: float = _DAYS, directory: Path | None = None) -> None:
        self._name = _name("private-lora authority")
        now = datetime.now(timezone.utc)
        self._span = now - timedelta(days=1), now + timedelta(days=days)
        if directory is not None and directory.exists():
            self._key, self.certificate = _kept(directory)
            self._name = self.certificate.subject
            self._span = self._span[0], min(self._span[1], self.certificate.not_valid_after_utc)
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        if directory is not None:
            with replacing_directory(directory) as aside:
                _write(aside, {"ca.pem": self.certificate.public_bytes(_PEM),
                               "key.pem": _secret(self._key)})  # fmt: skip

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
        with replacing_directory(directory) as aside:
            _write(aside, {"ca.pem": self.certificate.public_bytes(_PEM),
                           "cert.pem": signed.public_bytes(_PEM),
                           "key.pem": _secret(key)})  # fmt: skip


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(_PEM, form, serialization.NoEncryption())


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """For this user's eyes only, from the first byte on."""
    directory.chmod(0o700)
    for name, content in files.items():
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def _kept(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """An authority's key and certificate. Raises CertificateError."""
    path = directory / "key.pem"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        certificate = certificate_in(directory / "ca.pem")
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(
            f"{directory} holds no authority of `python -m scenarios.certs --authority` "
            f"({error}); choose another folder"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise CertificateError(f"{directory}: key.pem is not the key of ca.pem")
    if path.stat().st_mode & 0o077:
        raise CertificateError(f"{path} can be read by other users; chmod 600 it")
    if certificate.not_valid_after_utc < datetime.now(timezone.utc):
        raise CertificateError(
            f"{directory} has expired, on {certificate.not_valid_after_utc:%Y-%m-%d}; make another "
            "authority, and new certificates for all sides"
        )
    return key, certificate


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs, crl_sign=signs,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def host_name(text: str) -> str:
    """A host name or an address that a certificate can have, for an option's type."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no host name or address: give it as gpu.example or 203.0.113.7, without "
            "a port"
        )
    return text.removesuffix(".")


def check(directory: Path, hosts: Sequence[str]) -> str:
    """What a side's certificate is.

    hosts  names that it must have

    Raises CertificateError when it cannot be used now, HostError when it lacks one of the names.
    """
    end = Tls(directory).require_current()
    certificate = certificate_in(directory / "cert.pem")
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(name.value) for name in found]
    except x509.ExtensionNotFound:
        names = []
    except ValueError as error:
        raise CertificateError(f"{directory / 'cert.pem'} cannot be read: {error}") from error
    missing = [host for host in hosts if host not in names]
    if missing:
        named = ", ".join(names) or "no host at all, as an owner's does"
        raise HostError(
            f"{directory / 'cert.pem'} does not name {missing[0]}: it names {named}; make one with "
            f"--name {missing[0]}"
        )
    who = f"a worker at {', '.join(names)}" if names else "an owner"
    left = (end - datetime.now(timezone.utc)).days
    return (
        f"{directory}: {who}\n    good until {end:%Y-%m-%d}, {left} days from now\n"
        f"    identity {identity(certificate)}"
    )


def owner_name(text: str) -> str:
    """What an owner's folder is called, for an option's type."""
    if not _LABEL.fullmatch(text) or text == "worker":
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be an owner's folder: give it letters, digits, - and _, as ann"
        )
    return text


def make(
    out: Path, hosts: Sequence[str], days: int, owners: Sequence[str] = ("owner",),
    kept: Path | None = None,
) -> str:  # fmt: skip
    """Make an authority and certificates; what to do with them.

    hosts   names of the worker; without any none is made for one
    owners  folders of owners
    kept    where the authority is found, or kept

    Raises OutError where there is something already, CertificateError for an authority that cannot
    be used.
    """
    sides = [*dict.fromkeys(owners), *(["worker"] if hosts else [])]
    for side in sides:
        if (out / side).exists():
            raise OutError(f"{out / side} is there already; choose another --out")
    authority = Authority(days, kept)
    made: list[str] = []
    try:
        for side in sides:
            authority.issue(out / side, hosts if side == "worker" else ())
            made.append(side)
    except BaseException:  # half of it would be in the way of another try
        for side in made:
            remove_directory(out / side)
        raise
    told = [check(out / side, hosts if side == "worker" else []) for side in sides]
    if "owner" in owners:
        told.append(f"The owner's stays here (--tls {out / 'owner'}).")
    told += [f"To {name} alone: {out / name}" for name in dict.fromkeys(owners) if name != "owner"]
    if hosts:
        there = (
            f"umask 077 && mkdir -p {shlex.quote(out.name)} && tar -C {shlex.quote(out.name)} -x"
        )
        told.append("The worker's goes to its machine, and from here:")
        told.append(f"    tar -C {shlex.quote(str(out))} -c worker | ssh {hosts[0]} '{there}'")
        told.append(f"    rm -r {shlex.quote(str(out / 'worker'))}")
    if kept is not None:
        told.append(f"Who has {kept} can sign more of them: it goes nowhere.")
    return "\n".join(told)


def main() -> None:
    parser = Parser(__doc__, "scenarios.certs", MODES)
    parser.add_argument("--out", type=output_directory, help="where to (certs)")
    parser.add_argument(
        "--name", "--worker", action="append", metavar="HOST", type=host_name, default=[],
        help="a name or address of the worker (several times; localhost and 127.0.0.1 without any)",
    )  # fmt: skip
    days = Whole(1, 3650)
    parser.add_argument("--days", type=days, default=_DAYS, help="they are good for (365)")
    parser.add_argument(
        "--check", type=place, metavar="DIR", help="make nothing; look at a side's certificate"
    )
    parser.add_argument(
        "--owner", action="append", metavar="NAME", type=owner_name, default=[],
        help="an owner's folder (several times: an owner each; `owner` without any)",
    )  # fmt: skip
    parser.add_argument(
        "--authority", type=output_directory, metavar="DIR",
        help="keep the key that signs in DIR, or sign with the one that is there",
    )  # fmt: skip
    args = parser.parse()
    with clean_exit():
        if args.check is not None:
            print(check(args.check, args.name))
        else:
            out = args.out or output_directory("certs")
            hosts, owners, kept = args.name, args.owner, args.authority
            if kept is None or not (hosts or owners):
                hosts, owners = hosts or ["localhost", "127.0.0.1"], owners or ["owner"]
            print(make(out, hosts, args.days, owners, kept))


if __name__ == "__main__":
    main()
