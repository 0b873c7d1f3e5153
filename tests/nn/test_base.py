"""Bases: what transformers loads is what owner and workers compute, whatever form it comes in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, MixtralConfig, PreTrainedModel

from backends.nn.base import open_base
from backends.nn.selfcheck import exact_linear, require_faithful
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import CheckpointError, HeldBase, RandomBase
from tests.nn.conftest import CONFIGS, GPT2, LLAMA, tokens


def random_model(name: str) -> PreTrainedModel:
    """One with weights and biases away from where they start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def answer(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """Logits, with the remote linears computed exactly."""
    with skeleton.remote.connected(exact_linear(skeleton)), torch.no_grad():
        return skeleton.model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_gives_the_model_back(name: str, shards: bool, tmp_path: Path) -> None:
    """To the last bit of the weights; nothing of the linears is in memory."""
    original = random_model(name)
    original.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    skeleton = build_skeleton(open_base(tmp_path))
    require_faithful(skeleton)
    ids = tokens(2, 10)
    with torch.no_grad():
        expected = original(input_ids=ids).logits
    torch.testing.assert_close(answer(skeleton, ids), expected, rtol=1e-5, atol=1e-5)
    held = sum(p.numel() for p in skeleton.model.parameters())
    assert (
        held
        < sum(p.numel() for p in original.parameters())
        - skeleton.load_weight(skeleton.groups[0].members[0]).numel()
    )


def test_a_model_in_memory_is_changed_in_place(tmp_path: Path) -> None:
    """The same answers as before, by the same object, of any floating type."""
    model = random_model("llama")
    ids = tokens(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    base = HeldBase(model)
    before = base.identity()
    skeleton = build_skeleton(base)
    assert skeleton.model is model
    assert base.identity() == before
    require_faithful(skeleton)
    torch.testing.assert_close(answer(skeleton, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_taken_as_it_is_is_refused() -> None:
    """No model of transformers; quantised; with adapters already."""
    with pytest.raises(CheckpointError, match="no PreTrainedModel"):
        HeldBase(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = random_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight
    layer.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"up_proj holds torch\.int8"):
        HeldBase(model)
    layer.weight = weight
    model.lora_a = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="adapters already"):
        HeldBase(model)


def test_a_head_of_its_own_is_kept_though_the_config_says_tied(tmp_path: Path) -> None:
    """And a tied one is one tensor."""
    model = random_model("llama")
    model.save_pretrained(tmp_path / "tied")
    tied = build_skeleton(open_base(tmp_path / "tied")).model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    model.lm_head.weight = nn.Parameter(torch.randn(96, 48))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    path = tmp_path / "untied" / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(config))
    loaded = build_skeleton(open_base(tmp_path / "untied"))
    assert torch.equal(loaded.model.get_output_embeddings().weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_remote_head_is_a_group_of_its_own(tied: bool, tmp_path: Path) -> None:
    """And then no linear weight is left with the owner, tied or not."""
    model = random_model("llama")
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(96, 48))
        model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(open_base(tmp_path), remote_head=True)
    assert skeleton.groups[-1].members == ("lm_head",)
    assert torch.equal(skeleton.load_weight("lm_head"), model.lm_head.weight)
    random = build_skeleton(RandomBase(LLAMA, 0), remote_head=True)
    embedding = random.model.get_input_embeddings().weight
    assert torch.equal(random.load_weight("lm_head"), embedding)


def test_the_base_never_drops_out() -> None:
    """Not even when somebody's training loop calls train()."""
    config = type(GPT2)(**{**GPT2.to_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    skeleton = build_skeleton(RandomBase(config, 0))
    assert any("0.5) is off, in training too" in note for note in skeleton.notes)
    skeleton.model.train()
    assert not any(module.training for module in skeleton.model.modules())


def test_an_encoder_is_refused() -> None:
    """It sees the tokens that it is to predict; as a decoder it does not."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 48}  # fmt: skip
    with pytest.raises(CheckpointError, match="sees the tokens that it is to predict"):
        build_skeleton(RandomBase(BertConfig(**sizes), 0))
    build_skeleton(RandomBase(BertConfig(**sizes, is_decoder=True), 0))


def test_a_mixture_whose_experts_would_stay_is_refused() -> None:
    """Unless the owner says that it will compute them."""
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    base = RandomBase(config, 0)
    with pytest.raises(CheckpointError, match=r"only \d+% of the weights.*experts"):
        build_skeleton(base)
    assert 0 < build_skeleton(base, least_remote=0.0).remote_share < 0.5


class Wrong(RandomBase):
    """A base that says in clear what another model would say."""

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return answer(build_skeleton(RandomBase(self.config, 1)), tokens)


def test_a_model_put_together_wrongly_is_found() -> None:
    """Before anything is prepared."""
    with pytest.raises(CheckpointError, match="differs from the same model in clear"):
        require_faithful(build_skeleton(Wrong(LLAMA, 0)))


def test_identity_follows_content(tmp_path: Path) -> None:
    """Another weight, another identity; the same seed, the same one."""
    first, second = RandomBase(LLAMA, 1), RandomBase(LLAMA, 2)
    assert RandomBase(LLAMA, 1).identity() == first.identity() != second.identity()
    model = random_model("llama")
    identities = {HeldBase(model).identity()}
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
        identities.add(open_base(tmp_path / folder).identity())
        model.model.norm.weight.data[0] += 1
    assert len(identities) == 3
    identities.add(HeldBase(model).identity())
    assert len(identities) == 4


def test_a_name_that_is_nowhere_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory nor a model of the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="neither a directory here nor a model"):
        open_base("nobody/no-such-model")
    with pytest.raises(CheckpointError, match="no such directory or file"):
        open_base("./nowhere")


def test_another_config_is_another_base(tmp_path: Path) -> None:
    """The weights alone do not make a model: rotary bases and norms are in the config."""
    random_model("llama").save_pretrained(tmp_path)
    before = open_base(tmp_path).identity()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    assert open_base(tmp_path).identity() != before
    model = random_model("llama")
    held = HeldBase(model).identity()
    model.config.rms_norm_eps = 1e-3
    assert HeldBase(model).identity() != held
