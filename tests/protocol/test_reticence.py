"""What is private stays out of texts: no event, effect, message or call shows it when printed."""

from __future__ import annotations

from dataclasses import fields

import pytest

from protocol import events
from protocol.messages import LocalFrame, Multiply, Product
from protocol.owner_memory import Call

ID = bytes(16)


class Private:
    """Must not be asked for its text."""

    def __repr__(self) -> str:
        raise AssertionError("a private value was printed")


IT = Private()
BYTES = b"private-private-private"
HOLDERS = (
    events.LinearWanted(1, 0, 1, IT),
    events.TaskDone(1, IT),
    events.Deliver(1, IT),
    events.Discard(1, IT),
    events.Encrypt(0, 1, IT),
    events.Decrypt(0, 1, IT, BYTES),
    events.MultiplyCiphertext(0, 1, BYTES),
    events.FrameArrived("w", BYTES),
    events.Send("w", BYTES),
    Multiply(ID, 1, 0, 1, BYTES),
    Product(ID, 1, BYTES),
    LocalFrame(b"head", BYTES),
)


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: type(holder).__name__)
def test_private_values_are_not_printed(holder: object) -> None:
    """Nor ciphertext, whose bytes would fill a log."""
    assert "private" not in repr(holder)
    assert "private" not in repr(events.RunTask(1, holder))  # type: ignore[arg-type]


def test_a_call_does_not_print_what_it_keeps() -> None:
    """Frame and secrets."""
    given = {"id": 1, "matrix": 0, "tokens": 1, "size": 4}
    wanted = {field.name for field in fields(Call)}
    call = Call(**{name: value for name, value in given.items() if name in wanted})
    call.frame, call.sealed = BYTES, IT
    assert "private" not in repr(call)
