"""Thin ciphertexts: the scale that is learnt, wraps seen and repaired, lies found all the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.he import mlwe_owner, repair
from backends.he.integrity import ROWS, SUSPICION
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.plan import (
    BACKWARD_ERROR,
    CHECK_NOISE,
    FORWARD_ERROR,
    nominal_gain,
    nominal_plan,
    plan_directions,
)
from backends.he.repair import LARGEST_GAIN, Gains, clear_products, unwrap
from backends.he.wire import EXACT, Format
from benchmarks.integrity import KINDS, Desk
from protocol.errors import WrongAnswerError
from tests.he.conftest import Case, make_case

THIN = preset("thin")
FORMATS = [Format(16, 8), Format(18, 8), Format(18, 10), Format(20, 12)]


class FixedGain(Gains):
    """A gain that nothing teaches."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self._gain = gain

    def of(self, matrix: str) -> float:
        return self._gain


def owner_of(case: Case, gain: float | None = None) -> MlweOwner:
    owner = MlweOwner(case.parameters, case.public)
    owner.guard(case.matrix, case.weight, case.forward)
    if gain is not None:
        owner._gains = FixedGain(gain)
    return owner


def ask(owner: MlweOwner, case: Case, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    worker = MlweWorker()
    sent = owner.encrypt(x, case.matrix)
    answer = worker.multiply(sent.payload, len(x), case.load(worker))
    return owner.decrypt(sent.sealed, answer, case.matrix)


def beyond(case: Case, x: np.ndarray[Any, Any], gain: float) -> tuple[int, float]:
    """(results beyond p/2 at a gain, largest error that noise makes of one), from the truth."""
    plan, form = case.matrix.plan, case.matrix.plan.format
    norms = np.linalg.norm(x.astype(np.float64) * case.matrix.in_scale, axis=1)
    alpha = plan.amplitude(THIN, gain) / norms
    y = np.abs(case.exact(x) / case.matrix.out_scale) * alpha[:, None]
    return int(np.sum(y > form.modulus / 2)), 8 * plan.margin(THIN) / 6


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_wrap_is_seen_and_repaired(form: Format, forward: bool) -> None:
    """At scales where few and where half of all results wrap: none is off by more than noise."""
    case = make_case(200, 90, forward, parameters=THIN, form=form)
    rng = np.random.default_rng(form.up_bits)
    for gain in (5.0, 12.0, 40.0):
        owner = owner_of(case, gain)
        x = rng.standard_normal((300, 200)).astype(np.float32)
        x[5] = 0
        y = ask(owner, case, x)
        wraps, noise = beyond(case, x[np.arange(300) != 5], gain)
        assert wraps > 0
        norms = np.linalg.norm(x.astype(np.float64) * case.matrix.in_scale, axis=1)
        unit = norms / case.matrix.plan.amplitude(THIN, gain)
        bound = noise * unit[:, None] * case.matrix.out_scale + 1e-5 * np.abs(case.exact(x))
        assert np.all(np.abs(y - case.exact(x)) <= bound)
        # Noise takes some over the edge, and some back.
        assert owner.repairs.wraps == pytest.approx(wraps, rel=0.1, abs=8)
        assert not y[5].any()


@pytest.mark.parametrize("forward", [True, False])
def test_from_the_first_request_on_errors_are_those_of_a_learnt_gain(forward: bool) -> None:
    """A session's first gradients are as exact as later ones; too few tokens go at a gain of 1."""
    case = make_case(1024, 64, forward, parameters=THIN)
    owner, rng = owner_of(case), np.random.default_rng(0)
    for tokens in (repair.ENOUGH - 1, 256, 256, 256):
        x = rng.standard_normal((tokens, 1024)).astype(np.float32)
        if tokens < 256:  # its answer never comes
            sent = owner.encrypt(x, case.matrix)
            assert sent.sealed.gain == 1
            assert not owner._gains.known(case.matrix.name)
            owner.discard(sent.sealed)
            continue
        sent = owner.encrypt(x, case.matrix)
        gain = sent.sealed.gain
        assert 3 < gain < 12
        answer = MlweWorker().multiply(sent.payload, tokens, case.load(MlweWorker()))
        y, right = owner.decrypt(sent.sealed, answer, case.matrix), case.exact(x)
        error = np.linalg.norm(y - right) / np.linalg.norm(right)
        assert error == pytest.approx(case.matrix.plan.predicted_error(THIN, gain), rel=0.15)
    assert owner.repairs.wraps < 10


def test_what_tells_the_first_gain_are_shares_of_the_bound() -> None:
    """As large as the truth says; tokens of zeros are passed over, and without enough it is 1."""
    case = make_case(300, 70, parameters=THIN)
    owner, x = owner_of(case), np.random.default_rng(0).standard_t(3, (129, 300))
    x[repair.ENOUGH :] = 0
    assert len(owner._shares(x[1:].astype(np.float32), case.matrix)) == 0
    found = owner._shares(x.astype(np.float32), case.matrix)
    few = x[1:].astype(np.float32)  # nor is the matrix known by them: the next request tells
    owner.discard(owner.encrypt(few, case.matrix).sealed)
    assert not owner._gains.known(case.matrix.name)
    x = x[: repair.ENOUGH]
    alpha = case.matrix.plan.amplitude(THIN) / np.linalg.norm(x * case.matrix.in_scale, axis=1)
    right = np.abs(case.exact(x) / case.matrix.out_scale).max(axis=1) * alpha
    right /= case.matrix.plan.format.modulus / 2
    assert np.allclose(found, right, rtol=1e-4)
    owner.discard(owner.encrypt(x.astype(np.float32), case.matrix).sealed)
    assert owner._gains.of(case.matrix.name) > 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.003, 1.0), st.floats(0.01, 1.5))
