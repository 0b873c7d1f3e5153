"""Preparing on the device gives the CPU's bytes, and each part what it is defined to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he.cuda import hints
from backends.he.cuda.device import Gpu, GpuError, require_memory
from backends.he.cuda.hints import CudaHintBuilder, cuda_arithmetic, preparation_needs
from backends.he.manifest import GroupSpec
from backends.he.params import RING_DEGREE, preset
from backends.he.plan import MatrixPlan, plan_directions
from backends.he.preparation import prepare
from backends.he.public import HintBuilder, PublicMatrix
from backends.he.quantise import channel_scales, quantise

STANDARD = preset("exact")
PUBLIC = PublicMatrix(bytes(range(32)), STANDARD.rank)
ON_CPU = HintBuilder(PUBLIC)


def codes_of(rows: int, columns: int, seed: int) -> NDArray[np.int8]:
    """Random int8, the ends of the range far more often than by chance."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (rows, columns))
    return np.where(rng.random(values.shape) < 0.2, np.sign(values) * 127, values).astype(np.int8)


@pytest.fixture(scope="module")
def builder(gpu: Gpu) -> CudaHintBuilder:
    """One builder for widths in any order: the planes of A grow, and shorter ones are prefixes."""
    return CudaHintBuilder(PUBLIC, gpu)


@given(rows=st.integers(1, 80), columns=st.integers(1, 80), seed=st.integers(0, 99), forward=...)
@settings(max_examples=15, deadline=None)
def test_hints_are_those_of_the_cpu(
    builder: CudaHintBuilder, rows: int, columns: int, seed: int, forward: bool
) -> None:
    """Bit for bit, padding rows included."""
    weight = codes_of(rows, columns, seed)
    assert np.array_equal(builder.build(weight, forward), ON_CPU.build(weight, forward))


