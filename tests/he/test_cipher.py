"""The module-LWE cipher: fast against slow, correct within its bound, and never wrapping."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends.he.entropy import SeededEntropy
from backends.he.interface import NonFiniteInputError, WorkerCipher
from backends.he.matmul.choice import runnable
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import NTT_PRIME, preset
from backends.he.reference import (
    ReferenceOwner,
    ReferenceWorker,
    evaluation_matrix,
    inverse_evaluation_matrix,
    matmul_mod,
    negacyclic_product,
)
from backends.he.wire import EXACT, Format
from tests.he.conftest import Case, make_case

# SHA-256 of ciphertext, worker's answer and result for seed 7; see `test_known_answers`.
KNOWN = {
    "exact": (
        "3588c61ffd3354c54d55d31f1dfa185a",
        "acfa4a2d2829e478fa311e922140383f",
        "96b434b269ada9963763a804fe73ed41",
    ),
    "paranoid": (
        "17f3f8b860721fd023bf468e26b4f77b",
        "dbe35909516f92249ae56644e445838e",
        "5277296628fac848771b4b453870a9da",
    ),
}


def round_trip(case: Case, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    owner = MlweOwner(case.parameters, case.public)
    owner.guard(case.matrix, case.weight, case.forward)
    worker = MlweWorker()
    sent = owner.encrypt(x, case.matrix)
    answer = worker.multiply(sent.payload, len(x), case.load(worker))
    return owner.decrypt(sent.sealed, answer, case.matrix)


def workers() -> list[WorkerCipher]:
    """The reference, and one with every kernel that this machine can run."""
    kernels = [make() for make in runnable().values()]
    return [ReferenceWorker(), *(MlweWorker(k) for k in kernels)]


def relative_error(y: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["exact", "paranoid"])
def test_known_answers(name: str) -> None:
    """A change of any byte of the scheme shows here, whichever backend made it."""
    case = make_case(70, 33, seed=3, parameters=preset(name))
    x = np.random.default_rng(5).standard_normal((9, 70)).astype(np.float32)
    owner = MlweOwner(case.parameters, case.public, SeededEntropy(7), unverified=True)
    sent = owner.encrypt(x, case.matrix)
    worker = MlweWorker()
    answer = worker.multiply(sent.payload, 9, case.load(worker))
    y = owner.decrypt(sent.sealed, answer, case.matrix)
    parts = (sent.payload, answer, y)
    found = tuple(hashlib.sha256(part.tobytes()).hexdigest()[:32] for part in parts)
    assert found == KNOWN[name]


@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens", "forward", "form"),
    [
        (48, 40, 1, True, EXACT),
        (130, 20, 256, False, EXACT),
        (16, 150, 300, True, EXACT),
        (5, 7, 3, True, Format(16, 12)),
        (130, 33, 30, True, Format(16, 8)),
        (49, 50, 257, False, Format(18, 10)),
        (17, 21, 3, True, Format(20, 8)),
        (16, 16, 2, True, Format(24, 12)),
    ],
)
def test_fast_equals_reference_bit_for_bit(
    inputs: int, outputs: int, tokens: int, forward: bool, form: Format
) -> None:
    """Same seed, same bytes: ciphertext, worker's answer, result. In every kind of format."""
    parameters = preset("exact" if form == EXACT else "thin")
    case = make_case(inputs, outputs, forward, seed=tokens, parameters=parameters, form=form)
    x = np.random.default_rng(1).standard_t(3, size=(tokens, inputs)).astype(np.float32)
    fast = MlweOwner(parameters, case.public, SeededEntropy(1), unverified=True)
    slow = ReferenceOwner(parameters, case.public, SeededEntropy(1), unverified=True)
    a, b = fast.encrypt(x, case.matrix), slow.encrypt(x, case.matrix)
    assert np.array_equal(a.payload, b.payload)
    answer, *others = (
        worker.multiply(a.payload, tokens, case.load(worker)) for worker in workers()
    )
    assert all(np.array_equal(answer, other) for other in others)
    assert np.array_equal(
        fast.decrypt(a.sealed, answer, case.matrix), slow.decrypt(b.sealed, answer, case.matrix)
    )


