"""The checks of a chaos run: each lets the honest course pass, and finds its breach."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from protocol.catalogue import MatrixShape
from protocol.events import (
    AnswerRejected,
    Decrypt,
    Deliver,
    Dropped,
    Encrypt,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    Retired,
    RunTask,
    Send,
    SetTimer,
    TaskDone,
)
from protocol.messages import Bye, Hello, Multiply, Product, Refuse, Welcome, decode, encode
from scenarios.chaos.checks import (
    OwnerWatch,
    Violation,
    Wire,
    WorkerWatch,
    digest,
    read,
)
from scenarios.chaos.secrecy import Secrets
from scenarios.chaos.worker import refusal

SESSION, OLD = b"s" * 16, b"o" * 16
SHAPES = (MatrixShape("m0", 4, 2, 12, 4), MatrixShape("m1", 2, 4, 6, 8))
TOKENS = 2
RNG = np.random.default_rng(0)


def ask(request: int = 1, fill: int = 1, session: bytes = SESSION, matrix: int = 0) -> bytes:
    """A request frame of the right size for matrix 0."""
    return encode(Multiply(session, request, matrix, TOKENS, bytes([fill]) * 24))


def answer(request: int = 1, fill: int = 2, session: bytes = SESSION) -> bytes:
    """An answer frame of the right size for matrix 0."""
    return encode(Product(session, request, bytes([fill]) * 8))


def wire(encrypted: bool = False) -> Wire:
    """A watched wire in SESSION."""
    made = Wire(SHAPES, TOKENS, encrypted)
    made.owner_starts(SESSION)
    return made


def test_the_checks_read_frames_as_the_protocol_writes_them() -> None:
    """Its own idea of the layout agrees with `encode`, and takes nothing less or more."""
    for frame in (ask(), answer(), encode(Hello(SESSION, b"p" * 32, b"m" * 32)), encode(Bye(OLD))):
        seen = read(frame)
        assert seen is not None
        assert seen.session == decode(frame).session
        assert read(frame[:-1]) is None
        assert read(frame + b"x") is None
        assert read(b"X" + frame[1:]) is None
    seen = read(ask(request=9, matrix=0))
    assert seen is not None
    assert (seen.request, seen.matrix, seen.tokens, len(seen.body)) == (9, 0, TOKENS, 24)
    refused = decode(refusal(SESSION, 5, 8))
    assert isinstance(refused, Refuse)
    assert (refused.request, refused.reason.name) == (5, "BUSY")


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([ask(fill=1), ask(fill=2)], "same bytes"),
        ([ask(session=OLD)], "another session"),
        ([ask() + b"x"], "malformed"),
        ([encode(Multiply(SESSION, 1, 0, TOKENS, bytes(23)))], "larger or smaller"),
        ([encode(Multiply(SESSION, 1, 7, TOKENS, bytes(24)))], "no matrix"),
        ([encode(Multiply(SESSION, 1, 0, 3, bytes(36)))], "number of tokens"),
        ([answer()], "kind 4"),
    ],
)
def test_what_an_owner_may_not_send(frames: list[bytes], text: str) -> None:
    """The last frame of each row breaks a rule; those before do not."""
    watched = wire()
    for frame in frames[:-1]:
        watched.from_owner("w0", frame)
    with pytest.raises(Violation, match=text):
        watched.from_owner("w0", frames[-1])


def test_what_a_worker_may_not_send() -> None:
    """An answer to nothing, of another size, or no answer at all."""
    watched = wire()
    with pytest.raises(Violation, match="never asked"):
        watched.from_worker(answer())
    watched.from_owner("w0", ask())
    watched.from_worker(answer())
    for frame, text in (
        (encode(Product(SESSION, 1, bytes(9))), "larger or smaller"),
        (ask(), "kind 3"),
        (b"junk", "malformed"),
    ):
        with pytest.raises(Violation, match=text):
            watched.from_worker(frame)


def test_two_requests_with_one_ciphertext_and_a_retired_worker() -> None:
    """In `mlwe` no two requests are alike; who is retired gets nothing."""
    watched = wire(encrypted=True)
    watched.from_owner("w0", ask(request=1))
    watched.from_owner("w1", ask(request=1))
    with pytest.raises(Violation, match="same ciphertext"):
        watched.from_owner("w0", ask(request=2))
    watched.retired.add("w1")
    with pytest.raises(Violation, match="retired"):
        watched.from_owner("w1", ask(request=1))


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("quantised", [False, True])
def test_private_values_are_seen_on_the_wire(offset: int, quantised: bool) -> None:
    """Floats as they are, or as int8, at any place of a frame; random bytes are not taken so."""
    watched = wire(encrypted=True)
    x = RNG.standard_normal((2, 16)).astype(np.float32)
    watched.private(x)
    leak = x.tobytes()
    if quantised:
        top = np.abs(x).max(axis=1, keepdims=True)
        leak = np.round(x / top * 127).astype(np.int8).tobytes()
    body = RNG.bytes(offset) + leak[:15] + RNG.bytes(9)
    watched.from_owner("w0", encode(Multiply(SESSION, 1, 0, TOKENS, RNG.bytes(24))))
    with pytest.raises(Violation, match="private"):
        watched.from_owner("w0", encode(Multiply(SESSION, 2, 0, TOKENS, body[:24])))


@pytest.mark.parametrize("masked", [True, False])
def test_bytes_that_are_not_uniform(masked: bool) -> None:
    """Masked digits pass, small numbers do not."""
    watched = wire(encrypted=True)
    for request in range(1, 400):
        body = RNG.integers(0, 256 if masked else 64, 24).astype(np.uint8).tobytes()
        watched.from_owner("w0", encode(Multiply(SESSION, request, 0, TOKENS, body)))
    if masked:
        watched.bytes_are_uniform()
        return
    with pytest.raises(Violation, match="not uniform"):
        watched.bytes_are_uniform()


@pytest.mark.parametrize("known", [None, *range(5)])
def test_numbers_below_a_prime_that_are_not_uniform(known: int | None) -> None:
    """Of 53 bits they pass; with any of their five lowest bytes always the same they do not."""
    watched = Wire(SHAPES, TOKENS, encrypted=True, words=True)
    watched.owner_starts(SESSION)
    for request in range(1, 700):
        words = RNG.integers(0, 2**53 - 111, 3, np.uint64).view(np.uint8).reshape(3, 8)
        if known is not None:
            words[:, known] = 7
        body = words.tobytes()
        watched.from_owner("w0", encode(Multiply(SESSION, request, 0, TOKENS, body)))
    if known is None:
        watched.bytes_are_uniform()
        return
    with pytest.raises(Violation, match=f"digit {known}, are not uniform"):
        watched.bytes_are_uniform()


class Block:
    """A block secret as the checks see it."""

    def __init__(self) -> None:
        self._ntt = np.arange(4)


class Handle:
    """A sealed handle as the checks see it."""

    def __init__(self) -> None:
        self.secrets = [Block()]

    def wipe(self) -> None:
        """As a driver does."""
        self.secrets[0]._ntt[...] = 0


def test_secrets_are_used_once() -> None:
    """Keys, block secrets and sealed handles."""

    secrets = Secrets()
    secrets.key_drawn(b"k")
    with pytest.raises(Violation, match="drawn twice"):
        secrets.key_drawn(b"k")
    handle = Handle()
    secrets.encrypted(b"one", handle)
    secrets.encrypted(b"one", kept := Handle())
    with pytest.raises(Violation, match="sealed two messages"):
        secrets.encrypted(b"two", Handle())
    with pytest.raises(Violation, match="readable after its end"):
        secrets.opened(handle)
    with pytest.raises(Violation, match="opened twice"):
        secrets.opened(handle)
    kept.wipe()
    secrets.discarded(kept)
    with pytest.raises(Violation, match="given up twice"):
        secrets.discarded(kept)


def test_an_orphaned_secret_is_noticed() -> None:
    """One that was neither opened nor wiped when the owner closes; a crash takes them with it."""
    secrets = Secrets()
    secrets.encrypted(b"one", Handle())
    with pytest.raises(Violation, match="1 orphaned secrets"):
        secrets.none_is_left()
    secrets.owner_died()
    secrets.none_is_left()


class Watched:
    """An owner's watch after a request 1 was sent to w0."""

    def __init__(self) -> None:
        self.wire = wire()
        self.wire.from_owner("w0", ask())
        self.lies: dict[tuple[bytes, int, str], str] = {}
        self.states = ("ready",)
        self.watch = OwnerWatch(self.wire, self.lies, lambda: self.states, timer_most_s=1.0)

    def arrives(self, frame: bytes, peer: str = "w0", matrix: int = 0) -> None:
        """An answer that is handed to decryption."""
        seen = read(frame)
        assert seen is not None
        work = Decrypt(matrix, TOKENS, None, seen.body)
        self.watch.saw(FrameArrived(peer, frame), [RunTask(1, work)])


