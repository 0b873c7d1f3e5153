"""The one binary encoding: it round-trips, and bytes off the wire can only be refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages
from protocol.errors import ProtocolError, VersionError
from protocol.messages import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SESSION_BYTES,
    VERSION,
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
    decode,
    encode,
)

KIND_OF_REFUSE = 5
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
ID = b"s" * SESSION_BYTES
DIGEST = b"d" * DIGEST_BYTES
sessions = st.binary(min_size=SESSION_BYTES, max_size=SESSION_BYTES)
digests = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
u32s, u64s = st.integers(0, U32), st.integers(0, U64)
payloads = st.binary(max_size=64)
any_message: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, sessions, digests, digests),
    st.builds(Welcome, sessions, digests, digests, st.integers(1, U32)),
    st.builds(Multiply, sessions, u64s, u32s, u32s, payloads),
    st.builds(Product, sessions, u64s, payloads),
    st.builds(Refuse, sessions, u64s, st.sampled_from(Reason)),
    st.builds(Bye, sessions),
    st.builds(Farewell, sessions),
)


def decodes_faithfully_or_is_refused(frame: bytes) -> None:
    """ProtocolError, or a message that encodes to the very same bytes.

    But for the version of a Refuse, which is read whatever it is.
    """
    try:
        message = decode(frame)
    except ProtocolError:
        return
    version = frame[4] if isinstance(message, Refuse) else VERSION
    assert with_header(encode(message), version=version) == frame


def with_header(frame: bytes, **fields: int | bytes) -> bytes:
    """The frame with some header fields replaced."""
    names = ("magic", "version", "kind", "zero", "session", "size")
    layout = struct.Struct("<4sBBH16sI")
    header = dict(zip(names, layout.unpack_from(frame), strict=True)) | fields
    return layout.pack(*(header[name] for name in names)) + frame[layout.size :]


@settings(deadline=None)
@given(any_message)
def test_every_message_round_trips(message: Message) -> None:
    """decode undoes encode, from any kind of buffer."""
    frame = encode(message)
    for buffer in (frame, bytearray(frame), memoryview(frame)):
        assert decode(buffer) == message


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(frame: bytes) -> None:
    """Noise raises ProtocolError and nothing else."""
    decodes_faithfully_or_is_refused(frame)


@settings(deadline=None)
@given(st.integers(0, 9) | st.integers(0, 255), sessions, st.binary(max_size=120))
def test_arbitrary_bodies_under_a_good_header(kind: int, session: bytes, body: bytes) -> None:
    """Behind a right header and length, any body of any kind is read or refused."""
    frame = with_header(encode(Bye(session)), kind=kind, size=len(body)) + body
    decodes_faithfully_or_is_refused(frame)


@settings(deadline=None)
@given(any_message, st.data())
def test_truncated_and_padded_frames_are_refused(message: Message, data: st.DataObject) -> None:
    """A frame is exactly as long as its header says."""
    frame = encode(message)
    cut = data.draw(st.integers(0, len(frame) - 1))
    for wrong in (frame[:cut], frame + b"\0"):
        with pytest.raises(ProtocolError):
            decode(wrong)


@settings(deadline=None)
@given(any_message, st.data())
def test_flipped_bits_are_refused_or_read(message: Message, data: st.DataObject) -> None:
    """No pattern of flipped bits makes decode raise anything else or misread a frame."""
    frame = bytearray(encode(message))
    for bit in data.draw(st.sets(st.integers(0, 8 * len(frame) - 1), min_size=1, max_size=4)):
        frame[bit // 8] ^= 1 << bit % 8
    decodes_faithfully_or_is_refused(bytes(frame))


@pytest.mark.parametrize(
    "wrong",
    [
        {"magic": b"HTTP"},
        {"kind": 0},
        {"kind": 8},
        {"zero": 1},
        {"size": 9},
        {"size": 11},
        {"size": U32},
    ],
    ids=str,
)
def test_a_wrong_header_is_refused(wrong: dict[str, int | bytes]) -> None:
    """Magic, version, kind, reserved bits and length are all checked."""
    frame = encode(Refuse(ID, 1, Reason.BUSY))
    assert decode(with_header(frame)) == Refuse(ID, 1, Reason.BUSY)
    with pytest.raises(ProtocolError):
        decode(with_header(frame, **wrong))


@settings(deadline=None)
@given(any_message, st.integers(0, 255))
def test_a_frame_of_another_version_is_refused_by_its_session(
    message: Message, version: int
) -> None:
    """Its body is not read, but whoever refuses it can say whose frame it was."""
    frame = with_header(encode(message), version=version)
    if version == VERSION or isinstance(message, Refuse):
        assert decode(frame) == message
        return
    with pytest.raises(
        VersionError, match=f"version {version}, this side speaks {VERSION}"
    ) as told:
        decode(frame)
    assert told.value.session == message.session


@settings(deadline=None)
@given(sessions, st.integers(0, 255), st.binary(max_size=40))
def test_whatever_follows_the_header_of_another_version_is_not_read(
    session: bytes, kind: int, body: bytes
) -> None:
    """Its length, too, is the other version's business."""
    frame = with_header(encode(Bye(session)), version=VERSION + 1, kind=kind) + body
    if kind != KIND_OF_REFUSE:
        with pytest.raises(VersionError):
            decode(frame)
    elif body:
        with pytest.raises(ProtocolError):
            decode(frame)


