"""Where a worker is, as people write it: "host:port"."""

from __future__ import annotations

from backends.errors import UserError


class AddressError(UserError, ValueError):
    """A worker's address cannot be understood; the text says what it looks like."""


def _can_be_asked_for(host: str) -> bool:
    """Whether a resolver takes it: labels of 1 to 63 letters, nothing that only looks like one."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return host.isprintable() and " " not in host


def address_of(text: str, least_port: int = 1) -> tuple[str, int]:
    """(host, port) of "host:port"; an IPv6 address is in brackets.

    least_port  0 allows port 0, which is any free one to whoever listens

    Raises AddressError.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    possible = host and _can_be_asked_for(host)
    if not possible or not digits or not least_port <= int(port) < 1 << 16:
        raise AddressError(f"{text!r} is no worker's address; it looks like gpu.example:7443")
    return host, int(port)