def test_the_gain_leaves_room_for_all_but_a_rare_token(
    seed: int, middle: float, spread: float
) -> None:
    """Of what it has seen; it is never below 1 and never above its limit."""
    gains = Gains()
    shares = np.minimum(middle * np.random.default_rng(seed).lognormal(0, spread, 4000), 1.0)
    used = 1.0
    for part in np.split(shares, 8):
        gains.learn("m", part * used, used)
        used = gains.of("m")
    assert 1 <= used <= LARGEST_GAIN
    assert np.mean(shares * used > repair.EDGE * 1.0001) <= repair.RARE or used == 1


def test_a_session_s_first_token_of_ones_teaches_nothing() -> None:
    """A gain from it alone would have thousands of the first real results wrap."""
    case = make_case(320, 960, parameters=THIN)
    owner = owner_of(case)
    ask(owner, case, np.ones((1, 320), np.float32))
    assert owner._gains.of(case.matrix.name) == 1
    x = np.random.default_rng(0).standard_t(4, (256, 320)).astype(np.float32)
    ask(owner, case, x)
    assert owner.repairs.wraps == 0
    assert owner._gains.of(case.matrix.name) > 1


def test_gains_are_of_one_matrix_and_forget() -> None:
    """Another matrix begins at 1; a change of what is seen is followed."""
    gains = Gains()
    gains.learn("m", np.full(100, 0.05), 1.0)
    assert gains.of("n") == 1
    before = gains.of("m")
    assert before == pytest.approx(1 / (0.05 * 1.25), rel=0.1)
    gains.learn("m", np.full(20, 0.5), 1.0)
    assert gains.of("m") < before / 8
    for _ in range(40):
        gains.learn("m", np.full(4096, 0.05), 1.0)
    assert gains.of("m") == pytest.approx(before)
    gains.learn("m", np.zeros(10), 1.0)
    assert gains.of("m") == pytest.approx(before), "tokens of zeros say nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_lies_are_found_among_wraps(kind: str) -> None:
    """Every kind of tampering, at a scale where an honest answer has wraps to be repaired.

    A wrap made by the scale is no lie here, and what one of it passes with is repaired.
    """
    if kind == "a wrap by p":
        return
    desk = Desk(96, 64, THIN, seed=len(kind))
    accepted, bound, tries = 0, 0.0, 12
    for _ in range(tries):
        desk.owner._gains = FixedGain(3.0)
        taken, chance = desk.attack(KINDS[kind])
        accepted += taken
        bound += chance
    assert accepted <= 1.5 * bound + 4 * np.sqrt(bound) + 0.5


