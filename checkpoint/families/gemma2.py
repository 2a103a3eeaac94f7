"""Gemma 2 (2024): norms around each branch, bounds of scores and logits, windows in every other
layer."""

import dataclasses
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, gemma, weight_maps, windows
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig

DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
"""Values of transformers\' Gemma2Config for keys that a config.json leaves out."""

ACTIVATION_KEY = "hidden_activation"


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    default = [windows.WINDOW if i % 2 == 0 else windows.WHOLE for i in range(count)]
    attention = with_score_scale(
        settings,
        config_sections.read_grouped_query(
            settings, score_cap=settings.number("attn_logit_softcapping", default=None)
        ),
    )
    layers = [
        LayerSpec(
            attention=dataclasses.replace(attention, window_size=size),
            ffn=gemma.read_ffn(settings),
            norms="sandwich",
        )
        for size in windows.read(settings, default)
    ]
    return gemma.read_model(settings, layers, ACTIVATION_KEY, logit_cap=read_logit_cap(settings))


def read_logit_cap(settings: Settings) -> float | None:
    return settings.number("final_logit_softcapping", default=None)


def with_score_scale(settings: Settings, attention: AttentionConfig) -> AttentionConfig:
    """The attention with the factor that query_pre_attn_scalar says."""
    scalar = settings.integer("query_pre_attn_scalar", default=256)
    scale = None if scalar == attention.head_dim else scalar**-0.5
    return dataclasses.replace(attention, score_scale=scale)


def write_score_scale(attention: AttentionConfig) -> dict[str, Any]:
    scale = attention.score_scale
    scalar = attention.head_dim if scale is None else round(scale**-2)
    return {"query_pre_attn_scalar": scalar}


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, sizes = windows.split(config)
    return {
        **config_sections.write_model(config, ACTIVATION_KEY),
        **config_sections.write_grouped_query(attention),
        **windows.write(sizes, unused=4096),
        **write_score_scale(attention),
        "attn_logit_softcapping": attention.score_cap,
        "final_logit_softcapping": config.logit_cap,
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.SANDWICH_NORMS,
        *weight_maps.grouped_query(),
        *weight_maps.DENSE,
    ),
    gguf=GGUF(
        "gemma2",
        gguf_weight_maps.GEMMA2,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping"),
            (gguf_pairs.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping"),
        ),
        fixed={
            ACTIVATION_KEY: "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        sections=(
            gguf_sections.HEADS,
            gguf_layers.windows(period=2, default_size=4096),
            gguf_layers.query_scalar(layers_of_largest=46),
            gguf_sections.TIED,
        ),
    ),
)
