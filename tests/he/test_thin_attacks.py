"""Thin ciphertexts under attack: lies dressed as wraps, shapes and numbers at their ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.he.check import Expected
from backends.he.integrity import ROWS, suspicious
from backends.he.mlwe_worker import MlweWorker
from backends.he.packing import pack_answer, unpack_answer
from backends.he.plan import CHECK_NOISE
from backends.he.repair import EDGE, tolerance
from backends.he.wire import Format
from protocol.errors import WrongAnswerError
from tests.he.conftest import make_case
from tests.he.test_thin import FORMATS, THIN, ask, beyond, owner_of

NOISY = Format(16, 8)
Array = np.ndarray[Any, Any]


class Liar:
    """An owner of a wide matrix whose check is as noisy as the planner allows, and its worker."""

    def __init__(self, gain: float, seed: int = 0) -> None:
        self.case = make_case(1024, 256, parameters=THIN, form=NOISY)
        self.owner, self._worker = owner_of(self.case, gain), MlweWorker()
        self._loaded = self.case.load(self._worker)
        self.x = np.random.default_rng(seed).standard_normal((200, 1024)).astype(np.float32)
        self.renew()
        self.shares = np.abs(self.case.exact(self.x) / self.case.matrix.out_scale)
        self.shares *= 2 / NOISY.modulus / self.sent.sealed.inverse_alpha[:, None]

    def renew(self) -> None:
        """Another request of the same values; `answer` int64[T, N] is the honest one."""
        self.sent = self.owner.encrypt(self.x, self.case.matrix)
        raw = self._worker.multiply(self.sent.payload, len(self.x), self._loaded)
        self.answer = unpack_answer(raw, len(self.x), 256, NOISY).astype(np.int64)

    def accepted(self, answer: Array, worker: str = "liar") -> bool:
        """Whether the owner takes values mod 2^8; if it does, the next request is made."""
        packed = pack_answer((answer % 256).astype(np.uint16), NOISY)
        try:
            self.owner.decrypt(self.sent.sealed, packed, self.case.matrix, worker)
        except WrongAnswerError:
            return False
        self.renew()
        return True


def test_whoever_probes_for_wraps_is_found_by_the_first() -> None:
    """An eighth of p is within what rows tolerate; of a result that is looked at, it is not.

    So the time that a repair takes is nothing that a worker can ask for with answers of its own.
    """
    liar = Liar(9.0)
    peaks = liar.shares.max(axis=1)
    looked, other = int(np.argmax(peaks)), int(np.argmin(peaks))
    assert peaks[looked] > 1 > EDGE > peaks[other]
    lie = np.zeros_like(liar.answer)
    lie[looked, np.argmax(liar.shares[looked])] = 256 // 8
    assert NOISY.modulus / 8 > tolerance(liar.case.matrix.plan, THIN)
    for _ in range(6):
        assert not liar.accepted(liar.answer + lie)
    elsewhere = np.roll(lie, other - looked, axis=0)
    assert sum(liar.accepted(liar.answer + elsewhere) for _ in range(6)) >= 1


def test_a_value_moved_over_the_edge_is_no_wrap() -> None:
    """What comes out at the other end of the period is repaired to what it was, and is a lie."""
    liar = Liar(9.0)
    token, output = np.unravel_index(np.argmax(np.where(liar.shares < 1, liar.shares, 0)),
                                     liar.shares.shape)  # fmt: skip
    assert liar.shares[token, output] > 0.9
    sign = np.sign(liar.case.exact(liar.x)[token, output]).astype(int)
    for step in (40, 80, 128):
        lie = liar.answer.copy()
        lie[token, output] += sign * step
        assert not liar.accepted(lie)
    assert liar.accepted(liar.answer + 256), "a period more is the same answer"


def test_a_lie_teaches_nothing_and_the_same_request_is_answered_by_another() -> None:
    """Whatever makes all tokens suspicious; neither gains nor counts know of what was rejected."""
    liar = Liar(9.0)
    learnt: list[Array] = []
    liar.owner._gains.learn = lambda matrix, peaks, gain: learnt.append(peaks)  # type: ignore[method-assign]
    # The last is within what one result may be off by, and found by the sums alone.
    little = np.where(np.random.default_rng(1).random(liar.answer.shape) < 0.5, -10, 10)
    little[60:] = 0
    for lie in (
        np.zeros_like(liar.answer), liar.answer + 128, liar.answer[::-1], liar.answer + little,
    ):  # fmt: skip
        assert not liar.accepted(lie)
    assert not learnt
    assert liar.owner.repairs.tokens == liar.owner.repairs.wraps == 0
    assert liar.accepted(liar.answer, "honest")
    assert np.allclose(learnt[0], liar.shares.max(axis=1), atol=0.1)
    wraps = int(np.count_nonzero(liar.shares > 1))
    assert liar.owner.repairs.wraps == pytest.approx(wraps, rel=0.2, abs=8)


WEIGHTS: dict[str, Array] = {
    "one by one": np.full((1, 1), 127),
    "one input": np.arange(-20, 20)[:, None] * 6,
    "one output": np.random.default_rng(0).integers(-127, 128, (1, 90)),
    "zeros": np.zeros((30, 40)),
    "rows of zeros": np.arange(-20, 20)[:, None] * np.ones(30) * ([[1], [0]] * 20),
    "equal rows": np.tile(np.random.default_rng(0).integers(-127, 128, 70), (50, 1)),
    "one entry": np.eye(60) * 127,
}


def inputs(width: int, seed: int) -> Array:
    """float32[300, K], two blocks: dense, alike, zero, with one entry, at both ends of float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, width)).astype(np.float32)
    x[10:60] = x[10]
    x[60] = 0
    x[70:110] = 0
    x[np.arange(70, 110), np.arange(40) % width] = rng.choice((-1, 1), 40)
    x[110:150] *= np.float32(1e-42)
    x[150:190] *= np.float32(1e30)
    return x


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("gain", [None, 9.0])
def test_at_the_ends_of_shapes_and_numbers(name: str, gain: float | None) -> None:
    """No honest answer is a lie, and no result off by more than noise, learnt gain or planted."""
    weight = WEIGHTS[name].astype(np.int8)
    for form in FORMATS:
        case = make_case(weight.shape[1], len(weight), parameters=THIN, weight=weight, form=form)
        owner = owner_of(case, gain)
        for turn in range(3):
            x = inputs(weight.shape[1], turn)
            used = gain or owner._gains.of(case.matrix.name)
            y, right = ask(owner, case, x), case.exact(x)
            norms = np.linalg.norm(x.astype(np.float64), axis=1)
            unit = np.outer(norms / case.matrix.plan.amplitude(THIN, used), case.matrix.out_scale)
            most = tolerance(case.matrix.plan, THIN) * unit + 1e-5 * np.abs(right) + 1e-44
            assert np.all(np.abs(y - right) <= most)
        if gain is None and name in ("one input", "zeros"):
            assert owner.repairs.tokens < 40, "where nothing can wrap, nothing is near the edge"