@pytest.mark.parametrize("forward", [True, False])
def test_hints_longer_than_a_chunk(
    builder: CudaHintBuilder, forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows recombined in several chunks, A split in several, and views of a larger weight."""
    monkeypatch.setattr(hints, "_CHUNK_TILES", 2)
    weight = codes_of(200, 131, 7)[3:, 5:] if forward else codes_of(131, 200, 8)[5:, 3:]
    assert np.array_equal(builder.build(weight, forward), ON_CPU.build(weight, forward))


def test_the_largest_products_recombine(builder: CudaHintBuilder, gpu: Gpu) -> None:
    """The recombination against Python's integers, at the ends of int32."""
    ends = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]
    rng = np.random.default_rng(3)
    products = rng.choice(ends, (4, 2, 32))
    sent = torch.from_numpy(products.astype(np.int32)).to(gpu.device)
    found = hints._recombined(sent).cpu().numpy()
    q = STANDARD.modulus
    for slot in range(2):
        for row in range(32):
            exact = sum(int(products[limb, slot, row]) << (8 * limb) for limb in range(4))
            value = int(found[row // 16, slot, row % 16])
            assert (value - exact) % q == 0
            assert abs(value) <= q // 2


def quantised_plainly(weight: torch.Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The definition in numpy: IEEE single division, ties to even."""
    values = weight.to(torch.float32).numpy()
    peak = np.abs(values).max(axis=1)
    step = np.maximum(peak / np.float32(127), np.finfo(np.float32).tiny)
    scale = np.where(peak > 0, step, np.float32(1)).astype(np.float32)
    return np.rint(values / scale[:, None]).clip(-127, 127).astype(np.int8), scale


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=...,
)
@settings(max_examples=40, deadline=None)
def test_quantisation_is_bit_identical(
    gpu: Gpu, rows: int, columns: int, seed: int, dtype: torch.dtype, transposed: bool
) -> None:
    """Codes and scales, over magnitudes from denormal to large, with zero rows and ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    exponents = torch.randint(-46, 4, (rows, 1), generator=generator)
    weight = (weight * 10.0**exponents).to(dtype)
    weight[seed % rows] = 0
    weight[seed % 7 % rows] = torch.arange(columns) + 0.5
    if transposed:
        weight = weight.t().contiguous().t()
    codes, scales = quantise(weight, device=gpu.device)
    plain_codes, plain_scales = quantised_plainly(weight)
    assert np.array_equal(codes, plain_codes)
    assert np.array_equal(scales, plain_scales)


def test_factors_of_channels_are_the_same_everywhere(gpu: Gpu) -> None:
    """And so is what is quantised with them."""
    weight = torch.randn(3000, 40, generator=torch.Generator().manual_seed(6))
    weight *= 2.0 ** torch.randint(-9, 9, (40,), generator=torch.Generator().manual_seed(7))
    channels = channel_scales([weight], gpu.device)
    assert np.array_equal(channels, channel_scales([weight]))
    assert len(set(channels.tolist())) > 5
    codes, scales = quantise(weight, 127, gpu.device, channels)
    plain_codes, plain_scales = quantised_plainly(weight * torch.from_numpy(channels))
    assert np.array_equal(codes, plain_codes)
    assert np.array_equal(scales, plain_scales)


def test_many_scales_are_true_quotients(gpu: Gpu) -> None:
    """A reciprocal in place of a division would be a bit off in some of these."""
    weight = torch.rand(3000, 2, generator=torch.Generator().manual_seed(5)) + 0.5
    codes, scales = quantise(weight, device=gpu.device)
    assert np.array_equal(scales, quantised_plainly(weight)[1])
    assert np.array_equal(codes, quantised_plainly(weight)[0])


def planned_plainly(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> MatrixPlan:
    """The definition, row by row in Python's integers."""
    rows = [[int(value) for value in row] for row in codes]
    squares = [sum(value * value for value in row) for row in rows]
    weights = [float(scale) ** 2 for scale in scales]
    weighted = float(np.dot(squares, weights))
    return MatrixPlan(
        max_norm=max(1, max(squares)) ** 0.5,
        max_l1=float(max(sum(map(abs, row)) for row in rows)),
        noise_gain=sum(weights) / weighted if weighted else 1.0,
        in_features=codes.shape[1],
    )


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99), zero=...)
@settings(max_examples=20, deadline=None)
def test_plans_are_exact(gpu: Gpu, rows: int, columns: int, seed: int, zero: bool) -> None:
    """On the device as on the CPU, and both as defined."""
    codes = codes_of(rows, columns, seed) * np.int8(not zero)
    scales = np.random.default_rng(seed).uniform(0.001, 0.1, rows).astype(np.float32)
    channels = 2.0 ** np.random.default_rng(seed).integers(-3, 4, columns).astype(np.float32)
    plans = plan_directions(codes, scales, preset("thin"), device=gpu.device, channels=channels)
    assert plans == plan_directions(codes, scales, preset("thin"), channels=channels)
    plain = (
        planned_plainly(codes, scales),
        planned_plainly(codes.T, 1 / channels),
    )
    for found, expected in zip(plans, plain, strict=True):
        assert (found.max_norm, found.max_l1, found.in_features) == (
            expected.max_norm,
            expected.max_l1,
            expected.in_features,
        )
        assert found.noise_gain == pytest.approx(expected.noise_gain, rel=1e-12)


GROUPS = [
    GroupSpec("a.q+k", ("a.q", "a.k"), 72, (100, 37)),
    GroupSpec("a.o", ("a.o",), 33, (90,)),
    GroupSpec("b", ("b",), 1, (5,)),
]
SHAPES = {"a.q": (100, 72), "a.k": (37, 72), "a.o": (90, 33), "b": (5, 1)}


def load(module: str) -> torch.Tensor:
    """A random weight."""
    generator = torch.Generator().manual_seed(sum(map(ord, module)))
    return torch.randn(SHAPES[module], generator=generator)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_what_is_written_is_the_same(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a preparation, byte for byte."""
    prepare(tmp_path / "cpu", GROUPS, load, STANDARD, lambda label, done: None)
    monkeypatch.setattr("backends.he.preparation.HINT_SLAB", 64)
    prepare(
        tmp_path / "gpu",
        GROUPS,
        load,
        STANDARD,
        lambda label, done: None,
        arithmetic=cuda_arithmetic(gpu),
    )
    assert content(tmp_path / "gpu") == content(tmp_path / "cpu")


def test_the_stated_need_is_refused_and_enough(gpu: Gpu) -> None:
    """Too little memory is said with the parts; on a GPU, the peak stays below what is stated."""
    needs = preparation_needs(GROUPS, STANDARD)
    small = Gpu(torch.device("cpu"), "small", (0, 0), sum(needs.values()) - 1, 1)
    with pytest.raises(GpuError, match=r"limb planes of A .*prepare elsewhere"):
        require_memory(small, needs, "prepare elsewhere")
    assert "limb planes of A" not in preparation_needs(GROUPS, None)
    if gpu.device.type == "cuda":
        _measure_peak(gpu)


def _measure_peak(gpu: Gpu) -> None:
    group = GroupSpec("g", ("g",), 4096, (2048,))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(gpu.device)
    before = torch.cuda.memory_allocated(gpu.device)
    weight = torch.randn(2048, 4096)
    channels = channel_scales([weight], gpu.device)
    codes, scales = quantise(weight, 127, gpu.device, channels)
    plan_directions(codes, scales, preset("thin"), device=gpu.device, channels=channels)
    builder = CudaHintBuilder(PUBLIC, gpu)
    assert builder.build(codes, False).shape == (256, STANDARD.rank, RING_DEGREE, 16)
    builder.build(codes, True)
    peak = torch.cuda.max_memory_allocated(gpu.device) - before
    # cuBLASLt keeps a workspace of its own, 32 MiB on Hopper.
    assert peak <= sum(preparation_needs([group], STANDARD).values()) + (64 << 20)
