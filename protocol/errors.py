"""Whose mistake: the peer's, our own, or a worker's arithmetic."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer sent what the protocol forbids. Never raised for anything we did."""


class VersionError(ProtocolError):
    """A frame of another protocol version. Its header is readable, its body is not."""

    def __init__(self, session: bytes, version: int, ours: int) -> None:
        super().__init__(f"protocol version {version}, this side speaks {ours}")
        self.session = session


class MisuseError(Exception):
    """The local driver broke a rule of the machine's interface. A bug on this side."""


class WrongAnswerError(ValueError):
    """A worker's answer is not the product it was asked for. Raised by a decryption task."""
