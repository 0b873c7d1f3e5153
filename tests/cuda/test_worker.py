"""The GPU worker gives the reference worker's bits: both products, every way in, any joining."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he import packing as host_packing
from backends.he.cuda.device import Gpu
from backends.he.cuda.gemm import Product, fused_product, library_product
from backends.he.cuda.packing import pack_answer, unpack_request
from backends.he.cuda.tiling import (
    AMPERE_LARGE,
    AMPERE_SMALL,
    HOPPER,
    HOPPER_LARGE,
    HOPPER_SMALL,
    Kernel,
    Tiling,
    candidates,
)
from backends.he.cuda.worker import MAX_INPUTS, CudaWorker
from backends.he.interface import Payload
from backends.he.wire import EXACT, Format
from tests.he import plain_wire

FORMATS = [EXACT, Format(16, 8), Format(18, 10), Format(20, 12)]  # each width, up and down
SMALL_TILES = (
    Tiling(Kernel.BULK, 16, 32, 32, 4, 2),
    Tiling(Kernel.POINTERS, 16, 32, 32, 4, 2, group=2),
)


def require(gpu: Gpu, tiling: Tiling) -> None:
    """Skip what cannot run here."""
    on_gpu = gpu.device.type == "cuda"
    if tiling.kernel is Kernel.ASYNC and gpu.capability != HOPPER:
        pytest.skip("needs a Hopper GPU: Gluon has no interpreter")
    if tiling.kernel is Kernel.BULK and on_gpu and gpu.capability != HOPPER:
        pytest.skip("this GPU has no bulk copy engine")


def random_case(
    format: Format, tokens: int, inputs: int, outputs: int, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """A request and a weight int8[outputs, inputs]."""
    rng = np.random.default_rng(seed)
    request = rng.integers(0, 256, tokens * format.up_bytes(inputs), np.uint8)
    return request, rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)


def reference(
    format: Format, request: NDArray[np.uint8], tokens: int, weight: NDArray[np.int8]
) -> bytes:
    """The answer by definition."""
    return plain_wire.answer(request.tobytes(), tokens, weight, format.up_bits, format.down_bits)


def as_bytes(answer: torch.Tensor | NDArray[np.uint8]) -> bytes:
    """An answer's bytes, wherever it is."""
    if isinstance(answer, torch.Tensor):
        answer = answer.cpu().numpy()
    return answer.tobytes()


@settings(max_examples=12, deadline=None)
@given(
    format=st.sampled_from([EXACT, Format(16, 16), Format(16, 8), Format(24, 10)]),
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 5).map(lambda n: 16 * n),
    outputs=st.integers(1, 70),
    tiling=st.sampled_from(SMALL_TILES),
    seed=st.integers(0, 99),
)
def test_kernel_is_the_definition(
    gpu: Gpu,
    format: Format,
    tokens: int,
    inputs: int,
    outputs: int,
    tiling: Tiling,
    seed: int,
) -> None:
    """Ragged tokens and outputs, both ways of reading tiles, both limb counts."""
    request, weight = random_case(format, tokens, inputs, outputs, seed)
    planes = torch.from_numpy(request.view(np.int8)).to(gpu.device)
    planes = planes.view(format.limbs, tokens, inputs)
    stored = torch.from_numpy(weight).to(gpu.device)
    right = reference(format, request, tokens, weight)
    for found in (
        fused_product(planes, stored, format.dropped_bits, tiling),
        library_product(planes, stored, format.dropped_bits),
    ):
        assert as_bytes(pack_answer(found, format)) == right