def test_ntt_domain_product_is_the_negacyclic_product() -> None:
    """Pointwise products in the NTT domain are products mod X^256 + 1."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, NTT_PRIME, (2, 256))
    forward = evaluation_matrix().T.copy()
    product = matmul_mod(a[None], forward) * matmul_mod(b[None], forward) % NTT_PRIME
    back = matmul_mod(product, inverse_evaluation_matrix().T.copy())
    assert np.array_equal(back[0], negacyclic_product(a, b))


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 200),
    tokens=st.sampled_from([1, 2, 7, 64, 255, 256, 257]),
    forward=st.booleans(),
    magnitude=st.floats(-30, 30),
    outlier=st.booleans(),
    zero_rows=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(300, 5, 256, True, 30.0, True, True, 0)
@example(1, 1, 1, True, -30.0, False, False, 0)
@example(1, 2, 1, True, 0.0, False, False, 0)
def test_result_is_within_the_bound(
    inputs: int, outputs: int, tokens: int, forward: bool, magnitude: float,
    outlier: bool, zero_rows: bool, seed: int,
) -> None:  # fmt: skip
    """Every value lies within the margin that the planner promises, at any scale."""
    case = make_case(inputs, outputs, forward, seed=seed % 97)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, inputs)) * 10.0**magnitude).astype(np.float32)
    if outlier:
        x[:, 0] *= 1000 if magnitude < 25 else 1
    if zero_rows:
        x[::2] = 0
    y, expected = round_trip(case, x), case.exact(x)
    plan, parameters = case.matrix.plan, case.parameters
    norms = np.linalg.norm(x.astype(np.float64) * case.matrix.in_scale, axis=1)
    # The margin bounds the error in units of the worker modulus; alpha turns it into values.
    worst = plan.margin(parameters) / plan.amplitude(parameters) * norms * (1 + 1e-5)
    bound = worst[:, None] * case.matrix.out_scale + 1e-6 * np.abs(expected) + 1e-44
    assert np.all(np.abs(y - expected) <= bound)
    assert np.all(y[norms == 0] == 0)


@pytest.mark.parametrize(("inputs", "tolerance"), [(2048, 0.005), (8192, 0.016)])
def test_measured_error_is_the_predicted_error(inputs: int, tolerance: float) -> None:
    """Within 15 % of the planner's figure, and under the accuracy the design asks for."""
    rng = np.random.default_rng(2)
    weight = np.clip(np.rint(rng.normal(0, 32, (96, inputs))), -127, 127).astype(np.int8)
    case = make_case(inputs, 96, weight=weight)
    x = rng.standard_t(4, size=(64, inputs)).astype(np.float32)
    error = relative_error(round_trip(case, x), case.exact(x))
    predicted = case.matrix.plan.predicted_error(case.parameters)
    assert error == pytest.approx(predicted, rel=0.15)
    assert error < tolerance


def test_results_are_unbiased() -> None:
    """Rounding errors average out over repeated encryptions of one input."""
    case = make_case(256, 24)
    x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    once = relative_error(round_trip(case, x), case.exact(x))
    mean = np.mean([round_trip(case, x) for _ in range(100)], axis=0)
    assert relative_error(mean, case.exact(x)) < once / 5


@pytest.mark.parametrize("inputs", [64, 2048])
def test_the_heaviest_row_aligned_with_the_input_does_not_wrap(inputs: int) -> None:
    """The worst case of Cauchy-Schwarz, and all weights at +-127."""
    weight = np.random.default_rng(0).choice([-127, 127], size=(8, inputs)).astype(np.int8)
    case = make_case(inputs, 8, weight=weight)
    for sign in (1, -1):
        x = (sign * weight).astype(np.float32) * 1e3
        error = relative_error(round_trip(case, x), case.exact(x))
        assert error < 2 * case.matrix.plan.predicted_error(case.parameters)
        spikes = np.zeros((8, inputs), np.float32)
        spikes[np.arange(8), np.arange(8)] = sign
        assert relative_error(round_trip(case, spikes), case.exact(spikes)) < 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_refused_with_its_place(small: Case, bad: float) -> None:
    """The error names the matrix and the token, and no value."""
    x = np.ones((4, 48), np.float32)
    x[2, 5] = bad
    owner = MlweOwner(small.parameters, small.public)
    with pytest.raises(NonFiniteInputError, match="48x40: NaN or infinity in token 2"):
        owner.encrypt(x, small.matrix)
    assert owner.blocks == owner.secrets_drawn == 0


def test_wrong_shapes_and_sizes_are_refused(small: Case) -> None:
    """Inputs, requests and answers of another size than agreed."""
    owner, worker = MlweOwner(small.parameters, small.public), MlweWorker()
    with pytest.raises(ValueError, match="takes"):
        owner.encrypt(np.ones((2, 47), np.float32), small.matrix)
    with pytest.raises(ValueError, match="contiguous float32"):
        owner.encrypt(np.ones((2, 48)), small.matrix)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bytes"):
        worker.multiply(np.zeros(100, np.uint8), 2, small.load(worker))
    sent = owner.encrypt(np.ones((2, 48), np.float32), small.matrix)
    with pytest.raises(ValueError, match="bytes"):
        owner.decrypt(sent.sealed, bytes(7), small.matrix)


@pytest.mark.parametrize("forward", [True, False])
def test_worker_equals_reference_on_degenerate_shapes(forward: bool) -> None:
    """One input, one output, one token: where library products go wrong first."""
    rng = np.random.default_rng(0)
    for inputs, outputs, tokens in itertools.product((1, 2, 3, 17), (1, 2, 5, 33), (1, 2, 5)):
        shape = (outputs, inputs) if forward else (inputs, outputs)
        weight = rng.integers(-127, 128, size=shape).astype(np.int8)
        request = rng.integers(0, 256, size=3 * tokens * inputs).astype(np.uint8)
        slow, *fast = (
            worker.multiply(request, tokens, worker.load(weight, forward, EXACT))
            for worker in workers()
        )
        assert all(np.array_equal(answer, slow) for answer in fast), (inputs, outputs, tokens)
