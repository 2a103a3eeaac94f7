"""GLM-5 (2026): DeepSeek-V3.2 whose indexer turns neighbouring entries. Layers may see the keys
that the indexer of an earlier one chose (GLM-5.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_v3, deepseek_v32, weight_maps
from checkpoint.families.base import GGUF
from checkpoint.weight_map import Row, interleaved_first
from configs.architecture import ModelConfig
from configs.checks import UserError
from configs.shared_keys import shares_keys

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 154_880,
    "hidden_size": 6144,
    "intermediate_size": 12_288,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "max_position_embeddings": 202_752,
    "rms_norm_eps": 1e-5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "index_n_heads": 32,
}
"""Values of transformers\' GlmMoeDsaConfig for keys that a config.json leaves out."""

OWN, SHARED = "full", "shared"


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("indexer_rope_interleave", True)
    return deepseek_v32.read_config(settings, [kind == SHARED for kind in _read_kinds(settings)])


def _read_kinds(settings: Settings) -> list[str]:
    """Whether each layer has an indexer of its own."""
    count = config_sections.read_num_layers(settings)
    letters = {"F": OWN, "S": SHARED}
    pattern = settings.values.get("index_topk_pattern")
    every = max(settings.integer("index_topk_freq", default=1, least=0), 1)
    first = settings.integer("index_skip_topk_offset", default=2, least=0)
    default = [OWN if max(i - first + 1, 0) % every == 0 else SHARED for i in range(count)]
    if isinstance(pattern, str | list):
        default = [letters.get(kind, kind) for kind in pattern]
    kinds = settings.items("indexer_types", of=str, default=default)
    if len(kinds) != count or not set(kinds) <= {OWN, SHARED}:
        raise UserError(
            f"{settings.where} has indexer_types={kinds}, expected {OWN!r} or {SHARED!r} for each "
            f"of num_hidden_layers={count}"
        )
    if kinds[0] == SHARED:
        raise UserError(
            f"{settings.where} has {SHARED!r} for the first of indexer_types, and there is no "
            f"layer before it that chose keys: it must be {OWN!r}"
        )
    return kinds


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    return {
        **deepseek_v32.write_config(config),
        "indexer_rope_interleave": True,
        "indexer_types": [SHARED if shares_keys(x.attention) else OWN for x in layers],
    }


def unused_tensors(config: ModelConfig) -> list[str]:
    """Indexers of layers that take another's choice: GLM-5.2's files have none, those of a GLM-5
    that is read with an index_topk_freq hold them all."""
    numbers = config_sections.sharing_layers(config)
    return [rf"model\.layers\.{i}\.self_attn\.indexer\..*" for i in numbers]


def _turned(row: Row) -> Row:
    """The row as it is where the indexer turns neighbouring entries."""
    is_turned = ".indexer." in row.parameter and not row.parameter.endswith(".weights")
    return dataclasses.replace(row, order=interleaved_first("rope_head_dim")) if is_turned else row


GLM_MOE_DSA = dataclasses.replace(
    deepseek_v3.DEEPSEEK_V3,
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    unused=unused_tensors,
    rows=tuple(map(_turned, weight_maps.DEEPSEEK_V32)),
    gguf=GGUF(
        "glm-dsa",
        gguf_weight_maps.GLM_DSA,
        (
            *gguf_pairs.LATENT,
            (gguf_pairs.ATTENTION.Indexer.HEAD_COUNT, "index_n_heads"),
            (gguf_pairs.ATTENTION.Indexer.KEY_LENGTH, "index_head_dim"),
            (gguf_pairs.ATTENTION.Indexer.TOP_K, "index_topk"),
        ),
        fixed={
            **gguf_pairs.DEEPSEEK_MOE_FIXED,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        sections=(gguf_sections.LATENT, gguf_layers.INDEXERS),
    ),
)