@pytest.mark.parametrize(
    "tiling",
    [*HOPPER_LARGE, *HOPPER_SMALL, *AMPERE_LARGE, *AMPERE_SMALL],
    ids=lambda tiling: tiling.name,
)
def test_every_tiling_is_exact(gpu: Gpu, tiling: Tiling) -> None:
    """Each shape in use, at the extremes of the digits, with edges on all three sides."""
    require(gpu, tiling)
    tokens, inputs, outputs = tiling.tokens + 3, tiling.inputs + 16, tiling.outputs + 5
    request, weight = random_case(EXACT, tokens, inputs, outputs)
    request[: request.size // 3] = 128  # the digit -128
    weight[::2] = 127
    planes = torch.from_numpy(request.view(np.int8)).to(gpu.device).view(3, tokens, inputs)
    stored = torch.from_numpy(weight).to(gpu.device)
    found = fused_product(planes, stored, EXACT.dropped_bits, tiling)
    assert as_bytes(found.view(torch.uint8)) == reference(EXACT, request, tokens, weight)


@pytest.mark.parametrize("tokens", [1, 63, 777, 4099])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 8192), (8192, 2048), (2048, 3080)])
def test_sizes_of_a_real_model(gpu: Gpu, tokens: int, inputs: int, outputs: int) -> None:
    """On a GPU: programs that go through many tiles, each way to cut it, against the library."""
    if gpu.device.type != "cuda":
        pytest.skip("needs a GPU")
    draw = torch.Generator(gpu.device).manual_seed(tokens)
    shape = (3, tokens, inputs)
    planes = torch.randint(-128, 128, shape, dtype=torch.int8, device=gpu.device, generator=draw)
    weight = torch.randint(
        -127, 128, (outputs, inputs), dtype=torch.int8, device=gpu.device, generator=draw
    )
    right = library_product(planes, weight, 8)
    for tiling in candidates(gpu.capability, tokens):
        assert torch.equal(fused_product(planes, weight, 8, tiling), right), tiling
    few = slice(0, min(tokens, 40))
    on_cpu = library_product(planes[:, few].cpu().contiguous(), weight.cpu(), 8)
    assert torch.equal(right[few].cpu(), on_cpu)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 9),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_packing_is_the_hosts(
    gpu: Gpu, format: Format, tokens: int, inputs: int, outputs: int, seed: int
) -> None:
    """Any bytes, those past the end of a row included."""
    draw = np.random.default_rng(seed)
    payload = draw.integers(0, 256, tokens * format.up_bytes(inputs), np.uint8)
    planes = torch.zeros((format.limbs, tokens, inputs + 3), dtype=torch.uint8, device=gpu.device)
    unpack_request(torch.from_numpy(payload).to(gpu.device), format, planes[:, :, :inputs])
    found = planes[:, :, :inputs].cpu().numpy().view(np.int8)
    assert np.array_equal(found, host_packing.unpack_request(payload, tokens, inputs, format))
    assert not planes[:, :, inputs:].any()
    values = draw.integers(0, 1 << format.down_bits, (tokens, outputs), np.uint16)
    told = pack_answer(torch.from_numpy(values.view(np.int16)).to(gpu.device), format)
    assert as_bytes(told) == host_packing.pack_answer(values, format).tobytes()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 40), (37, 21), (16, 1)])
def test_host_and_device_requests(
    gpu: Gpu, fused: bool, format: Format, inputs: int, outputs: int
) -> None:
    """Bytes in, numpy out; a device tensor in, a device tensor out; both directions of a weight."""
    worker = CudaWorker(gpu, fused)
    request, weight = random_case(format, 5, inputs, outputs)
    right = reference(format, request, 5, weight)
    forward, backward = worker.load(weight, True, format), worker.load(weight.T, False, format)
    for matrix in (forward, backward):
        for payload in (request, request.tobytes(), memoryview(request.tobytes())):
            answer = worker.multiply(payload, 5, matrix)
            assert isinstance(answer, np.ndarray)
            assert answer.dtype == np.uint8
            assert answer.ndim == 1
            assert answer.tobytes() == right
        there = worker.multiply(torch.from_numpy(request).to(gpu.device), 5, matrix)
        assert isinstance(there, torch.Tensor)
        assert there.device == gpu.device
        assert there.dtype == torch.uint8
        assert there.shape == (len(right),)
        assert as_bytes(there) == right


def test_an_unaligned_device_request(gpu: Gpu) -> None:
    """A payload cut out of a larger tensor need not start on sixteen bytes."""
    worker = CudaWorker(gpu)
    for format in FORMATS:
        request, weight = random_case(format, 3, 32, 8)
        whole = torch.from_numpy(np.concatenate([[7], request]).astype(np.uint8)).to(gpu.device)
        answer = worker.multiply(whole[1:], 3, worker.load(weight, True, format))
        assert as_bytes(answer) == reference(format, request, 3, weight)


