"""The base models that people bring: the table, tried by tests/inputs/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, CLIPTextConfig, PreTrainedModel, T5Config, ViTConfig

from benchmarks.zoo.layouts import (
    FP8,
    INT8,
    base_only,
    edit_config,
    head_of_its_own,
    pickled,
    quantised,
    rounded,
    sharded,
)
from tests.inputs.checkpoints import (
    GGUF,
    INDEX,
    LFS_POINTER,
    WEIGHTS,
    adapter,
    beside,
    config,
    cut,
    damaged,
    gguf,
    in_two_shards,
    into_subfolder,
    more,
    named,
    nothing,
    other_kind,
    saved,
    tensor,
    twice,
    weight_map,
    with_value,
    without,
    write,
)
from tests.inputs.table import Part, Row

_NORM = "model.layers.1.input_layernorm.weight"
_QUERY = "model.layers.0.self_attn.q_proj.weight"
_SAME = "the same as in clear"
_QUANTISED = r"(?i)quanti[sz]ed"
_FINITE = r"(?i)NaN or inf|finite|holds NaN"
_DAMAGED = r"(?i)damaged|cut|download it again"
_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _base_of_fewer_layers(model: PreTrainedModel, place: Path) -> None:
    base_only(model, place)
    edit_config(place, n_layer=1)


def _shortened(names: dict[str, str]) -> dict[str, str]:
    return {name: file for name, file in names.items() if name != _QUERY}


WHOLE = (
    Row("a Llama, as `save_pretrained` writes it", _SAME, saved()),
    Row("the same in shards", _SAME, saved(sharded)),
    Row("in shards, with an index that forgets a tensor", "it is found in its shard",
        damaged(weight_map(_shortened), shard="20KB")),
    Row("in bfloat16", _SAME, saved(rounded(torch.bfloat16))),
    Row("in float16", _SAME, saved(rounded(torch.float16))),
    Row("tied: no head in the file", _SAME, saved(tie_word_embeddings=True)),
    Row("a head in the file, though the config says tied", "the file's head is used",
        saved(head_of_its_own, tie_word_embeddings=False)),
    Row("names without the base model's prefix, tied", _SAME,
        saved(base_only, tie_word_embeddings=True)),
    Row("GPT-NeoX and Pythia, whose head is `embed_out`", _SAME, saved(model_type="gpt_neox")),
    Row("Pythia and GPT-Neo, with their causal masks as bytes in the file", "no weights, not used",
        damaged(more("gpt_neox.layers.0.attention.bias", lambda _: torch.ones(
            1, 1, 8, 8, dtype=torch.uint8)), model_type="gpt_neox")),
    Row("Gemma 4, whose layers have persistent buffers", "the buffers are read",
        saved(model_type="gemma4_text")),
    Row("GPT-2 with `Conv1D` for linears and dropout in its config", "dropout of the base is off",
        saved(model_type="gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)),
    Row("OPT, with dropout in its config", "dropout of the base is off",
        saved(model_type="opt", dropout=0.1, attention_dropout=0.1)),
    Row("Phi, with biases everywhere", _SAME, saved(model_type="phi")),
    Row("a GGUF file", "read as it is, undoing its quantisation", gguf()),
    Row("fp8 with scales, as its config says", "undone while it is read",
        saved(quantised(torch.float8_e4m3fn, "weight_scale_inv", FP8))),
)  # fmt: skip

QUANTISED = (
    Row("fp8 codes with scales, of which the config says nothing",
        "quantised, though its config does not say how",
        saved(quantised(torch.float8_e4m3fn, "weight_scale", None)), _QUANTISED),
    Row("fp8 with scales of another name than its config means", "quantised; give the original",
        saved(quantised(torch.float8_e4m3fn, "weight_scale", FP8)), _QUANTISED),
    Row("8-bit weights of bitsandbytes", "quantised by bitsandbytes; give the original",
        saved(quantised(torch.int8, "SCB", INT8)), r"(?i)bitsandbytes"),
    Row("int8 codes, of which the config says nothing",
        "quantised, though its config does not say how",
        saved(quantised(torch.int8, "SCB", None)), _QUANTISED),
    Row("codes packed in int32, of which the config says nothing",
        "quantised, though its config does not say how",
        saved(quantised(torch.int32, "SCB", None)), _QUANTISED),
    Row("GPTQ or AWQ", "quantised by that method; give the original",
        damaged(config(quantization_config={"quant_method": "gptq", "bits": 4})),
        r"(?i)gptq"),
    Row("a method that is no name", "quantised in a way that is not undone",
        damaged(config(quantization_config={"quant_method": ["fp8"]})), _QUANTISED),
    Row("a method that nobody knows", "quantised in a way that is not undone",
        damaged(config(quantization_config={"quant_method": "mine"})), r"(?i)mine"),
)  # fmt: skip

OTHERS = (
    Row("T5, or another encoder-decoder", "an encoder-decoder; a causal language model is needed",
        other_kind(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)),
        r"(?i)encoder.decoder"),
    Row("BERT", "an encoder: it sees the tokens that it is to predict",
        saved(model_type="bert"), r"(?i)sees the tokens|encoder"),
    Row("RoBERTa", "an encoder: it sees the tokens that it is to predict",
        saved(model_type="roberta"), r"(?i)sees the tokens|encoder"),
    Row("a classifier's BERT, as `AutoModel` saves it", "its head is missing",
        other_kind(BertConfig(vocab_size=64, intermediate_size=32, **_SIZES)),
        r"(?i)missing|no tensor|encoder"),
    Row("a vision transformer", "no causal language model",
        other_kind(ViTConfig(image_size=32, patch_size=16, intermediate_size=32, **_SIZES)),
        r"(?i)causal"),
    Row("a text encoder of CLIP", "no causal language model",
        other_kind(CLIPTextConfig(vocab_size=64, intermediate_size=32, **_SIZES)), r"(?i)causal"),
    Row("Mamba", "its layers compute with their weights in ways that no worker can",
        saved(model_type="mamba"), r"(?i)mamba"),
    Row("a mixture of experts whose weights are 3-D", "too little of it would go to a worker",
        saved(model_type="qwen3_moe"), r"(?i)expert|share|%"),
    Row("a model with code of its own (`trust_remote_code`)", "its code is not run",
        damaged(config(model_type="mine", auto_map={"AutoConfig": "mine.Config"})),
        r"(?i)'mine'.*code|code.*'mine'"),
    Row("a model type of the future", "this transformers does not know the type",
        damaged(config(model_type="llama9")), r"llama9"),
)  # fmt: skip

DAMAGED = (
    Row("a git-LFS pointer in place of the weights", "a git-LFS pointer; `git lfs pull`",
        damaged(write(WEIGHTS, LFS_POINTER)), r"(?i)git.lfs"),
    Row("a git-LFS pointer in place of one shard", "a git-LFS pointer; `git lfs pull`",
        damaged(write("model-00002-of-00006.safetensors", LFS_POINTER), shard="20KB"),
        r"(?i)git.lfs"),
    Row("a git-LFS pointer in place of config.json", "no JSON",
        damaged(write("config.json", LFS_POINTER)), r"(?i)json|git.lfs"),
    Row("weights cut in the middle", "damaged or cut", damaged(cut(WEIGHTS, 0.5)), _DAMAGED),
    Row("weights cut in the header", "damaged or cut", damaged(cut(WEIGHTS, 100)), _DAMAGED),
    Row("weights of no bytes", "damaged or cut", damaged(cut(WEIGHTS, 0)), _DAMAGED),
    Row("an index that is no JSON", "no index of shards",
        damaged(cut(INDEX, 0.5), shard="20KB"), r"(?i)index"),
    Row("an index without a map", "no index of shards",
        damaged(write(INDEX, b'{"metadata": {}}'), shard="20KB"), r"(?i)index"),
    Row("an index that names a shard which is not there", "the download is incomplete",
        damaged(without("model-00002-*"), shard="20KB"), r"(?i)model-00002.*(incomplete|missing)"),
    Row("an index that leads out of its directory", "a shard outside of the directory",
        damaged(weight_map(lambda m: dict.fromkeys(m, "../other.safetensors")), shard="20KB"),
        r"(?i)outside|\.\./other"),
    Row("a tensor of another shape", "which tensor, and both shapes",
        damaged(tensor(_QUERY, lambda old: old[:-1])), r"q_proj"),
    Row("a shard with a tensor of another shape", "which tensor, and both shapes",
        damaged(tensor(_QUERY, lambda old: old[:, :-1]), shard="20KB"), r"q_proj"),
    Row("an embedding of another shape", "which tensor, and both shapes",
        damaged(tensor("model.embed_tokens.weight", lambda old: old[:-1])),
        r"embed_tokens.*\[\d+, \d+\].*\[\d+, \d+\]"),
    Row("a tensor with the prefix and without, not the same", "which tensor, and where",
        damaged(twice(_QUERY, _QUERY.removeprefix("model."))), r"q_proj.*twice"),
    Row("a tensor in two shards, not the same", "which tensor, and where",
        damaged(in_two_shards(_QUERY), shard="20KB"), r"q_proj.*twice"),
    Row("a tensor missing", "no such tensor", damaged(tensor(_QUERY, lambda old: None)),
        r"q_proj"),
    Row("NaN in a norm", "not finite, and where",
        damaged(tensor(_NORM, with_value(float("nan")))), _FINITE),
    Row("infinity in the embedding", "not finite, and where",
        damaged(tensor("model.embed_tokens.weight", with_value(float("inf")))),
        _FINITE),
    Row("NaN in a frozen linear", "not finite, and where",
        damaged(tensor(_QUERY, with_value(float("nan")))), _FINITE),
    Row("a config with fewer layers than the file", "the model would be cut short",
        damaged(config(num_hidden_layers=1)), r"(?i)layers"),
    Row("the same, of names without the base model's prefix", "the model would be cut short",
        saved(_base_of_fewer_layers, model_type="gpt2", tie_word_embeddings=True),
        r"h\.1.*no layer"),
    Row("a config with more layers than the file", "no such tensor",
        damaged(config(num_hidden_layers=3)), r"layers\.2"),
    Row("a config of another width", "which tensor, and both shapes",
        damaged(config(intermediate_size=40)), r"mlp"),
    Row("config.json that is no JSON", "no JSON", damaged(cut("config.json", 0.5)), r"(?i)json"),
    Row("config.json that holds a list", "no model type", damaged(write("config.json", b"[]")),
        r"config\.json"),
    Row("config.json without a model type", "no model type",
        damaged(config(model_type=None, architectures=None)), r"model_type"),
    Row("config.json with a size that is a string", "which entry, and what is wrong",
        damaged(config(num_hidden_layers="2")), r"num_hidden_layers.*int"),
    Row("config.json with a size that makes no sense", "which config, and what is wrong",
        damaged(config(num_attention_heads=0)), r"(?i)config"),
)  # fmt: skip

PLACES = (
    Row("an empty directory", "no config.json", nothing, r"config\.json"),
    Row("config.json alone", "no weights", damaged(without("*.safetensors")),
        r"model\.safetensors"),
    Row("weights alone", "no config.json", damaged(without("config.json")), r"config\.json"),
    Row("only `pytorch_model.bin`", "a pickle may run code; convert it once", saved(pickled),
        r"(?i)safetensors"),
    Row("the weights' file in place of its directory", "a file; give the directory",
        named(WEIGHTS, damaged()), r"(?i)directory"),
    Row("a directory with a GGUF file in it", "give the file",
        named(".", gguf()), r"lfm2\.gguf"),
    Row("a GGUF file that is cut", "the file cannot be read", gguf(cut(GGUF, 0.5)), r"lfm2\.gguf"),
    Row("an adapter's directory", "an adapter, not a base model", adapter, r"(?i)adapter"),
    Row("a model with an adapter beside it", "merge them, or move the adapter away",
        damaged(beside(adapter)), r"(?i)adapter.*beside"),
    Row("a model whose config names other weights (`transformers_weights`)",
        "give them the usual names",
        damaged(config(transformers_weights="other.safetensors")), r"transformers_weights"),
    Row("a trainer's directory, with the model in `checkpoint-100`", "no config.json",
        damaged(into_subfolder), r"config\.json"),
    Row("a path that is not there", "no such directory, nor a model of the hub",
        named("gone", nothing), r"(?i)no such|neither|not there"),
)  # fmt: skip

PART = Part(
    "Models",
    "What `--weights` names. What works gives the logits and adapter gradients that transformers "
    "gives in clear, up to the rounding of the cipher.",
    {
        "Models that work": WHOLE,
        "Quantised checkpoints": QUANTISED,
        "Other kinds of model": OTHERS,
        "Damaged checkpoints": DAMAGED,
        "Something else in place of a checkpoint": PLACES,
    },
)
