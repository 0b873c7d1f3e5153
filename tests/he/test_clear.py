"""The clear backend's own check of answers."""

from __future__ import annotations

import numpy as np
import pytest

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.entropy import SeededEntropy
from protocol.errors import WrongAnswerError
from tests.he.conftest import make_case


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_honest_answers_pass_and_one_wrong_value_does_not(forward: bool, size: float) -> None:
    """At any scale; a refused answer leaves the request open for the right one."""
    case = make_case(300, 200, forward)
    owner, worker = ClearOwner(SeededEntropy(1)), ClearWorker()
    owner.guard(case.matrix, case.weight, forward)
    operand = case.load(worker)
    rng = np.random.default_rng(2)
    for _ in range(20):
        x = (size * rng.standard_t(2, (9, case.matrix.in_features))).astype(np.float32)
        made = owner.encrypt(x, case.matrix)
        answer = worker.multiply(made.payload.data, len(x), operand)
        wrong = answer.view(np.float32).copy()
        wrong[rng.integers(wrong.size)] += np.abs(wrong).max() / 100
        with pytest.raises(WrongAnswerError, match="not the product"):
            owner.decrypt(made.sealed, wrong.view(np.uint8).data, case.matrix)
        y = owner.decrypt(made.sealed, answer.data, case.matrix)
        assert np.allclose(y, case.exact(x), rtol=1e-3, atol=1e-3 * np.abs(case.exact(x)).max())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_no_product(value: float) -> None:
    """A NaN compares with nothing; it must not slip through for that."""
    case = make_case(30, 20)
    owner = ClearOwner()
    owner.guard(case.matrix, case.weight, True)
    made = owner.encrypt(np.ones((3, 30), np.float32), case.matrix)
    answer = np.full(60, value, np.float32)
    with pytest.raises(WrongAnswerError):
        owner.decrypt(made.sealed, answer.view(np.uint8).data, case.matrix)


def test_zeros_fit_zeros_only() -> None:
    """An input of zeros leaves no room for rounding."""
    case = make_case(30, 20)
    owner = ClearOwner()
    owner.guard(case.matrix, case.weight, True)
    made = owner.encrypt(np.zeros((2, 30), np.float32), case.matrix)
    right, wrong = np.zeros(40, np.float32), np.full(40, 1e-30, np.float32)
    with pytest.raises(WrongAnswerError):
        owner.decrypt(made.sealed, wrong.view(np.uint8).data, case.matrix)
    assert not owner.decrypt(made.sealed, right.view(np.uint8).data, case.matrix).any()


def test_seeded_signs_are_refused_by_real_drivers() -> None:
    """The check's secrets come from the operating system unless a simulator says otherwise."""
    assert not ClearOwner().simulated_randomness
    assert ClearOwner(SeededEntropy(0)).simulated_randomness
