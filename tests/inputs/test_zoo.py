"""The zoo finds what it is for: other weights, other gradients, leaks, and children that fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.zoo import comparing
from benchmarks.zoo.children import Limits, Row, each
from benchmarks.zoo.comparing import Run, compare, judged, predicts_only
from benchmarks.zoo.configs import tiny_config
from tests.inputs.checkpoints import saved, tiny

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.mark.parametrize("module", ["model.norm", "model.layers.0.mlp.down_proj"])
def test_another_weight_is_found(module: str, tmp_path: Path) -> None:
    """In what the owner keeps, and in what a worker multiplies by."""
    model = saved()(tmp_path).truth
    assert model is not None
    with torch.no_grad():
        model.get_parameter(f"{module}.weight")[0] += 0.01
    outcome = compare(tmp_path, model)
    assert outcome.status == "wrong"
    assert "logits differ" in outcome.why


def test_gradients_are_compared_by_name() -> None:
    """One that is off or absent is wrong; adapters that the other has not are not looked at."""
    logits = torch.ones(1, 2, 3)
    theirs = Run(logits, {"a": torch.ones(2), "b": torch.ones(2)})
    same = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(9)}
    assert judged(Run(logits, same), theirs, 1.0).status == "exact"
    off = judged(Run(logits, same | {"b": torch.tensor([1.0, 1.001])}), theirs, 1.0)
    assert (off.status, off.why[:16]) == ("wrong", "gradients differ")
    assert "1 adapter tensors fewer" in judged(Run(logits, {"a": theirs.logits}), theirs, 1.0).why
    lost = judged(Run(logits * float("nan"), same), theirs, 1.0)
    assert lost.status == "wrong"


def test_a_model_that_sees_what_it_predicts_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is wrong, however exact, where it is not refused."""
    assert predicts_only(tiny("gpt2"))
    assert not predicts_only(tiny("bert"))
    monkeypatch.setattr(comparing, "predicts_only", lambda model: False)
    brought = saved()(tmp_path)
    assert brought.truth is not None
    assert "sees the tokens" in compare(tmp_path, brought.truth).why


def test_a_tiny_config_has_every_kind_of_layer() -> None:
    """As many layers as that takes; sizes that are not each other's."""
    gemma = tiny_config("gemma3_text")
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma.hidden_size != gemma.intermediate_size != gemma.vocab_size
    assert tiny_config("llama").num_hidden_layers == 2


def _work(what: str, place: Path) -> Row:
    if what == "slow":
        time.sleep(60)
    if what == "large":
        return {"status": "exact", "bytes": len(bytearray(8 << 30))}
    if what == "broken":
        raise SystemExit(3)
    return {"status": "exact", "empty": not list(place.iterdir())}


def test_a_child_that_fails_costs_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    """Each has a row; what hung, asked for too much or ended says so."""
    limits = Limits(seconds=3.0, memory_bytes=1 << 30)
    rows = {row["name"]: row for row in each(["slow", "broken", "large", "good"], _work, limits)}
    assert rows["good"] == {"name": "good", "status": "exact", "empty": True}
    assert rows["slow"] == {"name": "slow", "status": "died", "why": "took too long"}
    assert rows["broken"]["why"] == "ended with status 3"
    assert rows["large"]["status"] == "died"
    assert "MemoryError" in capfd.readouterr().err
