"""A worker that lies is found; an honest one never accused."""

from __future__ import annotations

from math import gcd, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.he import integrity
from backends.he.clear import ClearOwner
from backends.he.entropy import OsEntropy
from backends.he.integrity import (
    CLASSES,
    LIMIT,
    POOL,
    ROWS,
    Honesty,
    Judge,
    Pool,
    draw_rows,
)
from backends.he.interface import OwnerCipher, UnguardedError
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.reference import ReferenceOwner
from backends.he.wire import EXACT, Format
from benchmarks.integrity import KINDS, Desk, bias_found, honest
from protocol.errors import WrongAnswerError
from tests.he.conftest import Case, make_case

TWO_LIMBS = Format(16, 12)


def ask(case: Case, tokens: int, tamper: object = None) -> None:
    """One guarded round trip; `tamper` changes the answer uint16[T, N] in place."""
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
    owner.guard(case.matrix, case.weight, case.forward)
    x = np.random.default_rng().standard_normal((tokens, case.matrix.in_features))
    sent = owner.encrypt(x.astype(np.float32), case.matrix)
    answer = worker.multiply(sent.payload, tokens, case.load(worker))
    if callable(tamper):
        tamper(answer.view(np.uint16).reshape(tokens, -1))
    owner.decrypt(sent.sealed, answer, case.matrix)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "tokens"), [(1, 1, 1), (70, 200, 300), (600, 9, 64)])
def test_honest_answers_pass(inputs: int, outputs: int, tokens: int, forward: bool) -> None:
    """Ragged shapes, both directions, many tokens."""
    for seed in range(5):
        ask(make_case(inputs, outputs, forward, seed), tokens)


def test_honest_answers_pass_with_two_limbs() -> None:
    """Another worker modulus, another number of dropped bits."""
    ask(make_case(40, 30, form=TWO_LIMBS), 50)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e30, 3e38])
def test_honest_answers_pass_at_any_scale(scale: float) -> None:
    """Zeros, denormals, and results that overflow float32 when they are delivered."""
    case = make_case(70, 60)
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
    owner.guard(case.matrix, case.weight, True)
    x = np.full((20, 70), scale, np.float32)
    x[1::2] = 0
    sent = owner.encrypt(x, case.matrix)
    answer = worker.multiply(sent.payload, 20, case.load(worker))
    assert not owner.decrypt(sent.sealed, answer, case.matrix)[1::2].any()


def zero(answer: np.ndarray) -> None:
    answer[...] = 0


def replay(answer: np.ndarray) -> None:
    answer[...] = np.roll(answer, 1, axis=0)


def one_value(answer: np.ndarray) -> None:
    answer[3, 5] ^= 1 << 12


def top_bits(answer: np.ndarray) -> None:
    """Twice p/2: nothing at all mod p, with signs for coefficients."""
    answer[3, [5, 9]] ^= 1 << 15


def noise(answer: np.ndarray) -> None:
    answer[...] = np.random.default_rng().integers(0, 1 << 16, answer.shape)


@pytest.mark.parametrize("tamper", [zero, replay, one_value, top_bits, noise])
def test_a_lying_worker_is_found(tamper: object) -> None:
    """The error names the layer and says what to do."""
    case = make_case(70, 60)
    for _ in range(10):
        with pytest.raises(WrongAnswerError, match=r"70x60: .*broken or lying.*stop using"):
            ask(case, 8, tamper)


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_of_lie_passes_more_often_than_the_bound_says(name: str) -> None:
    """Structured errors: powers of two, few and many values, biases, wraps, replays, all signs.

    Accepted attacks may exceed their expected number by five standard deviations of it.
    """
    desk = Desk(48, 40, preset("exact"), seed=len(name))
    results = [desk.attack(KINDS[name]) for _ in range(120)]
    accepted, bound = sum(taken for taken, _ in results), sum(odds for _, odds in results)
    assert accepted <= bound + 5 * sqrt(bound)
    if "top bits" in name:
        assert bound < 1e-9