def test_a_good_answer_is_delivered_once() -> None:
    """The plain course, and its repetition."""
    watched = Watched()
    watched.watch.saw(
        LinearWanted(1, 0, TOKENS, None), [RunTask(1, Encrypt(0, TOKENS, None)), SetTimer("t", 1.0)]
    )
    watched.arrives(answer())
    watched.watch.saw(TaskDone(1, None), [Deliver(1, None)])
    with pytest.raises(Violation, match="delivered twice"):
        watched.watch.saw(TaskDone(1, None), [Deliver(1, None)])
    with pytest.raises(Violation, match="encrypted twice"):
        watched.watch.saw(TaskDone(1, None), [RunTask(1, Encrypt(0, TOKENS, None))])
    with pytest.raises(Violation, match="waits"):
        watched.watch.saw(TaskDone(1, None), [SetTimer("t", 1.5)])


@pytest.mark.parametrize(
    ("frame", "peer", "matrix", "text"),
    [
        (answer(session=OLD), "w0", 0, "stale"),
        (answer() + b"x", "w0", 0, "malformed"),
        (answer(request=2), "w0", 0, "another request"),
        (answer(), "w1", 0, "not asked last"),
        (answer(), "w0", 1, "another matrix"),
    ],
)
def test_answers_that_may_not_be_taken(frame: bytes, peer: str, matrix: int, text: str) -> None:
    """Stale, damaged, for another request, from another worker, for another matrix."""
    watched = Watched()
    work = Decrypt(matrix, TOKENS, None, frame[36:])
    with pytest.raises(Violation, match=text):
        watched.watch.saw(FrameArrived(peer, frame), [RunTask(1, work)])


