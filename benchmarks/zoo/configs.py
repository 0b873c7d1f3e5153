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
_FIRST_SPECIAL_TOKEN = 100

RULES: tuple[tuple[str, int | None], ...] = (
    ("type_vocab_size|.*(token_id|token_index)", None),
    ("pad_token_id|pad_index", 0),
    (".*vocab_size.*|n_vocab|vocab_offset", VOCABULARY),
    (".*layers_to_skip|num_kv_shared_layers|.*max_window_layers", None),
    ("(num_|n_)?(mtp|nextn_predict)_layers|num_mtp_layers|num_nextn_predict_layers", None),
    ("first_k_dense_replace|num_dense_layers|n_dense_layers", 1),
    ("(.*_)?(num_hidden_layers|num_layers|n_layers?|(en|de)coder_layers|layers|depth)", 2),
    ("mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    ("mamba_d_ssm", 64),
    (".*kv_(n_)?heads|.*num_key_value_heads|.*num_kv_heads", 2),
    ("linear_num_key_heads|index_n_heads", 2),
    (".*(attention_heads|n_heads?|num_heads|linear_num_value_heads)", 4),
    ("index_head_dim", 16),
    (".*(head_dim|d_head|kv_channels|dim_head|d_kv|attention_head_size|head_size)", 8),
    (".*lora_rank|.*_rank", 16),
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
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16], "num_buckets": 2, "hash_seed": 0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
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
    special = _FIRST_SPECIAL_TOKEN
    for field in fields(cls):
        default = field.default
        if isinstance(default, bool) or not isinstance(default, int):
            continue
        if re.fullmatch(".*(token_id|token_index)", field.name):
            values[field.name] = special if special < VOCABULARY else VOCABULARY - 1
            special += 1
        elif (value := _size(field.name)) is not None:
            values[field.name] = value
    for name, spec in cls.sub_configs_defaults.items():
        if not spec.optional:
            below = spec.config_class
            if not issubclass(below, PretrainedConfig):
                below = spec.get_config_class(spec.model_type)
            values[name] = _made(below, dict(spec.init_kwargs))
    return cls(**(values | SPECIAL.get(cls.model_type, {}) | more))


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
