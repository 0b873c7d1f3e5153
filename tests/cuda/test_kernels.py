"""The CUDA kernels one by one: against slow definitions, at their bounds, in any thread order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he import check
from backends.he.cuda.device import Gpu
from backends.he.cuda.launch import Kernels
from backends.he.cuda.owner import key_words
from backends.he.mlwe_owner import token_scales
from backends.he.params import NTT_PRIME as Q
from backends.he.params import RING_DEGREE
from backends.he.public import expand_tile
from backends.he.reference import evaluation_matrix, inverse_evaluation_matrix, matmul_mod
from backends.he.ring import secret_to_ntt
from tests.cuda.slow import chacha20, slow_ternary
from tests.he.conftest import make_case

pytestmark = pytest.mark.usefixtures("compiler")
PROBES = Path(__file__).with_name("probes.cu").read_text()
HALF = Q // 2
INVERSE = pow(1 << 32, -1, Q)
RANKS = (1, 5, 8)
KEY = bytes(range(100, 132))
quick = settings(max_examples=30, deadline=None)


@cache
def probed(gpu: Gpu, rank: int = 5, limbs: int = 3) -> Kernels:
    return Kernels(gpu, rank, limbs, PROBES)


def on(gpu: Gpu, array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(gpu.device)


def empty(gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros, by way of bytes: torch does little with unsigned words."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.zeros(size, dtype=torch.uint8, device=gpu.device).view(dtype).view(shape)


def chacha_block(gpu: Gpu, key: bytes, counter: int, nonce: tuple[int, int, int]) -> bytes:
    out = empty(gpu, (16,), torch.uint32)
    probed(gpu).launch("probe_chacha", (1, 1), out, *key_words(bytearray(key)), counter, *nonce)
    return out.cpu().numpy().tobytes()


def test_chacha20_is_rfc_8439(gpu: Gpu) -> None:
    """The example of section 2.3.2."""
    expected = (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert chacha_block(gpu, bytes(range(32)), 1, (0x09000000, 0x4A000000, 0)).hex() == expected


words32 = st.integers(0, 2**32 - 1)


@quick
@given(key=st.binary(min_size=32, max_size=32), counter=words32, n0=words32, n1=words32, n2=words32)
def test_chacha20_is_the_librarys(
    gpu: Gpu, key: bytes, counter: int, n0: int, n1: int, n2: int
) -> None:
    """Any key, nonce and counter."""
    nonce = (n0, n1, n2)
    assert chacha_block(gpu, key, counter, nonce) == chacha20(key, counter, nonce, 64).tobytes()


def slots(gpu: Gpu, rows: NDArray[np.int32], secret: NDArray[np.int32]) -> NDArray[np.uint32]:
    """uint32[256, 16] from int32[rank, 256, 16] and int32[rank, 256]."""
    out = empty(gpu, (RING_DEGREE, 16), torch.uint32)
    probed(gpu, len(rows)).launch("probe_slots", (1, 1), on(gpu, rows), on(gpu, secret), out)
    return out.cpu().numpy()


def exact_slots(rows: NDArray[np.int32], secret: NDArray[np.int32]) -> NDArray[np.uint32]:
    """The same in unbounded integers."""
    total = (rows.astype(object) * secret.astype(object)[:, :, None]).sum(axis=0)
    return (total * INVERSE % Q).astype(np.uint32)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_reduced(gpu: Gpu, rank: int, sign: int) -> None:
    """All residues near the edge: sums as large as they can be, with any low half."""
    draw = np.random.default_rng(rank).integers
    rows = (HALF - draw(0, 1000, (rank, RING_DEGREE, 16))).astype(np.int32)
    secret = (sign * (HALF - draw(0, 1000, (rank, RING_DEGREE)))).astype(np.int32)
    assert np.array_equal(slots(gpu, rows, secret), exact_slots(rows, secret))


edges = st.sampled_from([-HALF, 1 - HALF, -1, 0, 1, HALF - 1, HALF])
residues = edges | st.integers(-HALF, HALF)


@quick
@given(rank=st.sampled_from(RANKS), data=st.data())
def test_any_residues_are_reduced(gpu: Gpu, rank: int, data: st.DataObject) -> None:
    """Edges and anything between, a few at a time, over all lanes and slots."""
    few = st.lists(residues, min_size=7, max_size=7)
    rows = np.resize(np.array(data.draw(few), np.int32), (rank, RING_DEGREE, 16))
    secret = np.resize(np.array(data.draw(few), np.int32)[:5], (rank, RING_DEGREE))
    assert np.array_equal(slots(gpu, rows, secret), exact_slots(rows, secret))


def draw_secrets(gpu: Gpu, kernels: Kernels, blocks: int, rank: int) -> torch.Tensor:
    out = empty(gpu, (blocks, rank, RING_DEGREE), torch.int32)
    kernels.launch("draw_secrets", (blocks, rank), out, *key_words(bytearray(KEY)))
    return out


@pytest.mark.parametrize("rank", RANKS)
def test_secrets_are_transformed_like_the_cpus(gpu: Gpu, rank: int) -> None:
    """The NTT of the slow definition's ternary values, and by a matrix of powers of psi."""
    found = draw_secrets(gpu, probed(gpu, rank), 2, rank).cpu().numpy()
    ternary = slow_ternary(KEY, 2, rank)
    assert set(np.unique(ternary)) == {-1, 0, 1}
    assert np.array_equal(found, np.stack([secret_to_ntt(block) for block in ternary]))
    slow = matmul_mod(ternary[0].astype(np.int64) % Q, evaluation_matrix().T.copy())
    factor = (1 << 32) * pow(RING_DEGREE, -1, Q) % Q
    assert np.array_equal(found[0].astype(object) % Q, slow.astype(object) * factor % Q)


