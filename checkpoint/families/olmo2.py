"""OLMo 2 (2025): norms after attention and feed-forward, queries and keys normed over all heads."""

from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
"""Values of transformers\' Olmo2Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(settings, qk_norm="all")
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layer = LayerSpec(attention=attention, ffn=ffn, norms="post")
    layers = [layer] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


ROWS = (
    *weight_maps.EMBEDDING,
    *weight_maps.POST_NORMS,
    *weight_maps.grouped_query(),
    *weight_maps.QK_NORM_OF_ALL,
)

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*ROWS, *weight_maps.DENSE),
    gguf=GGUF(
        "olmo2",
        gguf_weight_maps.OLMO2,
        is_meant=lambda metadata: not metadata.get("olmo2.attention.sliding_window"),
    ),
)
