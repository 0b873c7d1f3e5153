"""Two kinds of mistake: the peer's and our own."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer sent what the protocol forbids. Never raised for anything we did."""


class MisuseError(Exception):
    """The local driver broke a rule of the machine's interface. A bug on this side."""
