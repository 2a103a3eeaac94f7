"""Granite 3 (2024): Llama with factors of embedding, residual stream, scores and logits."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""Values of transformers\' GraniteConfig for keys that a config.json leaves out."""

PLACES = 12
"""Of logits_scaling worked out of a factor: what is written reads back the same."""


def read_config(settings: Settings) -> ModelConfig:
    ffn = DenseConfig(
        d_ff=settings.integer("intermediate_size"), bias=settings.flag("mlp_bias", default=False)
    )
    layer = LayerSpec(attention=read_attention(settings), ffn=ffn)
    layers = [layer] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6, **read_factors(settings))


def read_attention(settings: Settings) -> AttentionConfig:
    scale = settings.number("attention_multiplier", default=1.0)
    return config_sections.read_grouped_query(settings, score_scale=scale)


def read_factors(settings: Settings) -> dict[str, Any]:
    """
    Raises:
      UserError: logits_scaling is 0 or below.
    """
    divisor = settings.number("logits_scaling", default=1.0)
    if divisor <= 0:
        raise UserError(f"{settings.where} has logits_scaling={divisor}, expected more than 0")
    return {
        "embedding_scale": settings.number("embedding_multiplier", default=1.0),
        "residual_scale": settings.number("residual_multiplier", default=1.0),
        "logit_scale": 1 / divisor,
    }


def write_factors(config: ModelConfig) -> dict[str, Any]:
    """Those of the one attention too, and the attention itself."""
    return attention_factors(config, config_sections.grouped_query(config))


def attention_factors(config: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """See `write_factors`."""
    scale = attention.score_scale
    return {
        **config_sections.write_grouped_query(attention),
        **model_factors(config),
        "attention_multiplier": attention.head_dim**-0.5 if scale is None else scale,
    }


def model_factors(config: ModelConfig) -> dict[str, Any]:
    """Of embedding, residual stream and logits."""
    return {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": round(1 / config.logit_scale, PLACES),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **write_factors(config),
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


PAIRS = (
    *gguf_pairs.GROUPED,
    (gguf_pairs.LLM.EMBEDDING_SCALE, "embedding_multiplier"),
    (gguf_pairs.LLM.RESIDUAL_SCALE, "residual_multiplier"),
    (gguf_pairs.LLM.LOGIT_SCALE, "logits_scaling"),
    (gguf_pairs.ATTENTION.SCALE, "attention_multiplier"),
)


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.DENSE,
    ),
    gguf=GGUF(
        "granite",
        gguf_weight_maps.LLAMA,
        PAIRS,
        optional={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
    ),
)
