"""`benchmarks.thin`: it counts what wraps, and its parts run at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backends.he.check import Expected
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.repair import Gains
from backends.he.wire import Format
from benchmarks.thin import __main__ as command
from benchmarks.thin import head, outliers, training
from benchmarks.thin.wraps import CountingOwner, Tally
from tests.he.conftest import make_case
from tests.nn.conftest import BASES, LLAMA, tokens

THIN = preset("thin")
GAIN = 6.0


class TooLarge(Gains):
    """A gain at which many results wrap."""

    def of(self, matrix: str) -> float:
        return GAIN


def counted(forward: bool) -> tuple[Tally, int, int]:
    """(what is counted of a request with planted wraps, those repaired, those there are)."""
    case = make_case(200, 90, forward, parameters=THIN, form=Format(16, 8))
    owner, worker = CountingOwner(THIN, case.public), MlweWorker()
    owner.guard(case.matrix, case.weight, case.forward)
    owner._gains = TooLarge()
    x = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)
    x[5] = 0
    sent = owner.encrypt(x, case.matrix)
    answer = worker.multiply(sent.payload, len(x), case.load(worker))
    owner.decrypt(sent.sealed, answer, case.matrix)
    norms = np.linalg.norm(x.astype(np.float64) * case.matrix.in_scale, axis=1).clip(min=1e-9)
    alpha = case.matrix.plan.amplitude(THIN, GAIN) / norms
    y = np.abs(case.exact(x) / case.matrix.out_scale) * alpha[:, None]
    return owner.tallies[case.matrix.name], owner.repairs.wraps, int(np.sum(y > 1 << 15))


@pytest.mark.parametrize("forward", [True, False])
def test_planted_wraps_are_counted(forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them; as unseen, when the owner neither repairs nor checks."""
    tally, repaired, there = counted(forward)
    assert there > 100
    assert tally.wraps == pytest.approx(there, rel=0.1)
    assert (tally.wraps, tally.unseen) == (repaired, 0)
    assert tally.gain == GAIN
    assert 1 < tally.peak < GAIN
    assert 0 < tally.error < 0.1
    monkeypatch.setattr(MlweOwner, "_repair", lambda *_: (0, 0))
    monkeypatch.setattr(Expected, "require", lambda *_: None)
    tally, repaired, there = counted(forward)
    assert repaired == 0
    assert tally.wraps == tally.unseen == pytest.approx(there, rel=0.1)
    assert tally.error > 0.3


def test_runs_of_a_tiny_model(tmp_path: Path) -> None:
    """Private beside clear: nearly the same losses; both moved."""
    task = training.Task("toy", BASES["llama"], tokens(8, 24), tokens(2, 24, 1), 2, 2, 1e-2)
    run = training.run(task, 0, THIN, tmp_path)
    assert run["private_loss"] == pytest.approx(run["clear_loss"], rel=0.005)
    assert run["private_loss"] != run["clear_loss"] < run["base_loss"]
    assert run["adapter_loss"] == pytest.approx(run["private_loss"], rel=0.005)
    assert run["adapter_loss"] not in (run["private_loss"], run["clear_loss"])
    assert run["gradient_norm_ratio"] == pytest.approx(1, abs=0.05)
    assert run["wraps"] == run["wraps_repaired"]
    assert run["wraps_unseen"] == 0
    assert run["results"] > 100_000
    assert training.missing([run], "toy", 2, 2) == [1]
    assert training.missing([run], "toy", 3, 1) == [0]


def test_a_remote_heads_gradient_is_nearly_exact(tmp_path: Path) -> None:
    """Through encrypted logits and the owner's own rows; the words are as sure as a model's."""
    found = head.measure(*head.peaked(2000, 48, 20), THIN, tmp_path)
    assert found["gradient_error_backward_alone"] < found["gradient_error"] + 0.002 < 0.012
    assert 0.3 < found["mean_top_probability"] < 0.9
    assert not list(tmp_path.iterdir())


def test_outliers_keep_the_function_and_are_measured(tmp_path: Path) -> None:
    """The changed model says the same; its gradients are nearly clear's."""

    def made() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 1})
        return LlamaForCausalLM(config).eval()

    text = torch.stack([tokens(2, 24, seed) for seed in range(2)])
    with torch.no_grad():
        same, other = (m(text[0]).logits for m in (made(), outliers.with_outliers(made())))
    assert torch.allclose(same, other, atol=1e-4)
    found = outliers.measure(made, text, ("thin", "exact"), tmp_path, rank=4)
    assert 1e-5 < found["exact"] < 0.015 < found["thin"] < 0.1


def test_figures_of_the_same_commit_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another commit or preset, and of a damaged file, nothing is."""
    monkeypatch.setattr(command, "model_config", lambda name: LLAMA)
    file = tmp_path / "thin.json"
    figures = command.kept(file, "thin")
    command.measure(figures, "traffic", command.parse(["--part", "traffic"]))
    assert 0 < figures["bytes_per_token_down"] < figures["bytes_per_token_up"]
    command.keep(file, figures)
    assert command.kept(file, "thin") == figures
    assert not command.kept(file, "exact")["parts"]
    told = json.loads(file.read_text())
    told["origin"]["commit"] = "0" * 12
    file.write_text(json.dumps(told))
    assert "bytes_per_token_up" not in command.kept(file, "thin")
    file.write_text("{")
    assert command.kept(file, "thin")["runs"] == []
