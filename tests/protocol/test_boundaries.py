"""Bounds, exact at both sides: the last that is taken, and the first that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from typing import Any

import pytest

from protocol import messages
from protocol.admission import Quota
from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import MisuseError, ProtocolError, VersionError
from protocol.events import FailCall, LinearWanted, RunTask, Send, SetTimer, TaskDone
from protocol.messages import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    Bye,
    Farewell,
    Hello,
    LocalFrame,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    announced_bytes,
    decode,
    encode,
)
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.worker import State as WorkerState
from protocol.worker import WorkerConfig
from tests.protocol.toys import (
    CATALOGUE,
    HELLO,
    MODEL,
    PARAMETERS,
    SESSION,
    OwnerDesk,
    WorkerDesk,
    all_of,
    one,
    requests,
)

ID, DIGEST = b"s" * 16, b"d" * 32
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


# --- the wire ---------------------------------------------------------------------------------

BYTES: tuple[tuple[Message, str], ...] = (
    (Hello(ID, DIGEST, b"e" * 32), "01 0000" + "73" * 16 + "40000000" + "64" * 32 + "65" * 32),
    (
        Welcome(ID, DIGEST, b"e" * 32, 258),
        "02 0000" + "73" * 16 + "44000000" + "64" * 32 + "65" * 32 + "02010000",
    ),
    (
        Multiply(ID, 258, 3, 5, b"xyz"),
        "03 0000" + "73" * 16 + "13000000" + "0201000000000000 03000000 05000000 78797a",
    ),
    (Product(ID, 258, b"xyz"), "04 0000" + "73" * 16 + "0b000000" + "0201000000000000 78797a"),
    (
        Refuse(ID, 258, Reason.FAILED),
        "05 0000" + "73" * 16 + "0a000000" + "0201000000000000 0900",
    ),
    (
        Refuse(ID, 258, Reason.BUSY, 772),
        "05 0000" + "73" * 16 + "0e000000" + "0201000000000000 0800 04030000",
    ),
    (Bye(ID), "06 0000" + "73" * 16 + "00000000"),
    (Farewell(ID), "07 0000" + "73" * 16 + "00000000"),
)


@pytest.mark.parametrize(("message", "after_version"), BYTES)
def test_frames_are_these_bytes(message: Message, after_version: str) -> None:
    """Written out once by hand: two releases of one version must understand each other."""
    frame = bytes.fromhex("5046544c 02" + after_version)
    assert encode(message) == frame
    assert decode(frame) == message
    assert announced_bytes(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    assert HEADER_BYTES == 28


def test_reasons_are_these_numbers() -> None:
    """The same for the refusals."""
    assert [reason.value for reason in Reason] == list(range(1, 10))
    assert [Reason.OTHER_VERSION, Reason.NO_SESSION, Reason.BUSY] == [1, 4, 8]
    for number in (0, 10, U16):
        with pytest.raises(ProtocolError):
            decode(encode(Refuse(ID, 1, Reason.BUSY))[:-2] + number.to_bytes(2, "little"))  # type: ignore[index]


MAKERS: dict[str, tuple[Callable[[int], object], int, int]] = {
    "max_tokens of a Welcome": (lambda n: Welcome(ID, DIGEST, DIGEST, n), 1, U32),
    "request of a Multiply": (lambda n: Multiply(ID, n, 0, 1, b""), 0, U64),
    "matrix": (lambda n: Multiply(ID, 1, n, 1, b""), 0, U32),
    "tokens": (lambda n: Multiply(ID, 1, 0, n, b""), 0, U32),
    "request of a Product": (lambda n: Product(ID, n, b""), 0, U64),
    "request of a Refuse": (lambda n: Refuse(ID, n, Reason.BUSY), 0, U64),
    "session": (lambda n: Bye(bytes(n)), 16, 16),
    "session of a Farewell": (lambda n: Farewell(bytes(n)), 16, 16),
    "session of a Multiply": (lambda n: Multiply(bytes(n), 1, 0, 1, b""), 16, 16),
    "session of a Product": (lambda n: Product(bytes(n), 1, b""), 16, 16),
    "session of a Refuse": (lambda n: Refuse(bytes(n), 1, Reason.BUSY), 16, 16),
    "session of a Hello": (lambda n: Hello(bytes(n), DIGEST, DIGEST), 16, 16),
    "session of a Welcome": (lambda n: Welcome(bytes(n), DIGEST, DIGEST, 1), 16, 16),
    "first digest of a Hello": (lambda n: Hello(ID, bytes(n), DIGEST), 32, 32),
    "second digest of a Hello": (lambda n: Hello(ID, DIGEST, bytes(n)), 32, 32),
    "first digest of a Welcome": (lambda n: Welcome(ID, bytes(n), DIGEST, 1), 32, 32),
    "second digest of a Welcome": (lambda n: Welcome(ID, DIGEST, bytes(n), 1), 32, 32),
    "digest of a model": (lambda n: Catalogue(bytes(n), DIGEST, ()), 32, 32),
    "digest of parameters": (lambda n: Catalogue(DIGEST, bytes(n), ()), 32, 32),
    "features in": (lambda n: MatrixShape("m", n, 1, 1, 1), 1, U64),
    "features out": (lambda n: MatrixShape("m", 1, n, 1, 1), 1, U64),
    "bytes up": (lambda n: MatrixShape("m", 1, 1, n, 1), 1, U64),
    "bytes down": (lambda n: MatrixShape("m", 1, 1, 1, n), 1, U64),
    "call": (lambda n: LinearWanted(n, 0, 1, ()), 1, U64),
    "tokens of a call": (lambda n: LinearWanted(1, 0, n, ()), 1, U64),
}


@pytest.mark.parametrize("what", MAKERS)
def test_what_can_be_made_has_exact_bounds(what: str) -> None:
    """The least and the most can; one less and, where there is a most, one more cannot."""
    make, least, most = MAKERS[what]
    make(least)
    make(most)
    unbounded = most == U64 and "request" not in what
    for wrong in [least - 1] * (least > 0 or "session" not in what) + [most + 1] * (not unbounded):
        with pytest.raises(ValueError, match=r"\w"):
            make(wrong)


@pytest.mark.parametrize("make", [lambda payload: Product(ID, 1, payload)])
def test_a_body_has_exactly_so_many_bytes_at_most(
    make: Callable[[bytes], Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 GiB; here a hundred bytes, so that a test can have one more."""
    assert messages.MAX_BODY_BYTES == 1 << 30
    most, over = encode(make(bytes(92))), encode(make(bytes(93)))
    monkeypatch.setattr(messages, "MAX_BODY_BYTES", 100)
    assert encode(make(bytes(92))) == most
    assert isinstance(decode(most), Product)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 100"):
        encode(make(bytes(93)))
    with pytest.raises(ProtocolError):
        decode(over)  # type: ignore[arg-type]


