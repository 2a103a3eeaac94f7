"""Mistral 7B to Mistral Large 2 (2023, 2024): dense, one window for all layers or none."""

from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
"""Values of transformers\' MistralConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    window = settings.integer("sliding_window", default=None)
    attention = config_sections.read_grouped_query(settings, bias=False, window_size=window)
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention = config_sections.grouped_query(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        "intermediate_size": config_sections.the_dense(config).d_ff,
        "sliding_window": attention.window_size,
    }


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
    gguf=GGUF("llama", gguf_weight_maps.LLAMA),
)
"""A file of llama.cpp's `llama` is read as Llama: without windows the two are one."""