@pytest.mark.parametrize("size", [0.5, 0.4])
def test_a_large_lie_of_one_value_is_found_in_the_widest_matrices(size: float) -> None:
    """Where the check's noise is an eighth of p: half of p is seen by what follows a suspicion.

    Eight deviations of a row's noise are all of p there, so that no row alone is over its limit.
    """
    case = make_case(256, 4000, parameters=THIN, form=Format(18, 8))
    deviation = owner_of(case)._checks[case.matrix.name].judge.honesty.deviation.mean()
    assert 0.05 < deviation / case.matrix.plan.format.modulus < 0.13
    found, tries = 0, 30
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        owner, worker = owner_of(case), MlweWorker()
        sent = owner.encrypt(rng.standard_normal((4, 256)).astype(np.float32), case.matrix)
        answer = np.array(worker.multiply(sent.payload, 4, case.load(worker)))
        answer[rng.integers(len(answer))] += np.uint8(256 * size)
        try:
            owner.decrypt(sent.sealed, answer, case.matrix)
        except WrongAnswerError:
            found += 1
    assert found >= 0.9 * tries


def test_an_honest_worker_is_never_accused_for_wraps() -> None:
    """Requests whose data change all at once, so that most of their tokens wrap."""
    case = make_case(64, 300, parameters=THIN)
    owner, rng = owner_of(case), np.random.default_rng(3)
    heaviest = np.argmax(np.linalg.norm(case.weight.astype(float), axis=1))
    for turn in range(30):
        x = rng.standard_normal((100, 64)).astype(np.float32)
        if turn % 3 == 2:
            x += 5 * case.weight[heaviest].astype(np.float32)
        y, right = ask(owner, case, x), case.exact(x)
        assert np.linalg.norm(y - right) < 0.2 * np.linalg.norm(right)
    assert owner.repairs.wraps > 0


def test_what_is_sent_does_not_tell_of_gains_or_repairs() -> None:
    """A request's size, and its bits' distribution, at any gain; nothing is sent twice."""
    case = make_case(64, 48, parameters=THIN)
    x = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    sent = []
    for gain in (1.0, 16.0):
        owner = owner_of(case, gain)
        sent.append(np.asarray(owner.encrypt(x, case.matrix).payload).copy())
        assert len(sent[-1]) == owner.up_bytes(case.matrix, 256)
    counts = [np.bincount(s, minlength=256) for s in sent]
    for count in counts:
        expected = count.sum() / 256
        # 255 degrees of freedom: exceeded with probability 1e-6.
        assert np.sum((count - expected) ** 2 / expected) < 372


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(1, 300), st.booleans(),
    st.integers(0, 1 << 32),
)  # fmt: skip
def test_clear_products_are_products(
    tokens: int, rows: int, columns: int, forward: bool, seed: int
) -> None:
    """Against float64, in both directions."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    x = rng.standard_normal((tokens, columns if forward else rows)).astype(np.float32)
    right = x.astype(np.float64) @ (weight.T if forward else weight).astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weight.T if forward else weight)
    assert np.all(np.abs(clear_products(x, weight, forward) - right) <= 1e-5 * size + 1e-30)


def test_unwrapping_in_plain_steps() -> None:
    """Value by value, in integers; a result that is no float32 stays so."""
    rng = np.random.default_rng(0)
    true = rng.integers(-(3 << 16), 3 << 16, (4, 7))
    noisy = true + rng.integers(-900, 900, true.shape)
    wrapped = (noisy + (1 << 15)) % (1 << 16) - (1 << 15)
    scale = rng.uniform(0.5, 2, true.shape)
    out = np.zeros((9, 7), np.float32)
    tokens = np.array([1, 4, 5, 8])
    out[tokens] = wrapped * scale
    turns = unwrap(out, tokens, true.astype(np.float32), 1 << 16, scale)
    assert np.array_equal(turns, (noisy - wrapped) // (1 << 16))
    assert np.allclose(out[tokens], noisy * scale, rtol=1e-6)
    assert not out[[0, 2, 3, 6, 7]].any()
    out[1, 2] = np.inf
    unwrap(out, tokens, true.astype(np.float32), 1 << 16, scale)
    assert np.isinf(out[1, 2])


def unseen(shift: float) -> float:
    """P(a noncentral chi-square of ROWS degrees <= SUSPICION).

    With 2m degrees, it is the probability that a Poisson number of mean SUSPICION/2 is at least m
    more than one of mean shift/2.
    """

    def poisson(mean: float, count: int) -> list[float]:
        return [math.exp(n * math.log(mean or 1e-300) - mean - math.lgamma(n + 1))
                for n in range(count)]  # fmt: skip

    below = np.cumsum(poisson(shift / 2, 200))
    first = poisson(SUSPICION / 2, 200)
    return sum(p * below[n - ROWS // 2] for n, p in enumerate(first) if n >= ROWS // 2)


def test_suspicion_is_rare_and_a_wrap_is_not_missed() -> None:
    """What `integrity.SUSPICION` says of honest tokens, and the chance that one wrap is unseen.

    The noncentrality of a wrap is the sum of ROWS squares of coefficients over CHECK_NOISE squared.
    """
    assert 1 - unseen(0.0) == pytest.approx(1e-5, rel=0.01)
    size = np.random.default_rng(0).uniform(0.5, 1, (1000, ROWS))
    shift = np.sum(size**2, axis=1) / CHECK_NOISE**2
    assert np.mean([unseen(each) for each in shift]) < 1e-7


def test_repairs_do_not_depend_on_the_edge_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at results near p/2, the check's sums find single wraps by themselves."""
    case = make_case(200, 90, parameters=THIN, form=Format(16, 8))
    x = np.random.default_rng(1).standard_normal((2000, 200)).astype(np.float32)
    monkeypatch.setattr(mlwe_owner, "edge", lambda p, gain: np.inf)
    owner = owner_of(case, 4.5)
    y, right = ask(owner, case, x), case.exact(x)
    wraps, noise = beyond(case, x, 4.5)
    assert wraps > 20
    unit = np.linalg.norm(x, axis=1) / case.matrix.plan.amplitude(THIN, 4.5)
    assert np.all(np.abs(y - right) <= noise * unit[:, None] * case.matrix.out_scale + 1e-5)


