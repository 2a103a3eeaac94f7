"""Hunyuan (2025), dense: heads normed after RoPE."""

import dataclasses
from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, rope_section, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 290_943,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
"""Values of transformers\' HunYuanDenseV1Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layer = LayerSpec(attention=read_attention(settings), ffn=ffn)
    layers = [layer] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def read_attention(settings: Settings) -> AttentionConfig:
    """RoPE of the kind dynamic with an alpha turns by a larger base at every length."""
    attention = config_sections.read_grouped_query(
        settings, qk_norm="head", qk_norm_after_rope=True
    )
    given, width = rope_section.rope_keys(settings), attention.head_dim
    alpha = None if given is None else given.number("alpha", default=None)
    if given is None or not alpha or given.text("rope_type", "type", default="") != "dynamic":
        return attention
    if alpha < 0 or width <= 2:
        raise UserError(f"{given.where} has alpha={alpha} for heads of width {width}")
    base = attention.rope_base * alpha ** (width / (width - 2))
    return dataclasses.replace(attention, rope_base=base)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


ROWS = (
    *weight_maps.EMBEDDING,
    *weight_maps.GROUPED_QUERY,
    Row(
        "layers.*.attention.q_norm.scale",
        f"{weight_maps.ATTENTION}.query_layernorm.weight",
        "c -> c",
    ),
    Row(
        "layers.*.attention.k_norm.scale", f"{weight_maps.ATTENTION}.key_layernorm.weight", "c -> c"
    ),
)

HUNYUAN_V1_DENSE = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *ROWS,
        *weight_maps.DENSE,
    ),
    gguf=GGUF("hunyuan-dense", gguf_weight_maps.QWEN3),
)
