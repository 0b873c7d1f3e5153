"""Where recipes find the endpoint: on this machine, and nowhere else."""

from __future__ import annotations

from backends.errors import UserError
from backends.net.addresses import AddressError, address_of
from backends.net.tls import CertificateError, require_loopback


class EndpointError(UserError, ValueError):
    """The endpoint cannot be started so; the text says what to do."""


def listen_address(text: str) -> tuple[str, int]:
    """(host, port) of an address on this machine; port 0 is any free one.

    Raises EndpointError for every other: whoever reaches the endpoint has all that is private.
    """
    try:
        host, port = address_of(text, 0)
        require_loopback(host)
    except AddressError:
        raise EndpointError(f"{text!r} is no address; it looks like 127.0.0.1:8420") from None
    except CertificateError:
        raise EndpointError(
            f"{text!r} can be reached from elsewhere, and what comes in here is private text: "
            "listen on 127.0.0.1, [::1] or localhost, and run the recipe on this machine"
        ) from None
    # A name may stand for two addresses, of which somebody else could have the other one.
    return "127.0.0.1" if host == "localhost" else host, port