@pytest.mark.parametrize("name", ["one by one", "one input", "one output"])
def test_tokens_that_look_wrong_after_a_repair_are_not_moved_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a matrix of one output all rows see one noise, so chance alone makes many suspicious."""
    every = np.arange(300)
    monkeypatch.setattr(Expected, "suspicious", lambda self: every[: len(self.peaks)])
    test_at_the_ends_of_shapes_and_numbers(name, 9.0)


def test_results_that_float32_cannot_hold_are_no_lies() -> None:
    """Wrapped ones, too large and too small: they are what they would be without encryption."""
    case = make_case(64, 40, parameters=THIN, form=NOISY)
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    for size in (1e37, 1e-44):
        scale = (case.matrix.out_scale * np.float32(10 * size)).astype(np.float32)
        if size < 1:  # a denormal scale has few digits: the input is small instead
            scale, x = case.matrix.out_scale, (x * np.float32(size)).astype(np.float32)
        ends = replace(case, matrix=replace(case.matrix, out_scale=scale))
        y = ask(owner_of(ends, 9.0), ends, x)
        with np.errstate(over="ignore"):
            right = ends.exact(x).astype(np.float32)
        lost = ~np.isfinite(right)
        assert beyond(ends, x[x.any(axis=1)], 9.0)[0] > 100
        assert lost.any() == (size > 1)
        assert np.mean(np.isfinite(y) == ~lost) > 0.95


def unseen(wraps: int, alike: bool, rng: np.random.Generator) -> float:
    """Share of tokens with so many wraps, at the noise CHECK_NOISE, that rows do not show.

    alike  all wraps have the same sign: the share over the draws of coefficients
    """
    tries = 50_000
    sizes = rng.uniform(0.5, 1, (wraps, tries, ROWS)) * rng.choice((-1, 1), (wraps, tries, ROWS))
    moved = sizes.sum(axis=0) if alike else sizes[0] - sizes[1:].sum(axis=0)
    noise = rng.standard_normal((tries, ROWS)) * CHECK_NOISE
    seen = suspicious(moved + noise, np.zeros(ROWS), np.full(ROWS, CHECK_NOISE))
    return 1 - len(seen) / tries


def test_how_often_wraps_hide_each_other() -> None:
    """Of results that go beyond the edge's reach, 1.2 times p/2: one never, a pair in 300 cases.

    A pair hides where both coefficients have the same sign in all rows, and nearly the same size.
    """
    rng = np.random.default_rng(0)
    assert unseen(1, True, rng) == 0
    for alike in (True, False):
        assert 0.001 < unseen(2, alike, rng) < 0.005
        assert unseen(3, alike, rng) < 0.001


def test_what_is_near_the_edge_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows show nothing at all, results that go a little beyond p/2 are repaired."""
    monkeypatch.setattr("backends.he.check.suspicious", lambda *sums: np.zeros(0, np.int64))
    case = make_case(200, 90, parameters=THIN, form=NOISY)
    owner = owner_of(case, 4.0)
    x = np.random.default_rng(2).standard_normal((1500, 200)).astype(np.float32)
    y, right = ask(owner, case, x), case.exact(x)
    assert beyond(case, x, 4.0)[0] > 0
    unit = np.linalg.norm(x, axis=1) / case.matrix.plan.amplitude(THIN, 4.0)
    most = tolerance(case.matrix.plan, THIN) * np.outer(unit, case.matrix.out_scale)
    assert np.all(np.abs(y - right) <= most)
