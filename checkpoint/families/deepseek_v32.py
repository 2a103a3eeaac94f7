"""DeepSeek-V3.2 (2025): V3 whose attention looks only at the keys that an indexer chooses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import deepseek_moe, deepseek_v3, latent, weight_maps
from configs.architecture import ModelConfig
from configs.attention import IndexerConfig
from configs.checks import UserError

DEFAULTS = {**deepseek_v3.DEFAULTS, "max_position_embeddings": 163_840}
"""Values of transformers\' DeepseekV32Config for keys that a config.json leaves out."""


def read_config(settings: Settings, is_sharing: Sequence[bool] | None = None) -> ModelConfig:
    """
    Args:
      is_sharing: of each layer, whether it sees the keys that an earlier one's indexer chose.
    """
    indexer = IndexerConfig(
        num_heads=settings.integer("index_n_heads", default=64),
        head_dim=settings.integer("index_head_dim", default=128),
        top_k=settings.integer("index_topk", default=2048),
    )
    return latent.read_model(settings, deepseek_moe.read_router(settings), indexer, is_sharing)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention = latent.the_attention(config)
    indexer = attention.indexer
    if indexer is None:
        raise UserError("deepseek_v32 has an indexer, the model has none: use deepseek_v3")
    return {
        **deepseek_v3.write_config(config),
        "index_n_heads": indexer.num_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
    }


DEEPSEEK_V32 = dataclasses.replace(
    deepseek_v3.DEEPSEEK_V3,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=weight_maps.DEEPSEEK_V32,
    gguf=None,
)
