"""Config sections of the DeepSeek families' latent attention."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, rope_section
from configs.architecture import ModelConfig
from configs.attention import IndexerConfig, LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import RouterConfig
from configs.shared_keys import with_own_keys


def read_model(
    settings: Settings,
    router: RouterConfig,
    indexer: IndexerConfig | None = None,
    is_sharing: Sequence[bool] | None = None,
) -> ModelConfig:
    """
    Args:
      is_sharing: of each layer, whether it shares the indexer; None: none does.
    """
    settings.expect("rope_interleave", True)
    attention = _read_attention(settings, indexer)
    layers = deepseek_moe.read_layers(settings, attention, router, goes_by_list=indexer is not None)
    if is_sharing is not None:
        layers = [
            dataclasses.replace(layer, attention=dataclasses.replace(attention, shares_indexer=x))
            for layer, x in zip(layers, is_sharing, strict=True)
        ]
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _read_attention(settings: Settings, indexer: IndexerConfig | None) -> LatentAttentionConfig:
    base, scaling = rope_section.read_rope(settings, 10_000.0)
    sizes = read_sizes(settings)
    return LatentAttentionConfig(**sizes, rope_base=base, rope_scaling=scaling, indexer=indexer)


def read_sizes(settings: Settings) -> dict[str, Any]:
    """What latent attention is beside its RoPE: heads, ranks, widths, biases."""
    return {
        "num_heads": settings.integer("num_attention_heads"),
        "query_rank": settings.integer("q_lora_rank", default=None),
        "latent_rank": settings.integer("kv_lora_rank"),
        "nope_head_dim": settings.integer("qk_nope_head_dim"),
        "rope_head_dim": settings.integer("qk_rope_head_dim"),
        "value_head_dim": settings.integer("v_head_dim"),
        "bias": settings.flag("attention_bias", default=False),
    }


def write_model(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **_write_attention(the_attention(config)),
        **deepseek_moe.write_layers(config),
    }


def the_attention(config: ModelConfig) -> LatentAttentionConfig:
    """That of all layers, but for whose indexer chooses the keys.

    Raises:
      UserError: they differ, or it is of another kind.
    """
    layers = config_sections.unfolded(config)
    own = [with_own_keys(layer.attention) for layer in layers]
    attention = config_sections.the_one(own, "attention")
    if not isinstance(attention, LatentAttentionConfig):
        raise UserError(f"DeepSeek has attention.kind='latent', the model has {attention.kind!r}")
    return attention


def _write_attention(attention: LatentAttentionConfig) -> dict[str, Any]:
    return {
        **write_sizes(attention),
        "rope_interleave": True,
        **rope_section.write_rope(attention.rope_base, attention.rope_scaling, is_on_sines=True),
    }


def write_sizes(attention: LatentAttentionConfig) -> dict[str, Any]:
    """As `read_sizes` reads them."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.latent_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "qk_head_dim": attention.query_head_dim,
        "head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "attention_bias": attention.bias,
    }