def test_every_bit_of_an_answer_counts() -> None:
    """2^k added to one value, to half of them, to all, for every k: large ones never pass."""
    desk = Desk(48, 40, preset("exact"), seed=4)
    for k in range(16):
        for places in (slice(0, 1), slice(0, 20), slice(None)):
            asked = desk.ask(np.random.default_rng(k).standard_normal((3, 48)).astype(np.float32))
            told = asked.answer.copy()
            told[1, places] += np.uint16(1 << k)
            bound = desk.bound(asked, told)
            assert bound < 1e-9 or k < 13
            assert bound > 1e-6 or not desk.accepts(asked, told, f"{k} {places}")


def test_a_small_bias_is_found() -> None:
    """1 % of an output's deviation, as the full-sized bar says, on 200 outputs: sooner, as noise
    grows with the root of the outputs. It takes n/8 tokens a row of 8 deviations over the bias,
    b*|v| a token: below 20,000 tokens for this size, from either extreme of |v|.
    """
    assert bias_found(preset("exact"), 1024, 200, 0.01, seed=1, most=60_000) < 20_000


def test_a_bias_of_some_places_only_is_found() -> None:
    """+b and -b in turn cancel in the sum over all tokens, and not in that of a class."""
    judge = judge_of(Honesty(np.zeros(POOL), np.ones(POOL)))
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(64) % 2, 0.5, -0.5)[:, None]
    with pytest.raises(WrongAnswerError, match="always alike"):
        for _ in range(1000):
            judge.require(some_rows(), rng.standard_normal((64, ROWS)) + signs, "w")


def some_rows() -> np.ndarray[Any, Any]:
    return draw_rows(OsEntropy().fresh_key())


def judge_of(honesty: Honesty) -> Judge:
    return Judge("m", honesty)


def test_added_energy_is_found() -> None:
    """A fifth more noise than there should be, of mean zero."""
    judge = judge_of(Honesty(np.zeros(POOL), np.ones(POOL)))
    rng = np.random.default_rng(0)
    with pytest.raises(WrongAnswerError, match="always alike"):
        for _ in range(2000):
            judge.require(some_rows(), 1.2 * rng.standard_normal((64, ROWS)), "w")


def test_honest_differences_pass_for_long() -> None:
    """Six million of them, with a mean and a deviation of their own; ragged requests."""
    rng = np.random.default_rng(1)
    mean, deviation = rng.normal(0, 5, POOL), rng.uniform(1, 9, POOL)
    judge = judge_of(Honesty(mean, deviation))
    for turn in range(1500):
        rows = some_rows()
        z = rng.standard_normal((400 + turn % 200, ROWS))
        judge.require(rows, mean[rows] + deviation[rows] * z, "w")


def test_honest_data_is_never_rejected() -> None:
    """Real encryption, heavy-tailed, with zeros and repeated tokens, one set of sums."""
    assert honest(preset("exact"), 60_000, 96, 80)["rejected"] == 0


def test_nobody_pays_for_the_lies_of_another() -> None:
    """Sums are kept by worker; what was too much stays too much."""
    judge = judge_of(Honesty(np.zeros(POOL), np.ones(POOL)))
    honest_z, biased = np.zeros((CLASSES, ROWS)), np.full((CLASSES, ROWS), 0.9)
    rows = np.arange(ROWS)
    with pytest.raises(WrongAnswerError):
        for _ in range(100):
            judge.require(rows, biased, "liar")
    with pytest.raises(WrongAnswerError):
        judge.require(rows, biased, "liar")
    judge.require(rows, honest_z, "honest")
    judge.require(rows, biased, "honest")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LIMIT + 0.01])
def test_what_is_no_number_fits_nothing(value: float) -> None:
    """Nor does what is just over the limit."""
    differences = np.zeros((3, ROWS))
    differences[1, 2] = value
    with pytest.raises(WrongAnswerError, match="not the product"):
        judge_of(Honesty(np.zeros(POOL), np.ones(POOL))).require(np.arange(ROWS), differences, "")