def test_a_product_takes_only_what_it_was_compiled_for(gpu: Gpu) -> None:
    """Other sizes and addresses would reach a kernel that looks at neither."""
    weight = torch.zeros((8, 32), dtype=torch.int8, device=gpu.device)
    product = Product(weight, 3, 8, candidates(gpu.capability, 1)[0])
    digits = torch.zeros(3 * 2 * 32 + 1, dtype=torch.uint8, device=gpu.device)
    for wrong in (digits, digits[1:]):
        with pytest.raises(ValueError, match=r"aligned \[3, 2, 32\]"):
            product(wrong, 2)
    assert product(digits[:-1], 2).shape == (2 * 2 * 8,)


@settings(max_examples=12, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5),
    inputs=st.sampled_from([32, 37, 40]),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
def test_joined_requests_get_their_own_answers(
    gpu: Gpu, requests: list[tuple[int, bool]], inputs: int, format: Format, seed: int
) -> None:
    """One launch for many requests, wherever each of them is, answers each as alone."""
    worker = CudaWorker(gpu)
    _, weight = random_case(format, 1, inputs, 22, seed)
    matrix = worker.load(weight, True, format)
    payloads: list[tuple[Payload, int]] = []
    right = []
    for index, (tokens, on_device) in enumerate(requests):
        bits, _ = random_case(format, tokens, inputs, 22, seed + index)
        right.append(reference(format, bits, tokens, weight))
        payloads.append((torch.from_numpy(bits).to(gpu.device) if on_device else bits, tokens))
    answers = worker.multiply_many(payloads, matrix)
    assert [as_bytes(answer) for answer in answers] == right
    assert [isinstance(a, torch.Tensor) for a in answers] == [there for _, there in requests]


def test_threads_share_a_worker(gpu: Gpu) -> None:
    """Requests of several threads, host and device, at once."""
    worker = CudaWorker(gpu)
    _, weight = random_case(EXACT, 1, 48, 24)
    matrices = [worker.load(weight, True, format) for format in FORMATS]

    def ask(seed: int) -> bool:
        tokens, turn = 1 + seed % 7, seed % len(FORMATS)
        request, _ = random_case(FORMATS[turn], tokens, 48, 24, seed)
        payload = torch.from_numpy(request).to(gpu.device) if seed % 3 == 0 else request
        answer = worker.multiply(payload, tokens, matrices[turn])
        return as_bytes(answer) == reference(FORMATS[turn], request, tokens, weight)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(40 if gpu.device.type == "cuda" else 8)))


def test_weights_may_be_a_read_only_map(gpu: Gpu, tmp_path: Path) -> None:
    """The store maps weights read-only; no copy of the file is kept on the host."""
    request, weight = random_case(EXACT, 2, 24, 10)
    np.save(tmp_path / "w.npy", weight)
    worker = CudaWorker(gpu)
    matrix = worker.load(np.load(tmp_path / "w.npy", mmap_mode="r"), True, EXACT)
    assert matrix.weight.shape == (10, 32)
    assert not matrix.weight[:, 24:].any()
    assert worker.multiply(request, 2, matrix).tobytes() == reference(EXACT, request, 2, weight)


def test_wrong_sizes_and_places_are_refused(gpu: Gpu) -> None:
    """The CPU worker's words, and no answer to anything that is not uint8 on this device."""
    worker = CudaWorker(gpu)
    request, weight = random_case(EXACT, 4, 32, 8)
    matrix = worker.load(weight, True, EXACT)
    with pytest.raises(ValueError, match="4 tokens with 32 inputs has 384 bytes, this one 383"):
        worker.multiply(request[:-1], 4, matrix)
    on_device = torch.from_numpy(request).to(gpu.device)
    with pytest.raises(ValueError, match="this one 383"):
        worker.multiply(on_device[:-1], 4, matrix)
    with pytest.raises(ValueError, match="takes uint8"):
        worker.multiply(on_device.view(torch.int8), 4, matrix)
    packed = worker.load(weight, True, Format(18, 10))
    with pytest.raises(ValueError, match="4 tokens with 32 inputs has 288 bytes, this one 384"):
        worker.multiply_many([(request, 4)], packed)
    with pytest.raises(ValueError, match="overflow"):
        worker.load(np.zeros((1, MAX_INPUTS + 1), np.int8), True, EXACT)