class OnDevice:
    """A payload that is not on the host."""

    def __init__(self, size: int) -> None:
        self.nbytes = size

    def __len__(self) -> int:
        return self.nbytes


def test_a_payload_on_a_device_counts() -> None:
    """Its length must be the one that the head announces, and only two kinds can have one."""
    made = encode(Product(ID, 1, OnDevice(5)))
    assert isinstance(made, LocalFrame)
    assert len(made) == HEADER_BYTES + 8 + 5
    for size, right in ((4, False), (5, True), (6, False)):
        local = LocalFrame(made.head, OnDevice(size))
        if right:
            assert decode(local) == Product(ID, 1, local.payload)
        else:
            with pytest.raises(ProtocolError):
                decode(local)
    with pytest.raises(ProtocolError):
        decode(LocalFrame(encode(Bye(ID)), OnDevice(0)))  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [message for message, _ in BYTES])
def test_another_version_is_told_by_its_session(message: Message) -> None:
    """One less and one more; only a Refuse is read."""
    frame = encode(message)
    assert isinstance(frame, bytes)
    for version in (1, 3):
        other = frame[:4] + bytes((version,)) + frame[5:]
        if isinstance(message, Refuse):
            assert decode(other) == message
            continue
        with pytest.raises(VersionError, match=f"version {version}, this side speaks 2") as told:
            decode(other)
        assert told.value.session == ID


