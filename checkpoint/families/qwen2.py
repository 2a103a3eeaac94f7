"""Qwen2 and Qwen2.5 (2024): dense, queries, keys and values biased, the result not."""

from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
"""Values of transformers\' Qwen2Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    config_sections.expect_no_windows(settings)
    attention = config_sections.read_grouped_query(settings, bias=True, output_bias=False)
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        **config_sections.NO_WINDOWS,
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
    gguf=GGUF("qwen2", gguf_weight_maps.QWEN2),
)
