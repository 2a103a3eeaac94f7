"""Ministral 3 (2025): Mistral with YaRN and queries that grow with their position."""

import dataclasses
from typing import Any

from checkpoint import gguf_rope, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, rope_section, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig, QueryTemperatureConfig
from configs.feed_forward import DenseConfig
from configs.rope import YarnConfig

DEFAULTS = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
}
"""Values of transformers\' Ministral3Config for keys that a config.json leaves out."""

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""rope_parameters where a config.json has none."""
GROWTH = "llama_4_scaling_beta"


def read_config(settings: Settings) -> ModelConfig:
    window = settings.integer("sliding_window", default=None)
    attention = config_sections.read_grouped_query(
        settings, rope=ROPE, bias=False, window_size=window
    )
    given = rope_section.rope_keys(settings) or Settings(ROPE, settings.where)
    growth = given.number(GROWTH, default=0.0)
    if growth != 0:
        length = given.integer("original_max_position_embeddings")
        temperature = QueryTemperatureConfig(growth=growth, length=length)
        attention = dataclasses.replace(attention, query_temperature=temperature)
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention = config_sections.grouped_query(config)
    written = config_sections.write_grouped_query(attention)
    del written["rope_scaling"]
    return {
        **config_sections.write_model(config),
        **written,
        "rope_parameters": {
            **written["rope_parameters"],
            **_write_scales(attention),
            **_write_growth(attention),
        },
        "intermediate_size": config_sections.the_dense(config).d_ff,
        "sliding_window": attention.window_size,
    }


def _write_scales(attention: AttentionConfig) -> dict[str, float]:
    """Of YaRN that leaves the scores alone, as the released files say it."""
    yarn = attention.rope_scaling
    is_plain = isinstance(yarn, YarnConfig) and yarn.mscale == 0 and yarn.rotary_scale == 1
    return {"mscale": 1.0, "mscale_all_dim": 1.0} if is_plain else {}


def _write_growth(attention: AttentionConfig) -> dict[str, Any]:
    temperature = attention.query_temperature
    if temperature is None:
        return {GROWTH: 0.0}
    return {GROWTH: temperature.growth, "original_max_position_embeddings": temperature.length}


MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
    gguf=GGUF(
        "mistral3",
        gguf_weight_maps.LLAMA,
        sections=(gguf_sections.HEADS, gguf_rope.GROWING_QUERIES),
    ),
)
