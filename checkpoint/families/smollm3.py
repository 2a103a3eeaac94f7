"""SmolLM3 (2025): Llama with every fourth layer without positions."""

import dataclasses
from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
"""Values of transformers\' SmolLM3Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    config_sections.expect_no_windows(settings)
    attention = config_sections.read_grouped_query(settings, rope_base=2_000_000.0)
    ffn = DenseConfig(
        d_ff=settings.integer("intermediate_size"), bias=settings.flag("mlp_bias", default=False)
    )
    layers = [
        LayerSpec(attention=attention if has_rope else _without_rope(attention), ffn=ffn)
        for has_rope in _read_places(settings)
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _without_rope(attention: AttentionConfig) -> AttentionConfig:
    return dataclasses.replace(attention, rotary_dim=0, rope_base=10_000.0, rope_scaling=None)


def _read_places(settings: Settings) -> list[bool]:
    """Which layers have RoPE."""
    count = config_sections.read_num_layers(settings)
    every = settings.integer("no_rope_layer_interval", default=4)
    default = [int((i + 1) % every != 0) for i in range(count)]
    places = settings.items("no_rope_layers", of=int, default=default)
    if len(places) < count or not set(places) <= {0, 1}:
        raise UserError(
            f"{settings.where} has no_rope_layers={places}, expected 1 (RoPE) or 0 (none) for each "
            f"of num_hidden_layers={count}"
        )
    return [place == 1 for place in places[:count]]


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = config_sections.grouped_queries(config)
    turned = [each for each in attentions if each.rotary_dim != 0]
    attention = config_sections.the_one(turned, "attention with RoPE")
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.NO_WINDOWS,
        "intermediate_size": config_sections.the_dense(config).d_ff,
        "no_rope_layers": [int(each.rotary_dim != 0) for each in attentions],
    }


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.DENSE,
    ),
    gguf=GGUF("smollm3", gguf_weight_maps.LLAMA),
)
