"""Ministral (2024): Mistral with windows in some layers."""

from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, mistral, weight_maps, windows
from checkpoint.families.base import Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = mistral.DEFAULTS
"""Values of transformers\' MinistralConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    has_window = settings.integer("sliding_window", default=None) is not None
    default = [windows.WINDOW if has_window else windows.WHOLE] * count
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [
        LayerSpec(
            attention=config_sections.read_grouped_query(settings, bias=False, window_size=size),
            ffn=ffn,
        )
        for size in windows.read(settings, default)
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, sizes = windows.split(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **windows.write(sizes),
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
)
