"""A worker that lies is found; an honest one never accused."""

from __future__ import annotations

import numpy as np
import pytest

from backends.he.entropy import OsEntropy
from backends.he.integrity import IntegrityCheck
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters
from protocol.errors import WrongAnswerError
from tests.he.conftest import Case, make_case


def ask(case: Case, tokens: int, tamper: object = None) -> None:
    """One guarded round trip; `tamper` changes the answer uint16[T, N] in place."""
    owner, worker = MlweOwner(case.parameters, case.public), MlweWorker(case.parameters)
    owner.guard(case.matrix, case.weight, case.forward)
    x = np.random.default_rng().standard_normal((tokens, case.matrix.in_features))
    sent = owner.encrypt(x.astype(np.float32), case.matrix)
    answer = worker.multiply(sent.payload, tokens, worker.load(case.weight, case.forward))
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
    parameters = Parameters("two", rank=5, limbs=2, dropped_bits=4)
    ask(make_case(40, 30, parameters=parameters), 50)


def zero(answer: np.ndarray) -> None:
    answer[...] = 0


def replay(answer: np.ndarray) -> None:
    answer[...] = np.roll(answer, 1, axis=0)


def one_value(answer: np.ndarray) -> None:
    answer[3, 5] ^= 1 << 12


def noise(answer: np.ndarray) -> None:
    answer[...] = np.random.default_rng().integers(0, 1 << 16, answer.shape)


@pytest.mark.parametrize("tamper", [zero, replay, one_value, noise])
def test_a_lying_worker_is_found(tamper: object) -> None:
    """The error names the layer and says what to do."""
    case = make_case(70, 60)
    for _ in range(10):
        with pytest.raises(WrongAnswerError, match=r"70x60: .*broken or lying.*stop using"):
            ask(case, 8, tamper)


def test_errors_that_cancel_are_found_by_some_row() -> None:
    """Equal and opposite errors pass a row half the time, all eight rows 1 time in 256."""
    case = make_case(70, 60)

    def opposite(answer: np.ndarray) -> None:
        answer[:1, 1] += 1 << 13
        answer[:1, 2] -= 1 << 13

    found = 0
    for _ in range(60):
        try:
            ask(case, 2, opposite)
        except WrongAnswerError:
            found += 1
    assert found >= 55


def test_signs_are_fresh_for_every_owner() -> None:
    """Two owners of one model never share a check."""
    weight = np.ones((400, 3), np.int8)
    a, b = (IntegrityCheck("m", weight, True, OsEntropy()) for _ in range(2))
    assert 0.4 < np.mean(a._signs == b._signs) < 0.6
    assert abs(a._signs.view(np.int32).mean()) < 0.1
