"""What travels is what `wire.py` says, bit for bit, for every format and ragged shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he.matmul.generic import GenericKernel
from backends.he.mlwe_worker import MlweWorker
from backends.he.packing import pack_answer, pack_request, unpack_answer, unpack_request
from backends.he.wire import DOWN_BITS, EXACT, UP_BITS, Format
from tests.he import plain_wire

FORMATS = [Format(up, down) for up, down in itertools.product(UP_BITS, DOWN_BITS)]
UP = [Format(up, 16) for up in UP_BITS]
DOWN = [Format(24, down) for down in DOWN_BITS]
sizes = given(tokens=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 99))


def random_planes(format: Format, tokens: int, inputs: int, seed: int) -> NDArray[np.int8]:
    """Digits of every value, the lowest ones multiples of the format's unit."""
    shape = (format.limbs, tokens, inputs)
    planes = np.random.default_rng(seed).integers(-128, 128, shape, np.int8)
    planes[0] &= -format.unit
    return planes


@pytest.mark.parametrize("format", UP, ids=str)
@settings(max_examples=25, deadline=None)
@sizes
@example(tokens=2, width=1, seed=0)
def test_requests(format: Format, tokens: int, width: int, seed: int) -> None:
    planes = random_planes(format, tokens, width, seed)
    sent = pack_request(planes, format)
    assert sent.tobytes() == plain_wire.request_bytes(planes.tolist(), format.up_bits)
    assert len(sent) == tokens * format.up_bytes(width)
    assert np.array_equal(unpack_request(sent, tokens, width, format), planes)
    scale = 256 ** np.arange(format.limbs)[:, None, None]
    values = plain_wire.request_values(sent.tobytes(), tokens, width, format.up_bits)
    assert values == (planes * scale).sum(axis=0).tolist()


@pytest.mark.parametrize("format", DOWN, ids=str)
@settings(max_examples=25, deadline=None)
@sizes
@example(tokens=2, width=1, seed=0)
def test_answers(format: Format, tokens: int, width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 1 << format.down_bits, (tokens, width), np.uint16)
    sent = pack_answer(values, format)
    assert sent.tobytes() == plain_wire.answer_bytes(values.tolist(), format.down_bits)
    assert len(sent) == tokens * format.down_bytes(width)
    assert np.array_equal(unpack_answer(sent, tokens, width, format), values)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(max_examples=4, deadline=None)
@given(
    tokens=st.integers(1, 5), inputs=st.integers(1, 30), outputs=st.integers(1, 20),
    forward=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_worker_answers_any_bytes_of_the_right_number(
    format: Format, tokens: int, inputs: int, outputs: int, forward: bool, seed: int
) -> None:
    """A request need not be one that an owner packed: bits past a row's end are no one's."""
    draw = np.random.default_rng(seed)
    weight = draw.integers(-128, 128, (outputs, inputs), np.int8)
    payload = draw.integers(0, 256, tokens * format.up_bytes(inputs), np.uint8)
    right = plain_wire.answer(payload.tobytes(), tokens, weight, format.up_bits, format.down_bits)
    if not forward:
        weight = np.ascontiguousarray(weight.T)
    for worker in (MlweWorker(), MlweWorker(GenericKernel())):
        loaded = worker.load(weight, forward, format)
        for request in (payload, payload.tobytes(), memoryview(bytearray(payload))):
            assert worker.multiply(request, tokens, loaded).tobytes() == right


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bits_past_the_end_of_a_row_are_ignored(format: Format) -> None:
    tokens, width = 3, 5
    planes = random_planes(format, tokens, width, 0)
    sent = pack_request(planes, format)
    last = format.up_bytes(width) - (format.limbs - 1) * width
    if format.unused_bits:
        sent[2 * tokens * width :].reshape(tokens, last)[:, -1] |= 0xF0
        assert sent.tobytes() != pack_request(planes, format).tobytes()
    assert np.array_equal(unpack_request(sent, tokens, width, format), planes)
    values = np.full((tokens, width), 3, np.uint16)
    told = pack_answer(values, format)
    if format.down_bits in (10, 12):
        told[tokens * width :].reshape(tokens, -1)[:, -1] |= 0xF0
        assert told.tobytes() != pack_answer(values, format).tobytes()
    assert np.array_equal(unpack_answer(told, tokens, width, format), values)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_requests_and_answers_that_threads_share(format: Format) -> None:
    """As large as real ones, where every core packs a part."""
    planes = random_planes(format, 301, 2048, 1)
    assert np.array_equal(unpack_request(pack_request(planes, format), 301, 2048, format), planes)
    values = np.random.default_rng(2).integers(0, 1 << format.down_bits, (301, 2048), np.uint16)
    assert np.array_equal(unpack_answer(pack_answer(values, format), 301, 2048, format), values)


def test_whole_bytes_are_not_copied() -> None:
    for format in (Format(16, 16), EXACT):
        planes = random_planes(format, 4, 6, 0)
        sent = pack_request(planes, format)
        assert np.shares_memory(sent, planes)
        assert np.shares_memory(unpack_request(sent, 4, 6, format), planes)
        values = np.zeros((4, 6), np.uint16)
        told = pack_answer(values, format)
        assert np.shares_memory(told, values)
        assert np.shares_memory(unpack_answer(told, 4, 6, format), values)


def test_memory_of_any_layout_is_taken() -> None:
    format = Format(18, 10)
    planes = random_planes(format, 4, 14, 0)
    expected = pack_request(planes, format).tobytes()
    strided = np.repeat(planes, 2, axis=2)[:, :, ::2]
    assert pack_request(strided, format).tobytes() == expected
    assert pack_request(np.asfortranarray(planes), format).tobytes() == expected
    odd = np.frombuffer(b"x" + expected, np.uint8)[1:]
    assert np.array_equal(unpack_request(odd, 4, 14, format), planes)
    values = np.arange(56, dtype=np.uint16).reshape(4, 14)
    expected = pack_answer(values, format).tobytes()
    assert pack_answer(np.asfortranarray(values), format).tobytes() == expected
    odd = np.frombuffer(b"x" + expected, np.uint8)[1:]
    assert np.array_equal(unpack_answer(odd, 4, 14, format), values)
    odd = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:]
    assert np.array_equal(unpack_answer(odd, 4, 14, EXACT), values)


def test_other_sizes_are_refused() -> None:
    format = Format(18, 10)
    with pytest.raises(ValueError, match="4 tokens with 6 inputs has 56 bytes, this one 55"):
        unpack_request(np.zeros(55, np.uint8), 4, 6, format)
    with pytest.raises(ValueError, match="4 tokens with 6 outputs has 32 bytes, this one 33"):
        unpack_answer(np.zeros(33, np.uint8), 4, 6, format)
    with pytest.raises(ValueError, match=r"int8\[3, T, K\], not int8\[2, 4, 6\]"):
        pack_request(np.zeros((2, 4, 6), np.int8), format)
    with pytest.raises(ValueError, match="not uint8"):
        pack_request(np.zeros((3, 4, 6), np.uint8), format)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"uint16\[T, N\], not int64"):
        pack_answer(np.zeros((4, 6), np.int64), format)  # type: ignore[arg-type]
    worker = MlweWorker()
    loaded = worker.load(np.zeros((5, 6), np.int8), True, format)
    with pytest.raises(ValueError, match="56 bytes, this one 57"):
        worker.multiply(bytes(57), 4, loaded)


def test_other_bits_are_refused() -> None:
    for up, down in ((17, 16), (32, 16), (24, 9), (24, 24)):
        with pytest.raises(ValueError, match="choose of"):
            Format(up, down)