def test_no_frame_is_larger_than_the_largest() -> None:
    """Of either side, and the bound is no more than a head above the largest payload."""
    shapes = (MatrixShape("a", 1, 1, 7, 3), MatrixShape("b", 1, 1, 2, 5))
    catalogue = Catalogue(MODEL, PARAMETERS, shapes)
    assert [catalogue.up_bytes(m, 3) for m in (0, 1)] == [21, 6]
    assert [catalogue.down_bytes(m, 3) for m in (0, 1)] == [9, 15]
    largest = catalogue.largest_frame(3)
    frames = [encode(Multiply(ID, 1, 0, 3, bytes(21))), encode(Product(ID, 1, bytes(15)))]
    frames += [encode(message) for message, _ in BYTES]
    assert max(map(len, frames)) <= largest
    assert largest == HEADER_BYTES + 68 + 21


def test_a_block_takes_the_same_bytes_however_full_it_is() -> None:
    """Sizes, the largest frame, and how many tokens one can have at most."""
    shape = MatrixShape("packed", 1, 1, 1 << 20, 300, block_tokens=4)
    catalogue = Catalogue(MODEL, PARAMETERS, (shape,))
    for tokens, blocks in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        assert catalogue.up_bytes(0, tokens) == blocks << 20
        assert catalogue.down_bytes(0, tokens) == blocks * 300
        assert catalogue.largest_frame(tokens) == HEADER_BYTES + 68 + (blocks << 20)
    most = catalogue.tokens_max(0)
    assert most % 4 == 0
    assert catalogue.largest_frame(most) <= MAX_BODY_BYTES < catalogue.largest_frame(most + 1)
    with pytest.raises(ValueError, match="at least 1"):
        replace(shape, block_tokens=0)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in fields(OwnerConfig)])
def test_patience_and_width_are_positive(name: str) -> None:
    """A count from 1, a time above 0."""
    whole = isinstance(getattr(OwnerConfig(), name), int)
    wrong: tuple[Any, ...] = (0, -1) if whole else (0.0, -1.0)
    assert getattr(replace(OwnerConfig(), **{name: 1 if whole else 1e-9}), name) > 0
    for value in wrong:
        with pytest.raises(ValueError, match=r"at least 1|positive"):
            replace(OwnerConfig(), **{name: value})


@pytest.mark.parametrize("delay_s", [0, -1e-9])
def test_a_timer_runs_for_some_time(delay_s: float) -> None:
    """None, or less, is a mistake of the machine's."""
    SetTimer("t", 1e-9)
    with pytest.raises(ValueError, match="positive"):
        SetTimer("t", delay_s)


# --- the owner --------------------------------------------------------------------------------


def test_calls_are_numbered_upwards_and_name_a_matrix() -> None:
    """The same number again, a smaller one, or a matrix beside the catalogue: the driver's bug."""
    desk = OwnerDesk().open()
    desk.do(LinearWanted(5, 1, 1, ()))
    for call in (5, 4):
        with pytest.raises(MisuseError, match=f"call {call} does not follow call 5"):
            desk.do(LinearWanted(call, 0, 1, ()))
    for matrix in (-1, len(CATALOGUE.matrices)):
        with pytest.raises(MisuseError, match="no matrix"):
            desk.do(LinearWanted(6, matrix, 1, ()))
    assert one(desk.do(LinearWanted(6, 0, 1, ())), RunTask).task == 6


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_is_full_when_it_is_full(window: int) -> None:
    """That many requests go out; the next goes when one is answered, and no other."""
    desk = OwnerDesk(config=OwnerConfig(window=window)).open()
    sent = [requests(desk.ask(call)) for call in range(1, window + 3)]
    assert sent == [[("w1", call)] for call in range(1, window + 1)] + [[], []]
    assert requests(desk.product(1)) == [("w1", window + 1)]
    assert requests(desk.product(2)) == [("w1", window + 2)]


