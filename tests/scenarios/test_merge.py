"""`python -m scenarios.merge`: one checkpoint of a base and its adapter."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from backends.nn.adapters import AdapterError, base_name
from backends.nn.base import open_base
from backends.nn.sources import CheckpointError
from backends.nn.tokenizer import TokenizerError
from backends.places import PlaceError
from scenarios.merge.__main__ import parse
from scenarios.merge.run import MergeError, _require_own, merge
from tests.scenarios.commands import ROOT

TINY = ROOT / "scenarios" / "assets" / "tiny-llama"
IDS = torch.arange(40)[None] * 7 % 4096


def adapter(model: torch.nn.Module, place: Path, **more: object) -> Path:
    """One that does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **more)  # type: ignore[arg-type]
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(place))
    return place


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny Llama."""
    place = tmp_path_factory.mktemp("adapter")
    return adapter(AutoModelForCausalLM.from_pretrained(TINY), place)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found.float()


def test_a_merged_model_says_what_base_and_adapter_say(tuned: Path, tmp_path: Path) -> None:
    """To rounding in fp32; in the base's own bf16, nearer to it than the base is."""
    found = merge(str(TINY), tuned, tmp_path / "merged", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, str(tuned)).eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (wanted - before).norm() > 0.05 * wanted.norm()
    assert (merged - wanted).norm() < 1e-4 * wanted.norm()
    assert found["dtype"] == "float32"
    assert merge(str(TINY), tuned, tmp_path / "own")["dtype"] == "bfloat16"
    own = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "own"))
    assert (own - wanted).norm() < 0.2 * (wanted - before).norm()


def test_a_merged_checkpoint_is_whole(tuned: Path, tmp_path: Path) -> None:
    """The tensors of the base, an architecture, and its tokenizer's files as they are."""
    into = tmp_path / "merged"
    merge(str(TINY), tuned, into)
    stated = json.loads((into / "config.json").read_text())
    assert stated["architectures"] == ["LlamaForCausalLM"]
    base, merged = (load_file(place / "model.safetensors") for place in (TINY, into))
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        same = torch.equal(tensor, merged[name])
        assert same == ("q_proj" not in name and "down_proj" not in name), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (into / name).read_bytes() == (TINY / name).read_bytes()
    assert AutoTokenizer.from_pretrained(into)("import os").input_ids
    assert not [path for path in tmp_path.iterdir() if path != into]


def test_an_adapter_of_another_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    """By its shapes; by the base it names, where that is here and of the same shapes."""
    shape = {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    narrow = LlamaForCausalLM(LlamaConfig(**shape))
    other = adapter(narrow, tmp_path / "other")
    facts = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps(facts | {"base_model_name_or_path": None})
    )
    with pytest.raises(AdapterError, match="an adapter of another model"):
        merge(str(TINY), other, tmp_path / "merged")
    twin = tmp_path / "twin"
    shutil.copytree(TINY, twin)
    merge(str(twin), tuned, tmp_path / "same")  # the same files elsewhere
    with (twin / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    with pytest.raises(MergeError, match=r"was trained on .*tiny-llama, and .*twin is another"):
        merge(str(twin), tuned, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("named", ["a" * 5000, "~nobody-here/x", "\x1b[2Jx/y"])
def test_a_base_that_is_elsewhere_is_only_told(
    named: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever an adapter's file says of it."""
    _require_own(open_base(TINY), naming(tuned, tmp_path / "adapter", named), str(TINY))
    said = capsys.readouterr().out
    assert "the adapter says that its base is" in said
    assert "\x1b" not in said


def naming(tuned: Path, place: Path, base: str | None) -> Path:
    """The adapter, which says that this is its base."""
    shutil.copytree(tuned, place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": base})
    )
    return place


@pytest.mark.parametrize("named", [None, "org/model", str(TINY)])
def test_what_was_not_compared_is_said(
    named: str | None, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter's word is none: neither the same name, nor a hub's id, nor silence."""
    weights = str(TINY) if named is None else named
    _require_own(open_base(TINY), naming(tuned, tmp_path / "adapter", named), weights)
    assert "only names and shapes" in capsys.readouterr().out


def test_what_was_downloaded_of_an_id_is_compared(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a directory would be; of an id that is not here, nothing is downloaded."""
    twin = tmp_path / "snapshot"
    shutil.copytree(TINY, twin)
    monkeypatch.setattr(
        "scenarios.merge.run.try_to_load_from_cache", lambda name, file: str(twin / file)
    )
    adapter = naming(tuned, tmp_path / "adapter", "org/model")
    _require_own(open_base(TINY), adapter, str(TINY))
    assert capsys.readouterr().out == ""
    with (twin / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    with pytest.raises(MergeError, match=r"was trained on org/model, and .*; give --model org/mod"):
        _require_own(open_base(TINY), adapter, str(TINY))


@pytest.mark.parametrize(
    "command", ["merge.__main__", "finetune.__main__", "endpoint.__main__", "generate.__main__"]
)
def test_a_home_of_nobody_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a model is named, before anything is loaded; and for whoever comes from Python."""
    parse_of = importlib.import_module(f"scenarios.{command}").parse
    with pytest.raises(SystemExit):
        parse_of(["--model", "~nobody-of-this-name/x"])
    said = capsys.readouterr().err
    assert "~nobody-of-this-name/x: the home directory that ~ stands for is not known" in said
    assert "Traceback" not in said
    with pytest.raises(CheckpointError, match="write the path out"):
        open_base("~nobody-of-this-name/x")
    with pytest.raises(PlaceError, match="write the path out"):
        base_name("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("dtype", "times", "mend"),
    [
        (None, 1, "--into$"), (torch.float16, 1, "--into$"), (torch.bfloat16, 1, "--into$"),
        (torch.float32, 2, "--into, or leave --dtype out$"),
    ],
)  # fmt: skip
def test_room_is_that_of_the_type_that_is_asked_for(
    dtype: torch.dtype | None, times: int, mend: str, tuned: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The tiny Llama's numbers have two bytes each; no model is loaded where it does not fit."""
    own = sum(t.nbytes for t in load_file(TINY / "model.safetensors").values())
    free = shutil.disk_usage(tmp_path)._replace(free=times * own - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    monkeypatch.setattr("scenarios.merge.run._loaded", None)
    with pytest.raises(PlaceError, match=f"the merged model needs .*{mend}"):
        merge(str(TINY), tuned, tmp_path / "merged", dtype)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free._replace(free=times * own))
    with pytest.raises(TypeError):  # nothing more is in its way
        merge(str(TINY), tuned, tmp_path / "merged", dtype)


def test_what_cannot_be_merged_is_said(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line each, and nothing is left."""
    quantised = tmp_path / "quantised"
    shutil.copytree(TINY, quantised)
    stated = json.loads((quantised / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(stated))
    with pytest.raises(MergeError, match="is quantised"):
        merge(str(quantised), tuned, tmp_path / "merged")
    with pytest.raises(AdapterError, match="name the directory of an adapter"):
        merge(str(TINY), tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(CheckpointError):
        merge(str(tuned), tuned, tmp_path / "merged")
    bare = tmp_path / "bare"
    shutil.copytree(TINY, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError):
        merge(str(bare), tuned, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(SystemExit, match="2"):
        parse(["--model=m", "--adapter=a", f"--into={TINY}"])
    assert "holds something already; name a new directory" in capsys.readouterr().err


def test_an_adapter_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """Merging it would change the embeddings, too."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(MergeError, match="lm_head, whose weights are the embeddings, too"):
        merge(str(TINY), tmp_path / "adapter", tmp_path / "merged")