@pytest.mark.parametrize("inputs", [320, 960, 2048, 8192])
def test_the_planner_takes_the_lightest_format_that_is_good_enough(inputs: int) -> None:
    """For real weights and for shapes alone; a head is planned for a far smaller error."""
    rng = np.random.default_rng(0)
    codes = np.clip(np.rint(rng.normal(0, 36, (64, inputs))), -127, 127).astype(np.int8)
    scales = np.ones(64, np.float32)
    forward, backward = plan_directions(codes, scales, THIN)
    for plan in (forward, nominal_plan(inputs, 64, THIN)):
        assert plan.predicted_error(THIN, nominal_gain(plan.in_features)) <= FORWARD_ERROR
    for plan in (backward, nominal_plan(64, inputs, THIN, forward=False)):
        assert plan.predicted_error(THIN, nominal_gain(plan.in_features)) <= BACKWARD_ERROR
        assert plan.format.up_bits < 24
    whole = plan_directions(codes, scales, preset("exact"))
    assert {plan.format for plan in whole} == {EXACT}
    head = nominal_plan(inputs, 1000, THIN, precise=True)
    assert head.format == EXACT or head.predicted_error(THIN, nominal_gain(inputs)) < 0.002


def test_a_nominal_plan_is_that_of_gaussian_weights() -> None:
    """Its norms are within a few per cent of those of weights drawn and quantised so."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((512, 2048))
    codes = np.rint(values * 127 / np.abs(values).max(axis=1, keepdims=True)).astype(np.int8)
    real, _ = plan_directions(codes, np.ones(512, np.float32), THIN)
    guess = nominal_plan(2048, 512, THIN)
    assert guess.max_norm == pytest.approx(real.max_norm, rel=0.25)
    assert guess.noise_gain == pytest.approx(real.noise_gain, rel=0.4)
    sizes = [p.format.up_bytes(2048) + p.format.down_bytes(512) for p in (guess, real)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.15)