def test_a_stale_frame_may_change_nothing() -> None:
    """Dropping it is fine; a session in another state is not."""
    watched = Watched()
    watched.watch.saw(FrameArrived("w0", answer(session=OLD)), [Dropped("w0", "stale")])
    watched.states = ("greeting",)
    with pytest.raises(Violation, match="stale"):
        watched.watch.saw(FrameArrived("w0", answer(session=OLD)), [])


def test_lies_must_be_found_and_honest_workers_kept() -> None:
    """A lie retires its worker, is never delivered; nobody else is retired."""
    lie = (SESSION, 1, digest(bytes([2]) * 8))
    rejected = AnswerRejected(1, "wrong")
    watched = Watched()
    watched.lies[lie] = "w0"
    watched.arrives(answer())
    with pytest.raises(Violation, match="lie was accepted"):
        watched.watch.saw(TaskDone(1, None), [Deliver(1, None)])
    with pytest.raises(Violation, match="was not retired"):
        watched.watch.saw(rejected, [])
    with pytest.raises(Violation, match="for the answer of"):
        watched.watch.saw(rejected, [Retired("w1", "")])
    watched.watch.saw(rejected, [Retired("w0", "")])
    honest = Watched()
    honest.arrives(answer())
    with pytest.raises(Violation, match="honest"):
        honest.watch.saw(rejected, [Retired("w0", "")])


def test_what_a_worker_may_not_do() -> None:
    """Compute twice, for another session, something else, or react to a malformed frame."""
    watched = wire()
    watched.from_owner("w0", ask())
    watch = WorkerWatch("w0", watched)
    welcome = read(encode(Welcome(SESSION, b"p" * 32, b"m" * 32, 64)))
    assert welcome is not None
    watch.sends(welcome)
    work = MultiplyCiphertext(0, TOKENS, bytes([1]) * 24)
    watch.saw(FrameArrived("owner", ask()), [RunTask(1, work)])
    with pytest.raises(Violation, match="twice"):
        watch.saw(FrameArrived("owner", ask()), [RunTask(2, work)])
    watch.saw(TaskDone(1, b""), [])
    watch.saw(FrameArrived("owner", ask()), [RunTask(2, work)])
    with pytest.raises(Violation, match="not in"):
        watch.saw(FrameArrived("owner", ask(session=OLD)), [RunTask(3, work)])
    other = MultiplyCiphertext(0, TOKENS, bytes([9]) * 24)
    with pytest.raises(Violation, match="something else"):
        watch.saw(FrameArrived("owner", ask()), [RunTask(4, other)])
    malformed = FrameArrived("owner", ask()[:-1])
    watch.saw(malformed, [Dropped("owner", "short")])
    watch.saw(malformed, [Send("owner", refusal(bytes(16), 0, 1))])
    with pytest.raises(Violation, match="malformed"):
        watch.saw(malformed, [Send("owner", refusal(bytes(16), 0, 6))])
    old = read(encode(Product(OLD, 1, struct.pack("<Q", 0))))
    assert old is not None
    with pytest.raises(Violation, match="another session"):
        watch.sends(old)