def _twins(weight: np.ndarray[Any, Any]) -> None:
    weight[10:30] = weight[30:50]


def _zero_rows(weight: np.ndarray[Any, Any]) -> None:
    weight[5:25] = 0


def _powers(weight: np.ndarray[Any, Any]) -> None:
    weight //= 32
    weight *= 32


def _congruent(weight: np.ndarray[Any, Any]) -> None:
    weight[...] = np.where(weight[:, :1] % 2, 64, -64)
    weight[:, 1::3] *= -1
    weight[::3] += 0


def _nearly_congruent(weight: np.ndarray[Any, Any]) -> None:
    weight[...] = np.where(weight > 0, 127, -1)
    weight[:, 3:] = weight[:1, 3:]


def _constant(weight: np.ndarray[Any, Any]) -> None:
    weight[...] = 127


SHAPES = [None, _twins, _zero_rows, _powers, _constant, _congruent, _nearly_congruent]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [EXACT, TWO_LIMBS, Format(18, 8)], ids=["24", "16", "18"])
def test_the_honest_distribution_is_as_derived(
    monkeypatch: pytest.MonkeyPatch, form: Format, shape: Any
) -> None:
    """Mean 0 and variance 1 in the rows of twenty pools, also for degenerate weights.

    Less where rows are each other's opposites: what mostly cancels is not counted on.

    20,480 tokens of 8 rows: 5 standard deviations of their mean and variance, were they all
    independent, are 0.012 and 0.018; rows of one token are not quite.
    """
    case = make_case(40, 60, form=form)
    if shape is not None:
        shape(case.weight)
        case = make_case(40, 60, form=form, weight=case.weight)
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
    loaded = case.load(worker)
    z = []

    def keep(judge: Judge, rows: Any, differences: Any, worker: str) -> None:
        z.append((differences - judge.honesty.mean[rows]) / judge.honesty.deviation[rows])

    monkeypatch.setattr(Judge, "require", keep)
    for seed in range(20):  # a pool each: its rows share what degenerate weights do to one
        owner.guard(case.matrix, case.weight, True)
        x = np.random.default_rng(seed).standard_t(2, (1024, 40)).astype(np.float32)
        sent = owner.encrypt(x, case.matrix)
        owner.decrypt(sent.sealed, worker.multiply(sent.payload, 1024, loaded), case.matrix)
    every = np.concatenate(z)
    assert abs(every.mean()) < 0.02
    assert (0.2 if shape is _congruent else 0.96) < every.var() < 1.04


def test_coefficients_are_as_the_bound_assumes() -> None:
    """Either sign, sizes uniform on [1/2, 1)."""
    pool = Pool(OsEntropy(), 3000).whole()
    sizes = np.abs(pool).reshape(-1)
    assert pool.dtype == np.float32
    assert sizes.min() >= 0.5
    assert sizes.max() < 1
    assert abs(np.mean(pool > 0) - 0.5) < 0.01
    counts = np.histogram(sizes, 16, (0.5, 1))[0]
    assert np.abs(counts - len(sizes) / 16).max() < 6 * sqrt(len(sizes) / 16)


@given(st.integers(1, 300), st.lists(st.integers(0, POOL - 1), min_size=1, max_size=8))
def test_rows_are_made_anew_as_they_were(outputs: int, which: list[int]) -> None:
    """Any of them, in any order, are those of the whole pool."""
    pool = Pool(OsEntropy(), outputs)
    words = np.empty(4 * POOL * outputs, np.uint8)
    pool._stream.fill(words, 0)
    words = words.view("<u4").reshape(POOL, outputs)
    right = np.ldexp(((words >> 9) + 0x800000).astype(np.float64), -24) * np.where(words & 1, 1, -1)
    assert np.array_equal(pool.whole(), right)
    assert np.array_equal(pool.rows(np.array(which)), right[which])


