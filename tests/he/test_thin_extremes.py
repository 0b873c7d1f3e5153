"""Thin ciphertexts at the ends of float32, and with data made to be hard: nobody is accused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backends.he.plan import MARGIN
from backends.he.repair import astray, edge, unwrap
from backends.he.wire import Format
from tests.he.conftest import make_case
from tests.he.test_thin import THIN, ask, owner_of


def test_wraps_below_float32_are_no_lies() -> None:
    """Results of which nothing is left, not even that they are none: they are still compared."""
    case = make_case(60, 40, parameters=THIN, form=Format(16, 8))
    case.matrix = replace(case.matrix, out_scale=case.matrix.out_scale * np.float32(1e-30))
    heaviest = case.weight[np.argmax(np.linalg.norm(case.weight.astype(float), axis=1))]
    for size in (1e-20, 1e-17, 1e-16, 1e-15, 1e-14):
        x = (heaviest[None] * np.float32(size)).astype(np.float32)
        ask(owner_of(case, 2.0), case, x)


@pytest.mark.parametrize("size", [1e-45, 1e-43, 1e-42, 1e-41, 1e-40, 1e-38, 1e34, 1e35, 1e36, 1e37])
def test_wraps_at_the_ends_of_float32_are_no_lies(size: float) -> None:
    """Tokens along the heaviest row wrap, whatever they are multiplied by."""
    case = make_case(60, 40, parameters=THIN, form=Format(16, 8))
    heaviest = case.weight[np.argmax(np.linalg.norm(case.weight.astype(float), axis=1))]
    shares = np.array([1, -1, 0.9, 0.7, 0.6])[:, None]
    x = (heaviest / np.abs(heaviest).max() * shares * size).astype(np.float32)
    for gain in (1.5, 2.0, 4.0):
        y = ask(owner_of(case, gain), case, x)
        right = case.exact(x)
        large = np.abs(right) > 0.3 * np.abs(right).max()
        assert np.array_equal(np.signbit(y[large]), np.signbit(right[large]))


def test_a_moved_result_that_float32_cannot_hold_is_not_astray() -> None:
    """It overflowed on the wrong side of zero; where it belongs it may, or may not."""
    p, rng = 1 << 16, np.random.default_rng(0)
    noise = p / 200
    for exponent in range(105, 125):
        scale = np.full((30, 20), 2.0**exponent)
        true = rng.uniform(-1.2, 1.2, scale.shape) * p
        noisy = np.rint(true + noise * rng.standard_normal(scale.shape))
        wrapped = (noisy + p // 2) % p - p // 2
        with np.errstate(over="ignore"):
            out = (wrapped * scale).astype(np.float32)
            right, tokens = true.astype(np.float32), np.arange(len(out))
            assert np.array_equal(unwrap(out, tokens, right, p, scale), (noisy - wrapped) / p)
        assert not astray(out, tokens, right, 8 * noise, scale)


def test_a_message_that_rounds_all_one_way_is_no_lie() -> None:
    """Clear products are of the message that was encrypted, not of the input it was rounded from.

    With 24 bits up, and 16,384 equal inputs and weights, what rounding does adds up to more than
    eight deviations of the noise.
    """
    inputs = 16384
    weight = np.full((2, inputs), 127, np.int8)
    case = make_case(inputs, 2, parameters=THIN, weight=weight, form=Format(24, 16))
    plan = case.matrix.plan
    each = plan.amplitude(THIN, 1.0) / np.sqrt(inputs) * THIN.modulus / plan.format.modulus
    message = np.ceil(1.5 * each) + 0.49
    gain = message / each
    assert edge(plan.format.modulus, gain) < gain * plan.format.modulus / 2
    rounding = 0.49 * 127 * inputs * plan.format.modulus / THIN.modulus
    assert rounding > 8 * plan.margin(THIN) / MARGIN
    x = np.ones((8, inputs), np.float32)
    y = ask(owner_of(case, gain), case, x)
    assert np.allclose(y, case.exact(x), rtol=0.02)


def test_tokens_of_zeros_teach_no_gain() -> None:
    """Their results are noise, which says nothing of what others allow."""
    case = make_case(200, 90, parameters=THIN, form=Format(18, 8))
    x = np.zeros((30, 200), np.float32)
    x[0] = np.random.default_rng(0).standard_normal(200)
    owner = owner_of(case)
    ask(owner, case, x)
    assert owner._gains._histograms[case.matrix.name]._counts.sum() == 1
