"""Numbers that people type: bounded, finite, refused before anything is read or prepared."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from backends.files import write_json
from backends.net.addresses import AddressError, address_of
from backends.nn.corpus import batch_indices, order_seed
from backends.nn.sane import (
    DamagedWeightError,
    RankError,
    SequenceError,
    require_finite,
    require_positions,
    require_rank,
)
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig
from backends.options import LEARNING_RATE, SEED, SEQUENCE, Number, Whole, place
from benchmarks.inputs.values import NO_NUMBERS
from scenarios import record
from scenarios.llama1b import __main__ as llama1b
from scenarios.quickstart import __main__ as quickstart

NANOSECONDS = 1_795_714_387_123_456_789
LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=96, n_embd=48, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
OPT = OPTConfig(
    vocab_size=96, hidden_size=48, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=48, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


# --- what is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LEARNING_RATE, SEED, SEQUENCE, Whole(1, 8)])
def test_no_number_is_no_number(kind: Whole | Number) -> None:
    """In one line that says what would be, whatever was typed."""
    for text in NO_NUMBERS:
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"no (whole )?number|too large"
        ) as error:
            kind(text)
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 160


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3 ", 1e-3), ("+2E-4", 2e-4), (".5", 0.5), ("1.", 1.0), ("100", 100.0)]
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    """Spaces around them, signs and exponents."""
    assert LEARNING_RATE(text) == value


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "nan"], ["--learning-rate", "0"], ["--learning-rate=-1"],
        ["--learning-rate", "1e400"], ["--steps", "0"], ["--steps", "1000000"], ["--rank", "0"],
        ["--rank", "9999999"], ["--held-out", "0"], ["--lanes", "3"], ["--seed", str(2**63)],
        ["--seed=-1"], ["--cache", "x" * 300], ["--tls", "nowhere"], ["--step", "3"],
    ],
)  # fmt: skip
def test_the_quickstart_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With the option's name."""
    with pytest.raises(SystemExit, match="2"):
        quickstart.parse(words)
    assert words[0].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--sequence", "1"], ["--tokens", "4097"], ["--tokens", "0"], ["--lanes", "257"],
        ["--learning-rate", "inf"], ["--checkpoint-every", "0"], ["--data", ""], ["--weights", ""],
        ["--rank", "1.5"], ["--seed", "٣"],
    ],
)  # fmt: skip
def test_llama1b_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With the option's name, before anything is loaded."""
    with pytest.raises(SystemExit, match="2"):
        llama1b.parse(["--real-cpu", *words])
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_place(tmp_path: Path) -> None:
    """What is no path, or could never be one, is refused; what could be is not made."""
    (tmp_path / "file").write_text("held")
    (tmp_path / "loop").symlink_to("loop")
    for wrong in ("", str(tmp_path / "file" / "below"), "x" * 300, str(tmp_path / "loop" / "x")):
        with pytest.raises(argparse.ArgumentTypeError):
            place(wrong)
    assert place(str(tmp_path / "new" / "deep")) == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text",
    ["a..b:1", "x" * 64 + ":1", "exa mple:1", "\udcff:1", "host\n:1", "host:٣", "h:65536"],
)
def test_what_no_resolver_can_be_asked_for(text: str) -> None:
    """Is no address; a resolver would raise what is no error of a line."""
    with pytest.raises(AddressError, match=r"it looks like gpu\.example:7443"):
        address_of(text)


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [NANOSECONDS, SEED.most, 1 << 43, (1 << 43) - 1])
def test_a_clock_is_a_seed(seed: int) -> None:
    """Every epoch is a permutation of its own, and the same again."""
    first, second = (batch_indices(epoch, 32, 32, seed) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert first == batch_indices(0, 32, 32, seed)
    torch.manual_seed(seed)
    assert SEED(str(seed)) == seed


def test_the_order_of_small_seeds_has_not_changed() -> None:
    """A run that began before goes on with the same data."""
    assert order_seed(3, 5) == (3 << 20) + 5
    assert len({order_seed(seed, epoch) for seed in (SEED.most, 1 << 43) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0, -1.0])
def test_no_training_at_such_a_rate(rate: float) -> None:
    """Whoever asks for it, by whatever way."""
    with pytest.raises(ValueError, match="positive and finite"):
        TrainConfig(steps=1, batch=1, micro_batch=1, learning_rate=rate)


# --- the base model -------------------------------------------------------------------------------


class DamagedBase(RandomBase):
    """Random weights, one of whose tensors holds what it must not."""

    def __init__(self, config: PretrainedConfig, name: str, value: float) -> None:
        super().__init__(config, 0)
        self._name, self._value = name, value

    def get(self, name: str, shape: torch.Size) -> torch.Tensor:
        tensor = super().get(name, shape)
        if name == self._name:
            tensor.view(-1)[-1] = self._value
        return tensor


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "model.norm.weight"),
        (LLAMA, "model.embed_tokens.weight"),
        (GPT2, "transformer.h.0.ln_1.bias"),
        (GPT2, "transformer.wpe.weight"),
        (OPT, "model.decoder.layers.0.fc1.bias"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_damaged_tensor_is_found_and_named(
    config: PretrainedConfig, name: str, value: float
) -> None:
    """When the model is loaded, and not at the first step."""
    with pytest.raises(DamagedWeightError, match=name.replace(".", r"\.")):
        build_skeleton(DamagedBase(config, name, value))


def test_a_mask_may_be_infinite() -> None:
    """And what was never loaded is not looked at."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_parameter("later", torch.nn.Parameter(torch.empty(2, device="meta")))
    require_finite(model)
    model.mask[0] = math.nan
    with pytest.raises(DamagedWeightError, match="mask"):
        require_finite(model)


@pytest.mark.parametrize("config", [GPT2, OPT])
def test_more_tokens_than_learned_positions_are_refused(config: PretrainedConfig) -> None:
    """Naming both numbers; as many are fine."""
    model = build_skeleton(RandomBase(config, 0)).model
    assert require_positions(model, 64) is None
    with pytest.raises(SequenceError, match=r"sequences of 65 tokens .* the 64 positions"):
        require_positions(model, 65)


def test_more_tokens_than_a_rotary_model_was_made_for_are_said() -> None:
    """They can be computed."""
    skeleton = build_skeleton(RandomBase(LLAMA, 0))
    assert require_positions(skeleton.model, 64) is None
    said = require_positions(skeleton.model, 65)
    assert said is not None
    assert said.startswith("warning: sequences of 65 tokens are longer than the 64")


def test_a_rank_beyond_every_linear_is_refused() -> None:
    """With the largest that makes sense."""
    groups = build_skeleton(RandomBase(LLAMA, 0)).groups
    require_rank(groups, 48)
    with pytest.raises(RankError, match="give --rank 48 or less"):
        require_rank(groups, 49)


# --- figures --------------------------------------------------------------------------------------


def test_no_nan_reaches_a_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written as null, which is said; all other figures are there."""
    monkeypatch.setattr(sys, "argv", ["a-test"])
    path = tmp_path / "f.json"
    figures = {"good": 1.5, "rows": [{"error": math.nan}, {"error": 0.1}], "most": math.inf}
    record.write(path, figures, found={})
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["good"] == 1.5
    assert found["rows"] == [{"error": None}, {"error": 0.1}]
    assert found["most"] is None
    said = capsys.readouterr().err
    assert "not finite, written as null: rows.0.error, most" in said


def test_write_json_leaves_what_was_there(tmp_path: Path) -> None:
    """When it is given what JSON has no word for."""
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