def test_every_request_has_rows_of_its_own_and_every_owner_a_pool() -> None:
    """Over 200 requests every row is drawn, and no two owners share one."""
    case = make_case(5, 400)
    owners = [MlweOwner(case.parameters, case.public) for _ in range(2)]
    for owner in owners:
        owner.guard(case.matrix, case.weight, True)
    first, second = (owner._checks[case.matrix.name].pool.whole() for owner in owners)
    assert np.mean(first == second) < 0.01
    x = np.ones((1, 5), np.float32)
    drawn = [
        tuple(sorted(owners[0].encrypt(x, case.matrix).sealed.expected.rows.tolist()))
        for _ in range(200)
    ]
    assert len(set(drawn)) > 190
    assert {row for rows in drawn for row in rows} == set(range(POOL))


def test_parallel_rows_are_told_apart() -> None:
    """Equal rows add their coefficients, others that are parallel their sizes; zeros count not."""
    pool = np.array([[0.5, -0.75, 0.5, 1.0, 0.5, 0.25]])
    rows = np.array([[1.0, 5], [1, 5], [2, 10], [3, 1], [0, 0], [-1, -5]])
    found = integrity._parallel_squares(pool, rows)
    assert found[0] == pytest.approx((0.25 + 0.5 + 0.25) ** 2 + 1.0)
    # A mark may be zero by chance where the row is none of zeros.
    rows = np.array([[0.0, 5], [0, 5], [0, -10], [1, 0], [0, 0], [-1, 0]])
    found = integrity._parallel_squares(pool, rows)
    assert found[0] == pytest.approx((0.25 + 0.5) ** 2 + (1.0 + 0.25) ** 2)


@given(
    st.integers(1, 3).flatmap(
        lambda inputs: st.lists(
            st.lists(
                st.sampled_from([*range(-9, 10), 32, 64, 96, 127, -128]),
                min_size=inputs,
                max_size=inputs,
            ),
            min_size=1,
            max_size=12,
        )
    ),
    st.integers(1, 4),
)
def test_what_is_dropped_varies_no_more_than_is_said(rows: list[list[int]], dropped: int) -> None:
    """Of any few rows, related in whatever way, over every input there is."""
    weight, inputs = np.array(rows, np.int8), len(rows[0])
    pool = Pool(OsEntropy(), len(rows)).whole()
    found = integrity.survey(torch.from_numpy(pool), weight, True, OsEntropy())
    grid = found.bits & -found.bits.astype(np.int64)
    said = integrity._dropped_variance(pool.astype(np.float64), found.marks, grid, dropped)
    every = np.indices((1 << dropped,) * inputs).reshape(inputs, -1)
    values = (weight.astype(np.int64) @ every + (1 << dropped - 1)) % (1 << dropped)
    right = np.var(pool.astype(np.float64) @ values, axis=1)
    assert np.all(right <= said * (1 + 1e-9) + 1e-9)
    if (weight % 2).any(axis=1).all() and len({tuple(row % 2) for row in weight}) == len(weight):
        # No row is even, no two are alike in any bit: nothing of one says anything of another.
        assert said == pytest.approx(right)


