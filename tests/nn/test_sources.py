"""Checkpoints as Hugging Face writes them: single file, shards, other prefixes, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from backends.he.params import preset
from backends.he.preparation import prepare
from backends.nn.local import localise
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import CheckpointError, RandomSource, SafetensorsSource, source_for
from tests.nn.conftest import CONFIGS, tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_checkpoint_gives_the_model_back(name: str, shards: bool, tmp_path: Path) -> None:
    """Skeleton and int8 linears together come close to the model transformers loads."""
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    original.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    source, directory = source_for(str(tmp_path), 0)
    assert directory == tmp_path
    config = AutoConfig.from_pretrained(tmp_path)
    skeleton = build_skeleton(config, source)
    prepared = prepare(
        tmp_path / "prepared", skeleton.groups, lambda m: skeleton.load_weight(source, m), None,
        lambda label, done: None,
    )  # fmt: skip
    localise(skeleton, prepared)
    ids = tokens(2, 10)
    with torch.no_grad():
        found = skeleton.model(input_ids=ids).logits
        expected = original(input_ids=ids).logits
    assert torch.linalg.norm(found - expected) < 0.02 * torch.linalg.norm(expected)


def test_a_checkpoint_without_the_base_prefix_loads(tmp_path: Path) -> None:
    """As the hub's GPT-2: 'h.0...' for 'transformer.h.0...'."""
    save_file({"wte.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert source.get("transformer.wte.weight", torch.Size((3, 2))).shape == (3, 2)


def test_a_remote_head_is_a_group_of_its_own() -> None:
    """And then no linear weight is left with the owner, tied or not."""
    source = RandomSource(0)
    skeleton = build_skeleton(CONFIGS["llama"], source, remote_head=True)
    assert skeleton.groups[-1].members == ("lm_head",)
    assert skeleton.groups[-1].out_features == (96,)
    embedding = skeleton.model.get_input_embeddings().weight
    assert torch.equal(skeleton.load_weight(source, "lm_head"), embedding)


def test_mistakes_are_explained(tmp_path: Path) -> None:
    """No checkpoint, a missing shard, a missing tensor, another shape."""
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        SafetensorsSource(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "part-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors.*incomplete"):
        SafetensorsSource(tmp_path)
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "part-1.safetensors")
    source = SafetensorsSource(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight'"):
        source.get("b.weight", torch.Size((2, 2)))
    with pytest.raises(CheckpointError, match=r"\[2, 2\], the config says \[2, 3\]"):
        source.get("a.weight", torch.Size((2, 3)))


def test_a_name_that_is_nowhere_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory nor a model of the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="neither a directory here nor a model"):
        source_for("nobody/no-such-model", 0)


def test_identity_follows_content(tmp_path: Path) -> None:
    """Another weight, another identity; the same seed, the same one."""
    assert RandomSource(1).identity() == RandomSource(1).identity() != RandomSource(2).identity()
    identities = set()
    for value in (1.0, 2.0):
        save_file({"a": torch.tensor([value])}, tmp_path / "model.safetensors")
        identities.add(SafetensorsSource(tmp_path).identity())
    assert len(identities) == 2
    assert preset("standard").digest() != preset("paranoid").digest()
