"""`benchmarks.quality`: the noise that it adds is what it says, and so are its figures."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from backends.nn.skeleton import build_skeleton
from benchmarks.quality import (
    CLEAR,
    Case,
    NoisyProducts,
    Training,
    cases,
    gap_percent,
    measure,
    rounded,
)
from scenarios.quickstart.run import Private
from tests.nn.conftest import BASES, tokens

TOKENS = 4000


@pytest.mark.parametrize("matrix", [0, 1], ids=["forward", "backward"])
def test_noise_has_the_stated_size_and_no_bias(matrix: int) -> None:
    """Of each token by its own product; the other direction has none."""
    skeleton = build_skeleton(BASES["llama"])
    noise = (0.0, 0.1) if matrix else (0.1, 0.0)
    noisy = NoisyProducts(skeleton, Case("noisy", None, *noise), seed=1)
    generator = torch.Generator().manual_seed(2)
    for tried in (0, 1):
        spec = skeleton.groups[0]
        inputs = spec.total_out if tried else spec.in_features
        x = torch.randn(TOKENS, inputs, generator=generator)
        x *= torch.logspace(-3, 3, TOKENS)[:, None]
        weight = torch.cat([skeleton.load_weight(member) for member in spec.members])
        exact = x @ (weight if tried else weight.T)
        off = noisy.linear(tried, x.numpy()) - exact
        if tried != matrix:
            assert off.norm() < 1e-5 * exact.norm()
            continue
        size = off.norm(dim=1) / exact.norm(dim=1)
        assert size.mean() == pytest.approx(0.1, rel=0.02)
        assert size.std() < 0.2 * 0.1
        standard = off / (0.1 * exact.norm(dim=1, keepdim=True) / sqrt(exact.shape[1]))
        assert standard.mean(dim=0).abs().max() < 5 / sqrt(TOKENS)
        along = (standard * exact).sum(dim=1) / exact.norm(dim=1)
        assert abs(along.mean()) < 5 / sqrt(TOKENS)


def test_rows_are_rounded_to_the_nearest_step_of_their_own() -> None:
    """31 steps of 6 bits each way; the largest of a row is exact."""
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1000
    step = weight.abs().amax(dim=1, keepdim=True) / 31
    off = (rounded(weight, 6) - weight).abs()
    assert (off <= 0.5001 * step).all()
    assert (off > 0.4 * step).any()
    assert len(rounded(weight, 6)[0].unique()) <= 63
    assert rounded(weight, None) is weight


def test_runs_of_a_tiny_model() -> None:
    """Every case beside clear; large noise costs loss, and clear's own figures are the zero."""
    text = Private(tokens(8, 24, seed=1), tokens(4, 24, seed=2), files=1)
    tried = cases([50.0], [8, 4])
    found = measure(BASES["llama"], text, tried, Training(2, 2, 1e-2, 4), seeds=1)
    runs = {run["name"]: run for run in found["runs"]}
    assert set(runs) == {CLEAR.name, *(case.name for case in tried)}
    assert runs["clear"]["final_loss"] == found["clear_loss"]
    assert gap_percent(found, CLEAR) == 0
    noisy = runs["forward 50 %"]
    assert (noisy["weight_bits"], noisy["error_forward"]) == (8, 0.5)
    assert noisy["final_loss"] != noisy["adapter_loss"]
    assert runs["backward 50 %"]["final_loss"] == runs["backward 50 %"]["adapter_loss"]
    assert noisy["gradient_norm_ratio"] != 1 != runs["backward 50 %"]["gradient_norm_ratio"]
    assert runs["weights as they are"]["final_loss"] != found["clear_loss"]