@pytest.mark.parametrize("message", [Bye(ID), Farewell(ID)], ids=repr)
def test_a_closing_message_with_a_body_is_refused(message: Message) -> None:
    """It could carry what nobody checks."""
    with pytest.raises(ProtocolError):
        decode(with_header(encode(message), size=1) + b"x")


@pytest.mark.parametrize("reason", [0, len(Reason) + 1, 0xFFFF])
def test_an_unknown_reason_is_refused(reason: int) -> None:
    """A refusal gives one of the known reasons."""
    frame = encode(Refuse(ID, 1, Reason.BUSY))[:-2] + struct.pack("<H", reason)
    with pytest.raises(ProtocolError):
        decode(frame)


def test_a_body_over_the_limit_is_refused_by_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds even where length and header agree."""
    frame = encode(Product(ID, 1, bytes(100)))
    monkeypatch.setattr(messages, "MAX_BODY_BYTES", 107)
    with pytest.raises(ProtocolError):
        decode(frame)


def test_a_body_over_the_limit_is_refused_by_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """We never send what the peer must refuse: the limit itself passes, one byte more does not."""
    monkeypatch.setattr(messages, "MAX_BODY_BYTES", 108)
    encode(Product(ID, 1, bytes(100)))
    with pytest.raises(ValueError, match="at most 108 bytes"):
        encode(Product(ID, 1, bytes(101)))


@pytest.mark.parametrize(
    "message", [Multiply(ID, 1, 0, 2, b"payload"), Product(ID, 1, b"payload")], ids=repr
)
def test_a_payload_is_a_read_only_view(message: Multiply | Product) -> None:
    """Large payloads are not copied, and nobody can write through the view."""
    frame = bytearray(encode(message))
    decoded = decode(frame)
    assert isinstance(decoded, Multiply | Product)
    assert isinstance(decoded.payload, memoryview)
    assert decoded.payload.readonly
    frame[-1] ^= 0xFF
    assert bytes(decoded.payload) != b"payload"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Hello(ID[:-1], DIGEST, DIGEST),
        lambda: Hello(ID, DIGEST + b"d", DIGEST),
        lambda: Hello(ID, DIGEST, b""),
        lambda: Welcome(ID, DIGEST, DIGEST, 0),
        lambda: Welcome(ID, DIGEST, DIGEST, -1),
        lambda: Welcome(ID, DIGEST, DIGEST, U32 + 1),
        lambda: Welcome(ID, DIGEST[1:], DIGEST, 1),
        lambda: Multiply(ID, U64 + 1, 0, 1, b""),
        lambda: Multiply(ID, 1, -1, 1, b""),
        lambda: Multiply(ID, 1, 0, U32 + 1, b""),
        lambda: Product(ID, -1, b""),
        lambda: Refuse(ID, -1, Reason.BUSY),
        lambda: Refuse(ID, 1, Reason.BUSY, U32 + 1),
        lambda: Refuse(ID, 1, Reason.FAILED, 1),
        lambda: Bye(b""),
        lambda: Farewell(ID + b"s"),
    ],
)
def test_constructors_validate(build: Callable[[], Message]) -> None:
    """What could not be encoded cannot be built."""
    with pytest.raises(ValueError, match=r"must fit|has|at least one|only BUSY"):
        build()


def test_the_header_is_28_bytes_and_fixed() -> None:
    """The layout is public: a change of it needs a new version."""
    frame = encode(Multiply(ID, 2, 3, 4, b"\xff"))
    assert HEADER_BYTES == 28
    assert frame.hex() == (
        "5046544c" "02" "03" "0000" + ID.hex() + "11000000"
        "0200000000000000" "03000000" "04000000" "ff"
    )  # fmt: skip


def test_payloads_print_nowhere() -> None:
    """A message in a log shows sizes at most, never ciphertext."""
    assert "payload" not in repr(Multiply(ID, 1, 0, 1, b"payload"))
    assert "payload" not in repr(Product(ID, 1, b"payload"))


def test_a_payload_of_wider_items_is_counted_in_bytes() -> None:
    """A view of int16 is refused by the constructor or sent whole, not under a wrong length."""
    try:
        message = Product(ID, 1, memoryview(b"abcd").cast("h"))
    except ValueError:
        return
    assert bytes(decode(encode(message)).payload) == b"abcd"  # type: ignore[union-attr]


class OnDevice:
    """Stands for memory of a GPU: it has a length in bytes, and nothing else is known of it."""

    def __init__(self, size: int) -> None:
        self.size = self.nbytes = size

    def __len__(self) -> int:
        return self.size


@given(u64s, st.integers(0, 1 << 20))
def test_a_payload_on_a_device_stays_there(request: int, size: int) -> None:
    """The frame has two pieces, counts all its bytes, and decodes to the very same memory."""
    payload = OnDevice(size)
    for message in (Multiply(ID, request, 3, 5, payload), Product(ID, request, payload)):
        frame = encode(message)
        assert isinstance(frame, LocalFrame)
        assert len(frame) == len(encode(replace(message, payload=bytes(size))))
        decoded = decode(frame)
        assert decoded == message
        assert isinstance(decoded, Multiply | Product)
        assert decoded.payload is payload


def test_a_local_frame_is_checked_like_any_other() -> None:
    """Another length than the header states, two payloads, or a payload where none belongs."""
    frame = encode(Multiply(ID, 1, 2, 3, OnDevice(9)))
    assert isinstance(frame, LocalFrame)
    with pytest.raises(ProtocolError, match="length disagree"):
        decode(LocalFrame(frame.head, OnDevice(8)))
    whole = encode(Multiply(ID, 1, 2, 3, bytes(9)))
    with pytest.raises(ProtocolError, match="length disagree"):
        decode(LocalFrame(bytes(whole), OnDevice(9)))
    with pytest.raises(ProtocolError, match="two payloads"):
        decode(LocalFrame(bytes(whole), OnDevice(0)))
    with pytest.raises(ProtocolError, match="has no payload"):
        decode(LocalFrame(bytes(encode(Bye(ID))), OnDevice(0)))
    with pytest.raises(ProtocolError, match="shorter than a header"):
        decode(LocalFrame(frame.head[:20], OnDevice(100)))
