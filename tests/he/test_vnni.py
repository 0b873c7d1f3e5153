"""The fused AVX-512 VNNI kernel gives the very bits of the torch path and of 64-bit arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he.mlwe_worker import MlweWorker
from backends.he.params import PRESETS, Parameters
from backends.he.vnni import multiply, pack, supported

pytestmark = pytest.mark.skipif(not supported(), reason="this machine has no AVX-512 VNNI")

TWO_LIMBS = Parameters("two", rank=5, limbs=2, dropped_bits=4)
# (N, K): whole panels and steps, one ragged side, both, smaller than a panel or a step
SHAPES = [(64, 128), (96, 200), (37, 64), (33, 71), (5, 3), (1, 1), (130, 1030)]


def _expected(
    planes: NDArray[np.int8], weight: NDArray[np.int8], forward: bool, dropped_bits: int
) -> NDArray[np.uint16]:
    matrix = (weight.T if forward else weight).astype(np.int64)
    scale = 256 ** np.arange(len(planes), dtype=np.int64)[:, None, None]
    total = ((planes.astype(np.int64) @ matrix) * scale).sum(axis=0)
    mask = (1 << (8 * len(planes) - dropped_bits)) - 1
    return (((total + ((1 << dropped_bits) >> 1)) >> dropped_bits) & mask).astype(np.uint16)


def _planes(limbs: int, tokens: int, inputs: int, seed: int = 0) -> NDArray[np.int8]:
    generator = np.random.default_rng(seed)
    return generator.integers(-128, 128, (limbs, tokens, inputs), dtype=np.int8)


def _weight(outputs: int, inputs: int, seed: int = 1) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-128, 128, (outputs, inputs), dtype=np.int8)


@pytest.mark.parametrize("tokens", [1, 3, 5, 64, 257])
@pytest.mark.parametrize("parameters", [PRESETS["standard"], TWO_LIMBS], ids=lambda p: p.name)
@pytest.mark.parametrize("forward", [True, False])
def test_the_bits_are_those_of_the_torch_worker(
    forward: bool, parameters: Parameters, tokens: int
) -> None:
    worker = MlweWorker(parameters, fused=False)
    for shape in SHAPES:
        weight = _weight(*shape)
        outputs, inputs = shape if forward else shape[::-1]
        planes = _planes(parameters.limbs, tokens, inputs)
        theirs = worker.multiply(planes.tobytes(), tokens, worker.load(weight, forward))
        ours = multiply(planes, pack(weight, forward), parameters.dropped_bits)
        assert ours.shape == (tokens, outputs)
        assert ours.dtype == np.uint16
        assert np.array_equal(ours.reshape(-1).view(np.uint8), theirs), shape


@pytest.mark.parametrize("digit", [-128, 127])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_extreme_digits_and_weights(tokens: int, limbs: int, value: int, digit: int) -> None:
    planes = np.full((limbs, tokens, 4096), digit, np.int8)
    weight = np.full((40, 4096), value, np.int8)
    assert np.array_equal(
        multiply(planes, pack(weight, True), 8), _expected(planes, weight, True, 8)
    )


@pytest.mark.parametrize(("limbs", "dropped_bits"), [(2, 0), (2, 8), (3, 8), (3, 16)])
def test_every_width_of_answer(limbs: int, dropped_bits: int) -> None:
    planes, weight = _planes(limbs, 6, 100), _weight(50, 100)
    ours = multiply(planes, pack(weight, True), dropped_bits)
    assert np.array_equal(ours, _expected(planes, weight, True, dropped_bits))


def test_sums_beyond_32_bits_wrap() -> None:
    planes = np.full((3, 2, 140_000), 127, np.int8)
    weight = np.full((2, 140_000), -128, np.int8)
    assert np.array_equal(
        multiply(planes, pack(weight, True), 8), _expected(planes, weight, True, 8)
    )


def test_a_request_longer_than_a_chunk() -> None:
    planes, weight = _planes(3, 300, 2048), _weight(45, 2048)
    assert np.array_equal(
        multiply(planes, pack(weight, True), 8), _expected(planes, weight, True, 8)
    )


def test_read_only_unaligned_and_strided_inputs() -> None:
    planes, weight = _planes(3, 5, 64), _weight(40, 64)
    expected = _expected(planes, weight, True, 8)
    weight.flags.writeable = False
    packed = pack(weight, True)
    unaligned = np.frombuffer(b"x" + planes.tobytes(), np.int8)[1:].reshape(planes.shape)
    assert np.array_equal(multiply(unaligned, packed, 8), expected)
    strided = np.repeat(planes, 2, axis=2)[:, :, ::2]
    assert np.array_equal(multiply(strided, packed, 8), expected)
    assert np.array_equal(multiply(planes, pack(weight[:, ::-1], True), 8),
                          _expected(planes, weight[:, ::-1], True, 8))  # fmt: skip


def test_a_packed_weight_takes_the_bytes_of_the_weight() -> None:
    weight = _weight(64, 128)
    assert all(pack(weight, forward).panels.nbytes == weight.nbytes for forward in (True, False))


def test_planes_that_do_not_fit_are_refused() -> None:
    packed = pack(_weight(8, 12), True)
    with pytest.raises(ValueError, match="do not fit"):
        multiply(_planes(3, 2, 8), packed, 8)
    with pytest.raises(ValueError, match="do not fit"):
        multiply(_planes(1, 2, 12), packed, 8)