def test_a_mask_is_the_inverse_transform(gpu: Gpu) -> None:
    """Three tiles, so that the last pair is half empty, against a matrix of powers of psi."""
    matrix = np.stack([expand_tile(bytes(32), tile, 5) for tile in range(3)])
    secret = slow_ternary(KEY, 1, 5)[0]
    evaluated = matmul_mod(secret.astype(np.int64) % Q, evaluation_matrix().T.copy())
    rows = matrix.transpose(0, 3, 1, 2).reshape(48, 5, RING_DEGREE).astype(np.int64) % Q
    products = np.zeros((48, RING_DEGREE), np.int64)
    for k in range(5):
        products = (products + rows[:, k] * evaluated[k] % Q) % Q
    expected = matmul_mod(inverse_evaluation_matrix(), products.T.copy())
    words = on(gpu, secret_to_ntt(secret))
    for first, count in ((0, 32), (32, 16)):
        out = empty(gpu, (RING_DEGREE, 32), torch.uint32)
        tiles = on(gpu, matrix[first // 16 :])
        probed(gpu).launch("probe_mask", (1, 1), tiles, words, out, len(tiles))
        assert np.array_equal(out.cpu().numpy()[:, :count], expected[:, first : first + count])


def scales(
    gpu: Gpu, x: NDArray[np.float32], in_scale: NDArray[np.float32],
    amplitude: float = 1e6, ratio: float = 128.5,
) -> list[Any]:  # fmt: skip
    """[norms, factor, inverse, bad] of tokens x; ratio is q/p."""
    tokens, inputs = x.shape
    outs = [empty(gpu, (tokens,), torch.float64) for _ in range(3)]
    bad = empty(gpu, (1,), torch.int32)
    probed(gpu).launch(
        "token_scales", (tokens, 1), on(gpu, x), on(gpu, in_scale), *outs, bad, inputs,
        amplitude, ratio,
    )  # fmt: skip
    return [*(out.cpu().numpy() for out in outs), bool(bad.item())]


@quick
@given(
    tokens=st.integers(1, 5),
    inputs=st.integers(1, 600),
    magnitude=st.floats(-44, 38),
    seed=st.integers(0, 2**32 - 1),
)
def test_token_scales_are_the_cpus(
    gpu: Gpu, tokens: int, inputs: int, magnitude: float, seed: int
) -> None:
    """Down to denormal inputs and up to the largest, rows of zeros among them."""
    rng = np.random.default_rng(seed)
    x = (rng.uniform(-1, 1, (tokens, inputs)) * 10.0**magnitude).astype(np.float32)
    x[::3] = 0
    in_scale = rng.uniform(0.001, 100, inputs).astype(np.float32)
    norms, factor, inverse, bad = scales(gpu, x, in_scale)
    exact = np.sqrt(np.sum((x.astype(np.float64) * in_scale.astype(np.float64)) ** 2, axis=1))
    assert not bad
    assert np.allclose(norms, exact, rtol=1e-13, atol=0)
    zero = exact < 1e-200
    assert np.array_equal(inverse == 0, zero)
    # A norm rounded up to 20 bits: never below, never 2^-19 above.
    up = inverse[~zero] * 1e6
    assert np.all((up >= norms[~zero] * (1 - 1e-15)) & (up <= norms[~zero] * (1 + 2.0**-18)))
    assert np.array_equal(factor[zero], np.full(zero.sum(), 128.5))
    assert np.allclose(factor[~zero] * inverse[~zero], 128.5, rtol=1e-14)


def test_token_scales_are_the_cpus_bit_for_bit(gpu: Gpu) -> None:
    """The same plan, the same doubles."""
    case = make_case(300, 20)
    x = np.random.default_rng(0).standard_t(3, (40, 300)).astype(np.float32)
    x[7] = 0
    norms = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=1))
    expected, inverse = np.empty(40), np.empty(40)
    token_scales(norms, case.matrix, case.parameters, 1.5, expected, inverse)
    amplitude, ratio = case.matrix.plan.amplitude(case.parameters, 1.5), Q / (1 << 24)
    _, factor, found_inverse, _ = scales(gpu, x, case.matrix.in_scale, amplitude, ratio)
    assert np.array_equal(factor, expected)
    assert np.array_equal(found_inverse, inverse)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 299), (1, 256)])
