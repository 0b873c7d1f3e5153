"""Differential privacy: what one sequence can do, what the noise is, what it costs, who sees it."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from backends.defaults import LEAST_DELTA
from backends.nn import dp
from backends.nn.adapters import add_lora, trainable
from backends.nn.checkpoint import ResumeError
from backends.nn.dp import (
    DifferentialPrivacy,
    DpError,
    DpSteps,
    Draws,
    expected,
    noise_for,
    spent,
)
from backends.nn.local import localise
from backends.nn.losses import token_losses
from backends.nn.marks import UNCOUNTED, counted
from backends.nn.persample import PerSample, SeparationError, clipped_sum
from backends.nn.trainer import TrainConfig, Trainer, TrainingInterrupted
from tests.nn.conftest import Tiny, tokens

pytest.importorskip("dp_accounting")

PRIVACY = DifferentialPrivacy(8.0, delta=0.01, clip=0.5)
CONFIG = TrainConfig(
    steps=4, batch=4, micro_batch=2, learning_rate=1e-2, warmup_steps=1, privacy=PRIVACY
)
DATA = tokens(12, 10)
QUICK = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def here(tiny: Tiny, rank: int = 3) -> PeftModel:
    """A model with its linears in this process, and adapters that do something."""
    skeleton = tiny.skeleton()
    localise(skeleton, tiny.prepared["clear"])
    model = add_lora(skeleton.model, rank, 2 * rank, seed=0, linears=list(skeleton.shapes))
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], PeftModel]:
    """`here`, once for each model."""
    made: dict[str, PeftModel] = {}
    return lambda tiny: made.setdefault(tiny.config.model_type, here(tiny))


def marked(count: int, length: int, seed: int) -> torch.Tensor:
    """Sequences of which some tokens are not counted, and of the first none."""
    rows = tokens(count, length, seed)
    uncounted = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    uncounted[0] = seed % 2 == 0
    return rows | uncounted * UNCOUNTED


def slow_sum(model: nn.Module, batch: torch.Tensor, clip: float) -> list[torch.Tensor]:
    """Sequences one at a time, through plain autograd."""
    parameters = list(trainable(model).values())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in batch:
        loss = token_losses(model, row[None]) / max(1, counted(row[None]))
        own = [g.double() for g in torch.autograd.grad(loss, parameters)]
        norm = torch.cat([g.flatten() for g in own]).norm().item()
        for total, gradient in zip(sums, own, strict=True):
            total += gradient * min(1.0, clip / norm if norm else 1.0)
    return sums


def flat(parts: Any) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


@QUICK
@given(
    count=st.integers(1, 4), length=st.integers(2, 9), seed=st.integers(0, 999),
    clip=st.sampled_from([1e-3, 0.5, 3.0, 1e3]),
)  # fmt: skip
def test_gradients_are_clipped_sequence_by_sequence(
    tiny: Tiny, models: Callable[[Tiny], PeftModel], count: int, length: int, seed: int, clip: float
) -> None:
    """As of each sequence alone, of its own mean loss; Llama's linears and GPT-2's."""
    model, batch = models(tiny), marked(count, length, seed)
    private = DpSteps(model, 100, count, replace(PRIVACY, clip=clip, delta=None))
    with private.adapted():
        loss, found = private.clipped(batch)
    expected = flat(slow_sum(model, batch, clip))
    assert loss == pytest.approx(token_losses(model, batch).item(), rel=1e-5, abs=1e-6)
    assert (flat(found) - expected).norm() <= 1e-4 * min(clip, float(expected.norm()) + 1e-9)
    assert all(sums.dtype == torch.float64 for sums in found)


@QUICK
@given(seed=st.integers(0, 999), place=st.integers(0, 2), clip=st.sampled_from([1e-3, 0.5, 1e3]))
def test_one_sequence_moves_the_sum_by_two_clip_norms_at_most(
    llama: Tiny, models: Callable[[Tiny], PeftModel], seed: int, place: int, clip: float
) -> None:
    """Whatever it is replaced by, and the others' parts stay what they were."""
    private = DpSteps(models(llama), 100, 3, replace(PRIVACY, clip=clip, delta=None))
    one, other = tokens(3, 8, seed), tokens(3, 8, seed)
    other[place] = tokens(1, 8, seed + 1000)[0]
    with private.adapted():
        moved = flat(private.clipped(one)[1]) - flat(private.clipped(other)[1])
        alone = flat(private.clipped(one[[place]])[1]) - flat(private.clipped(other[[place]])[1])
    assert moved.norm() <= 2 * clip * (1 + 1e-6)
    assert (moved - alone).norm() <= 1e-4 * clip


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30]), min_size=1, max_size=5),
    weight=st.sampled_from([1e-3, 1.0]),
    clip=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_no_gradient_is_longer_than_the_clip_norm(
    scales: list[float], weight: float, clip: float
) -> None:
    """Over all parameters together; and one that is shorter is left as it is."""
    size = torch.tensor(scales)
    gradients = [torch.randn(len(scales), *shape) for shape in ((2, 3), (4,))]
    gradients = [g * size.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
    weights = torch.full((len(scales),), weight, dtype=torch.float64)
    for row in range(len(scales)):
        own = [g[[row]] for g in gradients]
        found = flat(clipped_sum(own, weights[[row]], clip))
        plain = weight * flat(own).double()
        assert found.norm() <= clip * (1 + 1e-12)
        if plain.norm() <= clip:
            assert torch.allclose(found, plain, rtol=1e-12, atol=0)
    assert flat(clipped_sum(gradients, weights, clip)).norm() <= len(scales) * clip * (1 + 1e-12)


@QUICK
@given(
    broken=st.lists(st.integers(0, 4), max_size=5), seed=st.integers(0, 999),
    with_=st.sampled_from([math.nan, math.inf, -math.inf, 3e38]), everywhere=st.booleans(),
    weight=st.sampled_from([0.0, 1e-3, 1.0]), clip=st.sampled_from([1e-3, 1e3]),
)  # fmt: skip
def test_a_gradient_that_is_not_finite_adds_nothing(
    broken: list[int], seed: int, with_: float, everywhere: bool, weight: float, clip: float
) -> None:
    """And leaves what the others add as it is, to the last bit; so does one that is only huge."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(5, *shape, generator=generator) for shape in ((3, 2), (4,))]
    others = [row for row in range(5) if row not in broken]
    weights = torch.full((5,), weight, dtype=torch.float64)
    wanted = clipped_sum([g[others] for g in gradients], weights[others], clip)
    for row in broken:
        for gradient in gradients if everywhere else gradients[1:]:
            gradient[row].view(-1)[0] = with_
    found = clipped_sum(gradients, weights, clip)
    assert all(part.isfinite().all() for part in found)
    moved = flat(found) - flat(wanted)
    if math.isfinite(with_):
        assert moved.norm() <= len(set(broken)) * clip * (1 + 1e-9)
    else:
        assert moved.norm() <= 1e-12 * clip


def test_a_step_with_a_sequence_of_no_gradient_is_one_of_the_others(llama: Tiny) -> None:
    """It goes on, and the noise is the same; that of a loss without end is another matter."""
    private = DpSteps(here(llama), 100, 3, replace(PRIVACY, delta=None))
    batch = tokens(3, 8, 5)
    of_each = private._per_sample.of_each

    def broken(part: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        loss, gradients = of_each(part)
        gradients[0][1] = math.nan
        return loss, gradients

    with private.adapted():
        wanted = private.clipped(batch[[0, 2]])[1]
        private._per_sample.of_each = broken  # type: ignore[method-assign]
        _, found = private.clipped(batch)
    assert (flat(found) - flat(wanted)).norm() <= 1e-5
    assert all(part.isfinite().all() for part in private.released(found))


def test_noise_takes_the_memory_that_the_page_says() -> None:
    """What it is itself, and little beside."""
    peak, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def most_bytes() -> int:
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", peak.read_text())[0])

    if not (peak.is_file() and os.access(reset, os.W_OK)):
        pytest.skip("needs Linux's account of this process's memory")
    count, draws = 2_000_000, Draws()
    draws.noise((1000,), 1.0)
    reset.write_text("5")
    before = most_bytes()
    draws.noise((count // 2, 2), 1.0)
    assert most_bytes() - before < 1.5 * 8 * count


def test_noise_is_gaussian_of_the_stated_size() -> None:
    """Mean, variance and tails within eight deviations of what such a sample shows."""
    count, deviation = 200_000, 3.0
    found = Draws().noise((count // 4, 4), deviation)
    assert found.shape == (count // 4, 4)
    assert found.dtype == torch.float64
    z = found.flatten() / deviation
    assert abs(z.mean()) < 8 / math.sqrt(count)
    assert abs(z.square().mean() - 1) < 8 * math.sqrt(2 / count)
    tail = math.erfc(2 / math.sqrt(2))
    assert abs((z.abs() > 2).double().mean() - tail) < 8 * math.sqrt(tail / count)
    assert abs((z[1:] * z[:-1]).mean()) < 8 / math.sqrt(count)


def test_batches_are_sampled_as_the_accountant_has_it() -> None:
    """Sizes as of sequences drawn by themselves, cut at the most; each as often as any other."""
    draws, seen, sizes, rounds = Draws(), torch.zeros(6), torch.zeros(4), 3000
    for _ in range(rounds):
        batch = draws.batch(6, 3)
        assert len(set(batch)) == len(batch)
        seen[batch] += 1
        sizes[len(batch)] += 1
    rate = expected(3) / 6
    of_size = [math.comb(6, k) * rate**k * (1 - rate) ** (6 - k) for k in range(7)]
    wanted = torch.tensor([*of_size[:3], sum(of_size[3:])])
    assert (sizes - rounds * wanted).abs().max() < 8 * math.sqrt(rounds / 4)
    mean = float(sum(k * p for k, p in enumerate(wanted.tolist()))) / 6
    assert (seen - rounds * mean).abs().max() < 8 * math.sqrt(rounds / 4)


def test_a_batch_is_filled_with_what_counts_for_nothing(llama: Tiny) -> None:
    """To the same size always, and its gradient is that of what was drawn."""
    model = here(llama)
    steps = DpSteps(model, len(DATA), 6, PRIVACY)
    sizes = set()
    for _ in range(20):
        batch = steps.batch(DATA)
        assert batch.shape == (6, DATA.shape[1])
        real = batch[: int((batch != UNCOUNTED).any(1).sum())]
        assert all(any(torch.equal(row, own) for own in DATA) for row in real)
        sizes.add(len(real))
    assert len(sizes) > 1
    with steps.adapted():
        loss, sums = steps.clipped(torch.full((2, 8), UNCOUNTED))
    assert loss == 0
    assert flat(sums).abs().max() == 0


class Known(Draws):
    """Draws that a test can repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def batch(self, sequences: int, batch: int) -> list[int]:
        return torch.randperm(sequences, generator=self.generator)[: batch - 1].tolist()

    def noise(self, shape: Any, deviation: float) -> torch.Tensor:
        noise = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        return noise * deviation


def trained(tiny: Tiny, lanes: int, steps: int = 2) -> list[torch.Tensor]:
    skeleton = tiny.skeleton()
    model = add_lora(skeleton.model, 4, 8, seed=0)
    config = replace(CONFIG, steps=steps, micro_batch=1)
    trainer = Trainer(model, DATA, config, lanes=lanes, forget_lane=skeleton.remote.forget_lane)
    with tiny.connected(skeleton, "clear", lanes):
        trainer.train()
    return [p.detach().clone() for p in trainable(model).values()]


@pytest.fixture
def any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is not what these tests are of, and takes a second to find."""
    monkeypatch.setattr(dp, "noise_for", lambda *_: 1.0)


@pytest.mark.usefixtures("any_noise")
def test_lanes_change_not_one_bit(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws; with the system's own no two runs are alike."""
    assert not torch.equal(flat(trained(llama, 2, steps=1)), flat(trained(llama, 2, steps=1)))
    monkeypatch.setattr(dp, "Draws", Known)
    assert torch.equal(flat(trained(llama, 1)), flat(trained(llama, 3)))


@pytest.mark.usefixtures("any_noise")
def test_a_step_is_the_clipped_mean_and_its_noise(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimiser is given; nothing is clipped after the noise."""
    monkeypatch.setattr(dp, "Draws", Known)
    model, draws = here(llama), Known()
    batch = draws.batch(len(DATA), 4)
    sums = slow_sum(model, DATA[batch], PRIVACY.clip)
    trainer = Trainer(model, DATA, replace(CONFIG, steps=1))
    assert trainer.dp is not None
    noise = trainer.dp.noise
    noises = [draws.noise(s.shape, noise * PRIVACY.clip) for s in sums]
    wanted = flat([s + n for s, n in zip(sums, noises, strict=True)]) / expected(4)
    trainer.train()
    found = flat([p.grad for p in trainable(model).values()])
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert wanted.norm() > CONFIG.max_grad_norm
    assert trainer.progress.gradient_norms[0] == pytest.approx(float(wanted.norm()), rel=1e-4)


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Of a Gaussian mechanism whose sensitivity is 2, exactly (Balle and Wang 2018, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    half, rest = 1 / noise, epsilon * noise / 2
    return below(half - rest) - math.exp(epsilon) * below(-half - rest)


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 1), (10.0, 20), (60.0, 100)])
def test_nearly_without_sampling_it_is_the_gaussian_mechanism(noise: float, steps: int) -> None:
    """Where a batch may be all of the data, sampling helps a little and nothing is cut."""
    epsilon = spent(400, 400, steps, noise, 1e-5)
    of_all = noise / math.sqrt(steps)
    assert gaussian_delta(1.01 * epsilon, of_all / (expected(400) / 400)) <= 1e-5
    assert gaussian_delta(0.99 * epsilon, of_all) > 1e-5


def one_step_delta(epsilon: float, sequences: int, batch: int, noise: float) -> float:
    """Of one step, exactly: whether the sequence is in the batch is all that matters of it."""
    rate = expected(batch) / sequences
    others = [
        math.comb(sequences - 1, k) * rate**k * (1 - rate) ** (sequences - 1 - k)
        for k in range(sequences)
    ]
    # Of k others that were drawn with it, batch - 1 find a place beside it.
    taken = rate * sum(p * min(1.0, batch / (k + 1)) for k, p in enumerate(others))
    at = torch.linspace(-12 * noise, 12 * noise, 200_001, dtype=torch.float64)

    def density(mean: float) -> torch.Tensor:
        return torch.exp(-((at - mean) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    one, other = ((1 - taken) * density(0.0) + taken * density(c) for c in (1.0, -1.0))
    more = (one - math.exp(epsilon) * other).clamp(min=0)
    return float(more.sum() * (at[1] - at[0]))


@pytest.mark.parametrize(
    ("sequences", "batch", "noise"), [(100, 4, 0.8), (60, 16, 1.5), (300, 64, 3.0)]
)
def test_a_sampled_step_is_accounted_for(sequences: int, batch: int, noise: float) -> None:
    """Against an integral: never too little. Cut batches are taken for worse than they are."""
    epsilon = spent(sequences, batch, 1, noise, 1e-3)
    assert one_step_delta(epsilon, sequences, batch, noise) <= 1e-3
    assert one_step_delta(epsilon / 6, sequences, batch, noise) > 1e-3


@pytest.mark.parametrize(
    ("sequences", "steps", "noise"), [(10_000, 5000, 2.0), (1_000_000, 20_000, 1.0)]
)
def test_the_least_delta_is_one_that_the_accountant_can_tell(
    sequences: int, steps: int, noise: float
) -> None:
    """From it on epsilon grows by as much for each tenth of delta; far below it is no use."""
    tenths = [spent(sequences, 256, steps, noise, LEAST_DELTA * 10**n) for n in (2, 1, 0)]
    assert tenths[2] - tenths[1] <= 1.1 * (tenths[1] - tenths[0])
    assert spent(sequences, 256, steps, noise, 1e-3 * LEAST_DELTA) > 1.3 * tenths[2] or (
        spent(sequences, 256, steps, noise, 1e-5 * LEAST_DELTA) == math.inf
    )
    for delta in (LEAST_DELTA / 2, 1e-12, 1e-30, 0.0, math.nan, 1.0):
        with pytest.raises(ValueError, match="delta is 1e-10 at least"):
            DifferentialPrivacy(8.0, delta)
    DifferentialPrivacy(8.0, LEAST_DELTA)


def test_noise_samples_and_fewer_steps_spend_less() -> None:
    epsilon = spent(2000, 16, 500, 1.0, 1e-5)
    assert spent(2000, 16, 500, 1.2, 1e-5) < epsilon
    assert spent(2000, 16, 250, 1.0, 1e-5) < epsilon
    assert spent(4000, 16, 500, 1.0, 1e-5) < epsilon
    assert spent(2000, 16, 0, 1.0, 1e-5) == 0


def test_the_accountant_agrees_with_what_was_published() -> None:
    """Abadi et al. (2016): q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: at most 1.26, by a bound
    that privacy loss distributions improve on a little."""
    import dp_accounting

    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0))
    composed = dp_accounting.SelfComposedDpEvent(step, 10_000)
    assert 0.8 < accountant.compose(composed).get_epsilon(1e-5) <= 1.26


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_the_noise_is_the_least_that_keeps_to_the_budget(epsilon: float) -> None:
    privacy = DifferentialPrivacy(epsilon, 1e-5)
    noise = noise_for(5000, 32, 200, privacy)
    assert spent(5000, 32, 200, noise, 1e-5) <= epsilon < spent(5000, 32, 200, 0.98 * noise, 1e-5)


def test_too_little_data_is_refused_with_what_would_do() -> None:
    """And that does."""
    privacy = DifferentialPrivacy(0.5)
    with pytest.raises(DpError, match="nothing would be learned") as refused:
        noise_for(30, 4, 200, privacy)
    text = str(refused.value)
    ways = re.search(r"--dp-epsilon (\S+), or (\d+) sequences, or --steps (\d+)", text)
    assert ways is not None
    assert noise_for(30, 4, 200, DifferentialPrivacy(float(ways[1]))) <= 4
    assert noise_for(int(ways[2]), 4, 200, privacy) <= 4
    assert noise_for(30, 4, int(ways[3]), privacy) <= 4
    with pytest.raises(DpError, match="a step takes 40 sequences, and there are 30"):
        noise_for(30, 40, 10, privacy)
    with pytest.raises(DpError, match=r"delta 0.1 is not below 1/30.*--dp-delta"):
        noise_for(30, 4, 10, replace(privacy, delta=0.1))


def seen(tiny: Tiny, config: TrainConfig) -> list[tuple[int, int]]:
    """(matrix, tokens) of every request of a training, from when there is a session."""
    with tiny.requests() as (model, forget_lane, requests):
        Trainer(model, DATA, config, forget_lane=forget_lane).train()
    return requests


@pytest.mark.usefixtures("any_noise")
def test_workers_see_the_same_requests_as_without(llama: Tiny) -> None:
    """As many, as large, in the same order, though the model was tried in the session."""
    assert seen(llama, CONFIG) == seen(llama, replace(CONFIG, privacy=None))


def test_a_resumed_run_keeps_its_noise_and_its_budget(llama: Tiny, tmp_path: Path) -> None:
    """What was spent goes on; more steps need a larger budget; other settings are refused."""

    def trainer(config: TrainConfig) -> Trainer:
        return Trainer(here(llama), DATA, config, checkpoints=tmp_path)

    def stop(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    first = trainer(CONFIG)
    assert first.spent() == (0.0, 0.01)
    with pytest.raises(TrainingInterrupted):
        first.train(stop)
    steps, half = first.dp, first.spent()
    assert steps is not None
    assert half == (spent(12, 4, 2, steps.noise, 0.01), 0.01)
    again = trainer(CONFIG)
    assert again.spent() == half
    assert again.dp is not None
    assert again.dp.noise == steps.noise
    with pytest.raises(DpError, match=r"8 steps would spend epsilon .*--fresh") as refused:
        trainer(replace(CONFIG, steps=8))
    larger = re.search(r"--dp-epsilon (\S+),", str(refused.value))
    assert larger is not None
    more = replace(PRIVACY, epsilon=float(larger[1]))
    longer = trainer(replace(CONFIG, steps=8, privacy=more))
    assert longer.dp is not None
    assert longer.dp.noise == steps.noise
    for other in (replace(PRIVACY, clip=1.0), replace(PRIVACY, delta=0.02), None):
        with pytest.raises(ResumeError, match="dp_"):
            trainer(replace(CONFIG, privacy=other))
    again.train()
    assert again.spent() == (pytest.approx(PRIVACY.epsilon, rel=5e-2), 0.01)
    assert Trainer(here(llama), DATA, replace(CONFIG, privacy=None)).spent() is None


def test_without_the_accountant_a_line_says_what_to_install(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DpError, match=r"^differential privacy needs .*pip install .*\[dp\]'$"):
        Trainer(here(llama), DATA, CONFIG)


def test_other_trained_parameters_are_refused(llama: Tiny) -> None:
    """A norm, a bias; adapters that use their numbers otherwise."""
    model = here(llama)
    norm = next(n for n, _ in model.named_parameters() if n.endswith("input_layernorm.weight"))
    model.get_parameter(norm).requires_grad_(True)
    with pytest.raises(SeparationError, match=f"only LoRA.*and not {re.escape(norm)}"):
        PerSample(model)
    skeleton = llama.skeleton()
    localise(skeleton, llama.prepared["clear"])
    targets = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(SeparationError, match="lora_B"):
        PerSample(get_peft_model(skeleton.model, targets))


def test_models_that_mix_sequences_are_refused(llama: Tiny) -> None:
    """Whether a layer looks at the whole batch, or has its tokens in another order."""

    def mixed(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * output.mean(0, keepdim=True)

    model = here(llama)
    mlp = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    handle = mlp.register_forward_hook(mixed)
    with pytest.raises(SeparationError, match="depends on the others"):
        PerSample(model).require_apart()
    handle.remove()
    PerSample(model).require_apart()
    around = mlp.forward
    for turn, message in ((lambda x: x.transpose(0, 1), "mixes them"),
                          (lambda x: x.transpose(0, 1).flatten(0, 1), "depends on")):  # fmt: skip

        def turned(x: torch.Tensor, turn: Any = turn) -> torch.Tensor:
            y = around(turn(x))
            return y.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1)

        mlp.forward = turned  # type: ignore[method-assign]
        with pytest.raises(SeparationError, match=message):
            PerSample(model).require_apart()
    mlp.forward = lambda x: around(x.flatten(0, 1)).view(x.shape)  # type: ignore[method-assign]
    PerSample(model).require_apart()