def test_a_request_may_have_as_many_tokens_as_a_worker_takes() -> None:
    """Exactly as many are sent; one more fails, with both numbers in its text."""
    desk = OwnerDesk()
    desk.open()
    desk.disconnect()
    desk.welcome(max_tokens=3)
    assert requests(desk.ask(1, x=(1, 2, 3))) == [("w1", 1)]
    told = one(desk.ask(2, x=(1, 2, 3, 4)), FailCall)
    assert told.call == 2
    assert "4 tokens" in told.reason
    assert "at most 3" in told.reason


def test_a_refusing_worker_gets_exactly_as_many_tries() -> None:
    """`refusals_max` times BUSY fail the call, one less does not."""
    for most in (1, 2, 3):
        desk = OwnerDesk(config=OwnerConfig(refusals_max=most)).open()
        desk.ask()
        for number in count(1):
            failed = all_of(desk.refuse(Reason.BUSY), FailCall)
            assert bool(failed) == (number == most)
            if failed:
                break
            desk.fire("call:1")


# --- the worker -------------------------------------------------------------------------------


def test_a_request_at_every_bound_is_computed() -> None:
    """The last matrix, the most tokens, one token; and one beyond each is refused."""
    desk = WorkerDesk(WorkerConfig(max_tokens=3)).open()
    last = len(CATALOGUE.matrices) - 1
    for number, (matrix, tokens, size, reason) in enumerate(
        (
            (last, 3, 12, None),
            (0, 1, 4, None),
            (last + 1, 1, 4, Reason.UNKNOWN_MATRIX),
            (0, 4, 16, Reason.TOO_MANY_TOKENS),
            (0, 0, 0, Reason.TOO_MANY_TOKENS),
            (0, 1, 3, Reason.WRONG_SIZE),
            (0, 1, 5, Reason.WRONG_SIZE),
        )
    ):
        effects = desk.hear(Multiply(SESSION, number, matrix, tokens, bytes(size)))
        if reason is None:
            assert one(effects, RunTask)
        else:
            assert decode(one(effects, Send).frame) == Refuse(SESSION, number, reason)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_work_and_sessions_are_bounded_exactly(most: int) -> None:
    """So many requests of a peer, so many peers; one more is BUSY."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(requests=most), max_peers=most))
    for number in range(most):
        assert isinstance(decode(one(desk.hear(HELLO, f"o{number}"), Send).frame), Welcome)
    assert decode(one(desk.hear(HELLO, "late"), Send).frame) == Refuse(SESSION, 0, Reason.BUSY)
    assert desk.worker.state("late") is WorkerState.ABSENT
    tasks = {one(desk.ask(number, peer="o0"), RunTask).task for number in range(most)}
    assert len(tasks) == most
    told = decode(one(desk.ask(most, peer="o0"), Send).frame)
    assert told == Refuse(SESSION, most, Reason.BUSY, 250)


def test_a_forgetting_worker_gets_exactly_as_many_greetings() -> None:
    """`attempts_max` times between answers; an answer clears the count."""
    for most in (1, 2, 3):
        desk = OwnerDesk(("w1", "w2"), OwnerConfig(attempts_max=most, window=9)).open()
        desk.ask(1)
        for number in range(most + 1):
            effects = desk.refuse(Reason.NO_SESSION)
            lost = desk.owner.state("w1") is State.LOST
            assert lost == (number == most)
            if lost:
                break
            # The other one took the call meanwhile; here it is lost, so that w1 has it again.
            assert requests(effects) == [("w2", 1)]
            desk.welcome("w1")
            desk.disconnect("w2")
            desk.welcome("w2")


@pytest.mark.parametrize("result", [[b"1234", "key"], (b"1234",), (b"1234", "key", "more"), "ab"])
def test_an_encryption_returns_two_things(result: object) -> None:
    """Anything else is a bug of the driver's, and says so."""
    desk = OwnerDesk().open()
    desk.do(LinearWanted(1, 0, 1, (1,)))
    with pytest.raises(MisuseError, match="payload, sealed"):
        desk.do(TaskDone(1, result))
