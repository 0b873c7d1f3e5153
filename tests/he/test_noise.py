"""The law of a result's error that `docs/cipher.md` derives, held against real encryptions."""

from __future__ import annotations

from dataclasses import replace
from math import erfc, exp, inf, nan, sqrt

import numpy as np
import pytest

from backends.he.params import preset
from benchmarks import noise
from benchmarks.noise import CASES, SIGMAS, Law, Tally, largest_score, law, measure, scores

LIMIT = 6.0
"""Standard errors: all scores of a run stay below it but once in some ten million runs."""
QUICK = 1_500_000
NARROW, COARSE, WIDE = CASES[0], CASES[1], replace(CASES[2], outputs=128)


@pytest.mark.parametrize("case", [NARROW, COARSE, WIDE], ids=lambda case: case.name)
def test_errors_follow_the_law(case: noise.Case) -> None:
    """Mean, variance, fourth moment and tails; precise enough to see 3 % of the variance."""
    found = measure(case, preset("exact"), QUICK)
    assert largest_score(found) < LIMIT, found
    assert 0.03 / found["variance"]["standard_error"] > 2 * LIMIT


def test_a_law_that_is_a_little_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An LWE error taken for 44 bits instead of 40 is 3 % of the variance."""
    monkeypatch.setattr(noise, "ERROR_BITS", 44)
    assert abs(scores(measure(WIDE, preset("exact"), QUICK))["variance"]) > LIMIT


def test_a_tail_forecast_below_zero_is_none_at_all() -> None:
    """As an integral may end: its score is that of nothing expected, and a number."""
    tally = Tally(2)
    tally.add(np.random.default_rng(3).normal(0, 1, (200_000, 2)).clip(-4.9, 4.9))
    tails = [erfc(z / sqrt(2)) for z in SIGMAS[:4]]
    expected = Law(np.zeros(2), np.ones(2), np.full(2, 3.0), np.array([[*tails, -1e-5]] * 2))
    found = tally.against(expected)
    assert found["beyond_5_sigma"] == {"measured": 0, "predicted": 0.0, "score": 0.0}
    assert largest_score(found) < LIMIT


@pytest.mark.parametrize("place", ["mean", "outputs"])
def test_a_score_that_is_no_number_is_not_passed_over(place: str) -> None:
    """Wherever it stands among the others."""
    found = {name: {"score": -2.0} for name in ("mean", "variance", "beyond_1_sigma")}
    whole = found | {"largest_score_of_an_outputs_mean": 1.0}
    assert largest_score(whole) == 2
    if place == "outputs":
        whole["largest_score_of_an_outputs_mean"] = nan
    else:
        found[place]["score"] = nan
    assert largest_score(whole) == inf


def test_tails_are_below_the_bound_and_those_of_a_wide_row_are_normal() -> None:
    """P(|error - mean| > z*deviation) <= 2*exp(-z^2/2), for any row."""
    for case in (NARROW, COARSE, WIDE):
        beyond = law(case.weight()[:4], preset("exact")).beyond
        assert np.all(beyond <= [2 * exp(-(z**2) / 2) for z in SIGMAS])
        assert np.all(beyond > 0)
    assert beyond[0] == pytest.approx([erfc(z / sqrt(2)) for z in SIGMAS], rel=0.05)


def test_the_deviation_is_what_the_document_says() -> None:
    """For one plain row: a 3 and a -4, K = 2."""
    parameters = preset("exact")
    ratio = 2**24 / 268432897
    found = law(np.array([[3, -4]], np.int8), parameters)
    variance = 25 * (1 / 12 + ratio**2 * (10 + 1 / 12)) + 4**8 / 12
    assert found.deviation[0] == pytest.approx(sqrt(variance))
    assert found.mean[0] == 0.5
    with pytest.raises(ValueError, match="zero"):
        law(np.zeros((1, 3), np.int8), parameters)
