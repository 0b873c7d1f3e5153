"""Every kernel gives the very bits of 64-bit integer arithmetic, on this machine or spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llvmlite import binding
from numba import config
from numpy.typing import NDArray

from backends.he.matmul import isa
from backends.he.matmul.choice import NAMES, VARIABLE, KernelError, chosen_kernel, runnable
from backends.he.matmul.interface import Kernel
from backends.he.matmul.tiled import TiledKernel
from tests.he.plain_dots import plain, tile_module

NATIVE = {name: make() for name, make in runnable().items()}
SPELLED_OUT = {
    f"{each.name}-plain": TiledKernel(plain(each)) for each in isa.ALL if not each.supported()
}
KERNELS: dict[str, Kernel] = NATIVE | SPELLED_OUT
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())

# (N, K): whole panels and steps, one ragged side, both, smaller than a panel or a step, slices
SHAPES = [(64, 128), (96, 200), (37, 64), (33, 71), (5, 3), (1, 1), (130, 1030), (17, 513)]


def _answer(
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


@kernels
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
def test_answers(kernel: Kernel, tokens: int, limbs: int) -> None:
    for shape in SHAPES:
        weight = _weight(*shape)
        for forward in (True, False):
            outputs, inputs = shape if forward else shape[::-1]
            planes = _planes(limbs, tokens, inputs)
            found = kernel.answer(planes, kernel.pack(weight, forward), 8)
            assert found.shape == (tokens, outputs)
            assert found.dtype == np.uint16
            assert np.array_equal(found, _answer(planes, weight, forward, 8)), (shape, forward)


@kernels
@pytest.mark.parametrize("digit", [-128, 127])
@pytest.mark.parametrize("value", [-128, 127])
def test_extreme_digits_and_weights(kernel: Kernel, value: int, digit: int) -> None:
    for limbs in (2, 3):
        for tokens in (1, 70):
            planes = np.full((limbs, tokens, 4096), digit, np.int8)
            weight = np.full((40, 4096), value, np.int8)
            found = kernel.answer(planes, kernel.pack(weight, True), 8)
            assert np.array_equal(found, _answer(planes, weight, True, 8))


@kernels
def test_every_16_bit_digit_and_its_carry(kernel: Kernel) -> None:
    """All pairs of lower limbs, with every upper limb, against weights that show each one alone."""
    low, middle = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    high = np.resize(np.arange(-128, 128), low.size)
    planes = np.stack([low.ravel(), middle.ravel(), high]).astype(np.int8).reshape(3, 256, 256)
    weight = np.concatenate([np.eye(256, dtype=np.int8), -np.eye(256, dtype=np.int8)])
    found = kernel.answer(planes, kernel.pack(weight, True), 8)
    assert np.array_equal(found, _answer(planes, weight, True, 8))


@kernels
def test_every_value_of_two_limbs(kernel: Kernel) -> None:
    low, high = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    planes = np.stack([low.ravel(), high.ravel()]).astype(np.int8).reshape(2, 256, 256)
    weight = np.concatenate([np.eye(256, dtype=np.int8), -np.eye(256, dtype=np.int8)])
    found = kernel.answer(planes, kernel.pack(weight, True), 0)
    assert np.array_equal(found, _answer(planes, weight, True, 0))


@kernels
@pytest.mark.parametrize(
    ("limbs", "dropped_bits"), [(2, 0), (2, 4), (2, 6), (2, 8), (3, 8), (3, 12), (3, 14), (3, 16)]
)
def test_every_width_of_answer(kernel: Kernel, limbs: int, dropped_bits: int) -> None:
    planes, weight = _planes(limbs, 6, 100), _weight(50, 100)
    found = kernel.answer(planes, kernel.pack(weight, True), dropped_bits)
    assert np.array_equal(found, _answer(planes, weight, True, dropped_bits))


@kernels
def test_sums_beyond_32_bits_wrap(kernel: Kernel) -> None:
    planes = np.full((3, 2, 140_000), 127, np.int8)
    weight = np.full((2, 140_000), -128, np.int8)
    found = kernel.answer(planes, kernel.pack(weight, True), 8)
    assert np.array_equal(found, _answer(planes, weight, True, 8))


@kernels
@pytest.mark.parametrize(("limbs", "tokens"), [(2, 600), (3, 300)])
def test_a_request_longer_than_a_chunk(kernel: Kernel, limbs: int, tokens: int) -> None:
    planes, weight = _planes(limbs, tokens, 2048), _weight(45, 2048)
    found = kernel.answer(planes, kernel.pack(weight, True), 8)
    assert np.array_equal(found, _answer(planes, weight, True, 8))


@kernels
def test_read_only_unaligned_and_strided_inputs(kernel: Kernel) -> None:
    planes, weight = _planes(3, 5, 64), _weight(40, 64)
    expected = _answer(planes, weight, True, 8)
    weight.flags.writeable = False
    packed = kernel.pack(weight, True)
    unaligned = np.frombuffer(b"x" + planes.tobytes(), np.int8)[1:].reshape(planes.shape)
    assert np.array_equal(kernel.answer(unaligned, packed, 8), expected)
    strided = np.repeat(planes, 2, axis=2)[:, :, ::2]
    assert np.array_equal(kernel.answer(strided, packed, 8), expected)
    backwards = weight[:, ::-1]
    found = kernel.answer(planes, kernel.pack(backwards, True), 8)
    assert np.array_equal(found, _answer(planes, backwards, True, 8))


@kernels
def test_what_does_not_fit_is_refused(kernel: Kernel) -> None:
    packed = kernel.pack(_weight(8, 12), True)
    for limbs, inputs in ((3, 8), (1, 12), (4, 12)):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.answer(_planes(limbs, 2, inputs), packed, 8)
    for planes in (_planes(3, 0, 12), _planes(3, 2, 12).view(np.uint8), _planes(3, 2, 12)[0]):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.answer(planes, packed, 8)
    for weight in (np.zeros((0, 4), np.int8), np.zeros((4, 0), np.int8), np.zeros(4, np.int8)):
        with pytest.raises(ValueError, match="a weight"):
            kernel.pack(weight, True)
    with pytest.raises(ValueError, match="not uint8"):
        kernel.pack(_weight(8, 12).view(np.uint8), True)
    with pytest.raises(ValueError, match="1 to 1048576"):
        kernel.pack(np.broadcast_to(np.int8(1), (2, (1 << 20) + 1)), True)
    for values in (np.zeros((0, 4), np.int32), np.zeros((4, 0), np.int32), np.zeros((1, 4))):
        with pytest.raises(ValueError, match="values"):
            kernel.digits_of(values)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.exact(kernel.digits_of(np.zeros((2, 8), np.int32)), packed)


@kernels
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 700), outputs=st.integers(1, 70),
    size=st.sampled_from([1, 127, 1 << 15, 1 << 30]), forward=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
@example(rows=3, inputs=5000, outputs=3, size=1 << 30, forward=True, seed=0)
@example(rows=1, inputs=40_000, outputs=2, size=1 << 30, forward=False, seed=0)
def test_exact_products(
    kernel: Kernel, rows: int, inputs: int, outputs: int, size: int, forward: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(-size, size + 1, (rows, inputs), np.int32)
    weight = _weight(outputs, inputs, seed) if forward else _weight(inputs, outputs, seed)
    found = kernel.exact(kernel.digits_of(values), kernel.pack(weight, forward))
    assert found.dtype == np.int64
    matrix = (weight.T if forward else weight).astype(np.int64)
    assert np.array_equal(found, values.astype(np.int64) @ matrix)


@kernels
@pytest.mark.parametrize("inputs", [512, 2048, 16_384])
@pytest.mark.parametrize("value", [-(1 << 30), 1 << 30, -(1 << 15), -(1 << 12), -128])
def test_exact_products_at_their_bounds(kernel: Kernel, value: int, inputs: int) -> None:
    """Where all digits and weights are at their ends a sum of digits reaches 2^31."""
    values = np.full((2, inputs), value, np.int32)
    for end in (-128, 127):
        weight = np.full((3, inputs), end, np.int8)
        found = kernel.exact(kernel.digits_of(values), kernel.pack(weight, True))
        assert (found == value * end * inputs).all()


def test_a_packed_weight_takes_the_bytes_of_the_weight() -> None:
    weight = _weight(64, 128)
    for each in isa.ALL:
        kernel = TiledKernel(each)
        sizes = [kernel.pack(weight, forward).panels.nbytes for forward in (True, False)]
        assert sizes == [weight.nbytes] * 2


@pytest.mark.parametrize(
    ("target", "triple", "cpu", "instruction"),
    [
        (isa.AVX512_VNNI, "x86_64-linux-gnu", "icelake-server", "vpdpbusd"),
        (isa.AVX_VNNI, "x86_64-linux-gnu", "alderlake", "vpdpbusd"),
        (isa.AVX2, "x86_64-linux-gnu", "haswell", "vpmaddwd"),
        (isa.NEON, "aarch64-linux-gnu", "generic", "sdot"),
        (isa.NEON, "arm64-apple-darwin", "apple-m1", "sdot"),
    ],
    ids=lambda value: value.name if isinstance(value, isa.InstructionSet) else str(value),
)
def test_tiles_compile_for_their_processors(
    target: isa.InstructionSet, triple: str, cpu: str, instruction: str
) -> None:
    """The loop of a full tile: the one instruction for every accumulator, and nothing spilled."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = binding.parse_assembly(str(tile_module(target, target.rows)))
    module.triple = triple
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    lines = machine.emit_assembly(module).splitlines()
    # "{vex} vpdpbusd" where there are two encodings, "sdot.4s" in Apple's syntax
    words = [[*line.split()[:2], "", ""] for line in lines]
    found = [i for i, (a, b, *_) in enumerate(words) if instruction in (a.split(".")[0], b)]
    assert len(found) == target.rows * target.registers
    loop = lines[found[0] : found[-1]]
    spills = [line for line in loop if "rsp" in line or "[sp" in line]
    assert not spills


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    best = next(iter(NATIVE))
    assert chosen_kernel().name == best
    monkeypatch.setenv(VARIABLE, " Generic ")
    assert chosen_kernel().name == "generic"
    assert "times as long" in chosen_kernel().warning
    monkeypatch.setattr(config, "CPU_FEATURES", "")  # numba compiles for a processor without any
    assert not any(each.supported() for each in isa.ALL if each.architecture == "x86_64")
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, "mmx")
    with pytest.raises(KernelError, match=r"no kernel 'mmx'; choose one of .*generic"):
        chosen_kernel()
    for name in set(NAMES) - set(NATIVE):
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(KernelError, match="lacks its instructions"):
            chosen_kernel()
