"""A tiny config for every model type of transformers' causal-LM mapping.

Sizes are derived from the fields of the config class by what they are called; what names cannot
tell is in `SPECIAL`. Numbers that mean different things are different, so that a transposed or
swapped matrix has another shape where it can.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 128
FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN = 4, 95
"""Tokens that no config takes for special ones, both included."""
MOST_LAYERS = 9
_SET_ALTHOUGH_NONE = ("head_dim", "num_experts_per_tok")
"""Fields whose None a class does not always mend."""
_FIRST_SPECIAL_TOKEN = 100

RULES: tuple[tuple[str, int | None], ...] = (
    ("type_vocab_size", None),
    ("pad_token_id|pad_index", 0),
    ("encoder_hash_byte_group_vocab", 50),
    ("rotary_dim", 4),
    (".*vocab_size.*|n_vocab|vocab_offset", VOCABULARY),
    (".*layers_to_skip|num_kv_shared_layers|.*max_window_layers", None),
    ("(num_|n_)?(mtp|nextn_predict)_layers|num_mtp_layers|num_nextn_predict_layers", None),
    ("first_k_dense_replace|num_dense_layers|n_dense_layers", 1),
    (
        "(.*_)?(num_hidden_layers|num_layers|n_layers?|num_blocks|(en|de)coder_layers|layers|depth)",
        2,
    ),
    ("mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    ("mamba_d_ssm", 64),
    (".*kv_(n_)?heads|.*num_key_value_heads|.*num_kv_heads", 2),
    ("linear_num_key_heads|index_n_heads", 2),
    (".*(attention_heads|n_heads?|num_heads|linear_num_value_heads)", 4),
    ("index_head_dim", 16),
    (".*(head_dim|d_head|kv_channels|dim_head|d_kv|attention_head_size|head_size)", 8),
    (".*lora_rank|.*_rank|.*lowrank", 16),
    ("laurel_rank|hidden_size_per_layer_input", 8),
    (".*(intermediate_size|ffn_dim|ffn_hidden_size|intermediate_dim|mlp_dim).*|n_inner", 48),
    ("dim_ff|dff|d_ff|feed_forward_size|d_inner|share_expert_dim", 48),
    (".*(num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (".*(num_shared_experts|n_shared_experts)", 1),
    (".*(num_experts|num_local_experts|n_routed_experts)", 4),
    ("n_group", 2),
    ("topk_group|mamba_n_groups|n_groups|mamba_ngroups", 1),
    ("mamba_d_state|state_size|ssm_state_size", 8),
    (".*chunk_size|block_size|index_block_size", 8),
    ("index_topk|index_topk_blocks", 4),
    ("sliding_window|.*sliding_window_size|attention_window.*|window_size", 8),
    (
        ".*(max_position_embeddings|n_positions|max_seq_len|n_ctx|seq_length|max_sequence_length)",
        64,
    ),
    (".*(max_source_positions|max_target_positions|context_length)", 64),
    ("image_size", 32),
    ("patch_size", 8),
    (".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|dim|emb_dim).*", 32),
)
"""(whole name of a field, its value), the first that fits; None leaves the class's own value."""

SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]
            },
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {"num_hidden_layers": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16], "num_buckets": 2, "hash_seed": 0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Fields by model type, sub-configs too, that names alone do not tell."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of a few thousand weights with every kind of layer that the class's own has.

    Raises whatever the class makes of such sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    wanted = _kinds(_or_none(cls))
    config = _made(cls, {})
    layers = _layers_field(cls)
    if layers is None or layers in SPECIAL.get(model_type, {}):
        return config
    for count in range(getattr(config, layers), MOST_LAYERS + 1):
        config = _made(cls, {layers: count})
        if _kinds(config) >= wanted:
            break
    return config


def _made(cls: type[PretrainedConfig], more: dict[str, Any]) -> PretrainedConfig:
    values: dict[str, Any] = {}
    sizes = {field.name: field.default for field in fields(cls)}
    special = _FIRST_SPECIAL_TOKEN
    for name, default in sizes.items():
        if name in _SET_ALTHOUGH_NONE and default is None:
            values[name] = _size(name)
        if isinstance(default, bool) or not isinstance(default, int):
            continue
        if re.fullmatch(".*(token_id|token_index)", name) and not name.startswith("pad_"):
            values[name] = min(special, VOCABULARY - 1)
            special += 1
        elif (value := _size(name)) is not None:
            values[name] = value
    if sizes.get("num_key_value_heads") == sizes.get("num_attention_heads", 0):
        values["num_key_value_heads"] = values["num_attention_heads"]
    wanted = SPECIAL.get(cls.model_type, {}) | more
    for name, spec in cls.sub_configs_defaults.items():
        if not spec.optional:
            below = spec.config_class
            if not issubclass(below, PretrainedConfig):
                below = spec.get_config_class(spec.model_type)
            values[name] = _made(below, wanted.pop(name, {}))
    return cls(**(values | wanted))


def _size(name: str) -> int | None:
    return next((value for rule, value in RULES if re.fullmatch(rule, name)), None)


def _layers_field(cls: type[PretrainedConfig]) -> str | None:
    name = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return name if any(field.name == name for field in fields(cls)) else None


def _or_none(cls: type[PretrainedConfig]) -> PretrainedConfig | None:
    try:
        return cls()
    except Exception:  # some classes have no whole default; then nothing is known of its layers
        return None


def _kinds(config: PretrainedConfig | None) -> set[str]:
    """The kinds of layer that a config names."""
    found: set[str] = set()
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        found |= {f"{name}:{kind}" for kind in kinds or () if isinstance(kind, str)}
    return found