def test_non_finite_tokens_are_flagged(gpu: Gpu, bad: float, place: tuple[int, int]) -> None:
    """Anywhere in a token; a large finite one is not."""
    x = np.full((4, 300), 3e38, np.float32)
    ones = np.ones(300, np.float32)
    assert not scales(gpu, x, ones)[3]
    x[place] = bad
    assert scales(gpu, x, ones)[3]


def encrypted(gpu: Gpu, kernels: Kernels, each: int) -> NDArray[np.int8]:
    """Planes of 700 tokens, 40 inputs, a fixed key; `each` blocks a thread block."""
    case = make_case(40, 16)
    x = np.random.default_rng(0).standard_normal((700, 40)).astype(np.float32)
    words = draw_secrets(gpu, kernels, 3, 5)
    planes = empty(gpu, (3, 700, 40), torch.int8)
    matrix = on(gpu, case.public.rows(40))
    kernels.launch(
        "encrypt", (-(-3 // each), 2), matrix, words, on(gpu, x), on(gpu, case.matrix.in_scale),
        torch.full((700,), 1e5, dtype=torch.float64, device=gpu.device), planes, 700, 40, 3, each,
        0, *key_words(bytearray(KEY)),
    )  # fmt: skip
    return planes.cpu().numpy()


def decrypted(gpu: Gpu, kernels: Kernels, each: int) -> NDArray[np.float32]:
    """700 tokens, 40 outputs of a random answer; `each` blocks a thread block."""
    case = make_case(16, 40)
    answer = np.random.default_rng(1).integers(0, 1 << 16, (700, 40)).astype(np.uint16)
    words = draw_secrets(gpu, kernels, 3, 5)
    out = empty(gpu, (700, 40), torch.float32)
    hint = case.matrix.hint
    assert hint is not None
    kernels.launch(
        "decrypt", (-(-3 // each), 2), on(gpu, hint), words, on(gpu, answer),
        torch.full((700,), 1e-3, dtype=torch.float64, device=gpu.device),
        on(gpu, case.matrix.out_scale), out, 700, 40, 0, 3, each, 8, 0,
    )  # fmt: skip
    return out.cpu().numpy()


def expectations(gpu: Gpu, kernels: Kernels) -> NDArray[np.float64]:
    """float64[9, 8] of heavy-tailed data, 300 inputs."""
    rng = np.random.default_rng(2)
    x = rng.standard_t(2, (9, 300)).astype(np.float32)
    in_scale = rng.uniform(0.1, 1, 300).astype(np.float32)
    factor, rows = rng.uniform(1e5, 1e6, 9), rng.permutation(64)[:8]
    projected = rng.normal(0, 1e4, (64, 300)).astype(np.float32)
    out = empty(gpu, (9, 8), torch.float64)
    kernels.launch(
        "expectations", (5, 1), on(gpu, x), on(gpu, in_scale), on(gpu, factor), on(gpu, projected),
        on(gpu, rows.astype(np.int32)), out, 9, 300, 2**-7,
    )  # fmt: skip
    expected = np.zeros((9, 8))
    check._expected(x, in_scale, factor, projected, rows, expected, 0, 300)
    expected *= 2**-7
    found = out.cpu().numpy()
    message = np.abs(x * factor[:, None])
    assert np.all(np.abs(found - expected) <= 2**-45 * message @ np.abs(projected[rows]).T)
    return found


def differences(gpu: Gpu, kernels: Kernels) -> NDArray[np.float64]:
    """float64[9, 8] of random results, 270 outputs; below them some of what is delivered."""
    rng = np.random.default_rng(3)
    y = rng.integers(-(1 << 23), 1 << 23, (9, 270)).astype(np.float32)
    pool = rng.uniform(-1, 1, (64, 270)).astype(np.float32)
    rows, values = rng.permutation(64)[:8], rng.normal(0, 1e8, (9, 8))
    inverse, out_scale = rng.uniform(0, 1, 9), rng.uniform(0, 1e-42, 270).astype(np.float32)
    scaled, out = on(gpu, y.copy()), empty(gpu, (9, 8), torch.float64)
    kernels.launch(
        "differences", (5, 1), scaled, on(gpu, pool), on(gpu, rows.astype(np.int32)),
        on(gpu, values), on(gpu, inverse), on(gpu, out_scale), out, 9, 270,
    )  # fmt: skip
    expected = -values
    parts = np.abs(y).astype(np.float64) @ np.abs(pool[rows]).T + np.abs(values)
    coefficients, peaks = pool[rows], np.zeros(9, np.float32)
    check._found(y, coefficients, inverse, out_scale, expected, peaks, 0, 270)
    found = out.cpu().numpy()
    assert np.all(np.abs(found - expected) <= 2**-45 * parts)
    assert np.array_equal(scaled.cpu().numpy(), y), "denormals included"
    return np.concatenate([found, y[:, :8].astype(np.float64)])


@pytest.mark.parametrize("sums", [expectations, differences])
def test_sums_of_the_check_are_the_cpus(
    gpu: Gpu, sums: Callable[[Gpu, Kernels], NDArray[np.float64]]
) -> None:
    """To 2^-45 of their parts: only the order of summation differs."""
    assert np.isfinite(sums(gpu, probed(gpu))).all()


@pytest.mark.parametrize("work", [encrypted, decrypted])
def test_blocks_may_share_a_thread_block(
    gpu: Gpu, work: Callable[[Gpu, Kernels, int], NDArray[Any]]
) -> None:
    """One, two or all three secrets each: the same results."""
    alone = work(gpu, probed(gpu), 1)
    for each in (2, 3):
        assert np.array_equal(alone, work(gpu, probed(gpu), each))


@pytest.fixture
def choose_order(gpu: Gpu) -> Iterator[Callable[[int], None]]:
    """Sets the order in which emulated threads run."""
    if gpu.device.type == "cuda":
        pytest.skip("threads of a GPU run in their own order")
    choose = probed(gpu)._module.choose_order  # type: ignore[attr-defined]
    yield choose
    choose(0)


def raced(gpu: Gpu, kernels: Kernels) -> NDArray[np.int32]:
    out = empty(gpu, (64,), torch.int32)
    kernels.launch("probe_race", (1, 1), out)
    return out.cpu().numpy()


ORDERS = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "work",
    [
        lambda gpu, kernels: draw_secrets(gpu, kernels, 2, 5).numpy(),
        lambda gpu, kernels: encrypted(gpu, kernels, 2),
        lambda gpu, kernels: decrypted(gpu, kernels, 2),
        expectations,
        differences,
    ],
    ids=["draw_secrets", "encrypt", "decrypt", "expectations", "differences"],
)
def test_no_barrier_is_missing(
    gpu: Gpu, choose_order: Callable[[int], None], work: Callable[[Gpu, Kernels], NDArray[Any]]
) -> None:
    """Whatever order threads run in within a phase, the results are the same."""
    results = []
    for order in ORDERS:
        choose_order(order)
        results.append(work(gpu, probed(gpu)))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_missing_barrier_would_show(gpu: Gpu, choose_order: Callable[[int], None]) -> None:
    """A kernel that lacks one gives other results in another order."""
    results = set()
    for order in ORDERS:
        choose_order(order)
        results.add(raced(gpu, probed(gpu)).tobytes())
    assert len(results) == len(ORDERS)