@pytest.mark.parametrize("inputs", [2, 3, 8])
@pytest.mark.parametrize("entries", [(64, -64), (127, -1), (32, -32), (32, 96), (40, 120), (0, 64)])
def test_rows_that_are_alike_get_nobody_accused(entries: tuple[int, int], inputs: int) -> None:
    """Of few different rows, congruent ones, opposite ones, odd multiples: sums stay in bounds."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weight = rng.choice(np.array(entries, np.int8), (512, inputs))
        case = make_case(inputs, 512, weight=weight)
        owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
        owner.guard(case.matrix, weight, True)
        loaded = case.load(worker)
        for _ in range(30):
            sent = owner.encrypt(rng.standard_normal((256, inputs)).astype(np.float32), case.matrix)
            owner.decrypt(sent.sealed, worker.multiply(sent.payload, 256, loaded), case.matrix)


@pytest.mark.parametrize("name", ["exact", "thin"])
@pytest.mark.parametrize("factors", [(-1, 1), (-1, 0, 1), (-2, -1, 1, 2), (-3, 1)])
def test_matrices_of_rank_one_get_nobody_accused(name: str, factors: tuple[int, ...]) -> None:
    """Their outputs cancel, but when all dropped bits are zero: one sum in 256 is far off then."""
    parameters, rng = preset(name), np.random.default_rng(0)
    for outputs in (30, 256):
        row = rng.integers(-40, 41, 40)
        weight = np.outer(rng.choice(factors, outputs), row).astype(np.int8)
        form = EXACT if name == "exact" else Format(16, 8)
        case = make_case(40, outputs, parameters=parameters, weight=weight, form=form)
        worker = MlweWorker()
        loaded = case.load(worker)
        for _ in range(3):
            owner = MlweOwner(case.parameters, case.public)
            owner.guard(case.matrix, weight, True)
            for _ in range(4):
                x = rng.standard_normal((300, 40)).astype(np.float32)
                sent = owner.encrypt(x, case.matrix)
                owner.decrypt(sent.sealed, worker.multiply(sent.payload, 300, loaded), case.matrix)


def test_a_matrix_of_zeros_has_exact_answers() -> None:
    """An honest one passes, and any other does not."""
    case = make_case(30, 40, weight=np.zeros((40, 30), np.int8))
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
    owner.guard(case.matrix, case.weight, True)
    sent = owner.encrypt(np.ones((4, 30), np.float32), case.matrix)
    right = worker.multiply(sent.payload, 4, case.load(worker))
    wrong = right.copy()
    wrong[7] ^= 1
    with pytest.raises(WrongAnswerError):
        owner.decrypt(sent.sealed, wrong, case.matrix)
    assert not owner.decrypt(sent.sealed, right, case.matrix).any()


def test_what_divides_a_row_is_found_exactly() -> None:
    """Whatever the row: sixteen random sums may all be even by chance."""
    rng = np.random.default_rng(0)
    weight = rng.choice(np.array([0, 1, 2, 4, 64, -32], np.int8), (3000, 2))
    pool = torch.zeros((POOL, 3000))
    for forward in (True, False):
        matrix = weight if forward else np.ascontiguousarray(weight.T)
        found = integrity.survey(pool, matrix, forward, OsEntropy()).bits.astype(int)
        for row, bits in zip(weight.astype(int), found, strict=True):
            common = gcd(*row)
            assert bits & -bits == common & -common


def test_a_failed_check_leaves_the_request_open() -> None:
    """The right answer, of another worker, opens the same ciphertext."""
    case = make_case(70, 60)
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker()
    owner.guard(case.matrix, case.weight, True)
    x = np.random.default_rng(0).standard_normal((300, 70)).astype(np.float32)
    sent = owner.encrypt(x, case.matrix)
    right = worker.multiply(sent.payload, 300, case.load(worker))
    for _ in range(2):
        wrong = right.copy()
        top_bits(wrong.view(np.uint16).reshape(300, -1))
        with pytest.raises(WrongAnswerError):
            owner.decrypt(sent.sealed, wrong, case.matrix)
    y, exact = owner.decrypt(sent.sealed, right, case.matrix), case.exact(x)
    assert np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact)


def owners(case: Case, **options: bool) -> list[OwnerCipher]:
    return [
        MlweOwner(case.parameters, case.public, **options),
        ReferenceOwner(case.parameters, case.public, **options),
        ClearOwner(**options),
    ]


def test_verification_is_not_off_by_accident() -> None:
    """What was never guarded is not decrypted, unless that was asked for in so many words."""
    case = make_case(6, 5)
    for owner in owners(case):
        sent = owner.encrypt(np.ones((2, 6), np.float32), case.matrix)
        with pytest.raises(UnguardedError, match="6x5: its answers are not checked"):
            owner.decrypt(sent.sealed, bytes(owner.down_bytes(case.matrix, 2)), case.matrix)
    for owner in owners(case, unverified=True):
        sent = owner.encrypt(np.ones((2, 6), np.float32), case.matrix)
        owner.decrypt(sent.sealed, bytes(owner.down_bytes(case.matrix, 2)), case.matrix)
