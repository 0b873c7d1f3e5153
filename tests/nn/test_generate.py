"""Private completion: adapters from disk, and `model.generate` of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.nn.adapters import AdapterError, add_lora, load_adapter, save_adapter
from backends.nn.generate import complete
from tests.nn.conftest import Tiny, tokens

PROMPT = tokens(1, 5, seed=9)


@pytest.fixture
def adapter(llama: Tiny, tmp_path: Path) -> Path:
    """One that has learnt something."""
    model = add_lora(llama.skeleton().model, 4, 8, seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    save_adapter(model, tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"


def test_a_saved_adapter_completes_as_it_was(llama: Tiny, adapter: Path) -> None:
    """The same tokens as the model that was saved, and others than the base's."""
    found = []
    for with_adapter in (True, False):
        skeleton = llama.skeleton()
        model: torch.nn.Module = skeleton.model
        if with_adapter:
            model = load_adapter(model, adapter)
            assert not model.training
        with llama.connected(skeleton, "clear"):
            found.append(complete(model, PROMPT, 8, None))
    skeleton = llama.skeleton()
    saved = add_lora(skeleton.model, 4, 8, seed=3)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, parameter in saved.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(weights[name.replace(".default", "")])
    with llama.connected(skeleton, "clear"):
        assert complete(saved, PROMPT, 8, None) == found[0] != found[1]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"megatron_config": {"a": 1}}, "uses megatron_config"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights"),
        ({"init_lora_weights": "olora"}, "uses init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "uses init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"peft_type": "IA3"}, "it is no LoRA"),
        ({"r": "x"}, "r is no whole number"),
        ({"r": True}, "r is no whole number"),
        ({"r": 1 << 40}, "r is no whole number"),
        ({"r": 4096}, r"of rank \[4096\] by its config, and \[4\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha is no finite number"),
        ({"use_rslora": "false"}, "use_rslora is neither true nor false"),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is no object"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is no object"),
        ({"target_modules": [5]}, "target_modules is neither"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is neither"),
        ({"r": 5}, "an adapter of another model"),
        ({"target_modules": ["nowhere"]}, "not for this model"),
        ({"target_modules": ["q_proj"]}, "missing in this one"),
    ],
)
def test_an_adapter_that_would_compute_otherwise_is_refused(
    llama: Tiny, adapter: Path, facts: dict[str, Any], said: str
) -> None:
    """In a line, by what is wrong with it."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | facts))
    with pytest.raises(AdapterError, match=said):
        load_adapter(llama.skeleton().model, adapter)


def test_damaged_files_are_refused(llama: Tiny, adapter: Path) -> None:
    """And what only pickle reads is not there."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    weights[first][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(AdapterError, match="not finite"):
        load_adapter(llama.skeleton().model, adapter)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(llama.skeleton().model, adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(llama.skeleton().model, adapter)
    with pytest.raises(AdapterError, match="name the directory of an adapter"):
        load_adapter(llama.skeleton().model, adapter / "nowhere")


def test_a_token_sends_one_coefficient_an_input(llama: Tiny) -> None:
    """And no block that is filled up: the bytes of a step are those of one token."""
    skeleton, prepared = llama.skeleton(), llama.prepared["mlwe"]
    forward = prepared.catalogue().matrices[::2]
    with llama.connected(skeleton, "mlwe") as client:
        seen: list[tuple[int, int, int]] = []

        def note(token: int) -> None:
            meter = client.meter
            seen.append((meter.bytes_sent, meter.bytes_received, meter.frames_sent))

        complete(skeleton.model, PROMPT, 4, None, note)
    steps = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(seen, seen[1:])]  # noqa: B905, RUF007
    assert steps[0] == steps[1] == steps[2]
    up, down, frames = steps[0]
    assert frames == len(forward)
    payload = sum(shape.up_bytes(1) for shape in forward)
    assert payload < up < payload + 64 * frames
    answers = sum(shape.down_bytes(1) for shape in forward)
    assert answers < down < answers + 64 * frames
