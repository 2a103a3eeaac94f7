"""Gemma (2024): norms centered on zero, GELU in the gates, embeddings times sqrt(d_model)."""

from typing import Any

from checkpoint import gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Values of transformers\' GemmaConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(settings)
    layers = [LayerSpec(attention=attention, ffn=read_ffn(settings))]
    return read_model(settings, layers * config_sections.read_num_layers(settings), "hidden_act")


def read_ffn(settings: Settings) -> DenseConfig:
    return DenseConfig(d_ff=settings.integer("intermediate_size"), activation="geglu")


def read_model(
    settings: Settings, layers: list[LayerSpec], activation_key: str, **extra: Any
) -> ModelConfig:
    """What all of Gemma has around its layers, but for the 4th's norms."""
    settings.expect("use_bidirectional_attention", None, False)
    common: dict[str, Any] = {"zero_centered_norms": True} | extra
    return config_sections.read_model(
        settings,
        layers,
        norm_eps=1e-6,
        activation_key=activation_key,
        embedding_scale=settings.integer("hidden_size") ** 0.5,
        **common,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
    gguf=GGUF(
        "gemma",
        gguf_weight_maps.GEMMA,
        sections=(gguf_sections.HEADS, gguf_sections.TIED),
        fixed={"hidden_act": "gelu_pytorch_tanh"},
    ),
)
