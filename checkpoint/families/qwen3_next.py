"""Qwen3-Next (2025): three gated delta nets before each gated attention, experts with a shared one.

The mtp modules of released files are not read: transformers has no such modules to compare with.
"""

from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import (
    config_sections,
    delta_net,
    delta_net_gguf,
    qwen2_moe,
    qwen3_moe,
    weight_maps,
)
from checkpoint.families.base import GGUF, Family
from configs.architecture import ModelConfig

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
}
"""Values of transformers\' Qwen3NextConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = delta_net.read_gated_attention(settings)
    moe = qwen2_moe.read_moe(settings, normalize=settings.flag("norm_topk_prob", default=True))
    layers = qwen3_moe.read_layers(settings, attention, moe)
    kinds = delta_net.read_kinds(settings, delta_net.every_nth(settings))
    layers = delta_net.with_attentions(layers, kinds, delta_net.read_delta(settings))
    return config_sections.read_model(settings, layers, norm_eps=1e-6, zero_centered_norms=True)


def write_config(config: ModelConfig) -> dict[str, Any]:
    moe = config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **delta_net.write_layers(config),
        **qwen3_moe.write_layers(config),
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.d_ff,
    }


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.NORMS,
        *delta_net.gated_query(weight_maps.grouped_query()),
        *weight_maps.QK_NORM,
        *delta_net.FUSED_PROJECTIONS,
        *delta_net.CORE,
        *weight_maps.DENSE,
        weight_maps.ROUTER,
        *weight_maps.EXPERTS,
        *qwen2_moe.SHARED,
    ),
    unread=((r"mtp\..*", "multi-token modules"),),
    fuses_experts=True,
    gguf=GGUF(
        "qwen3next",
        (
            *delta_net_gguf.AROUND,
            *delta_net_gguf.ATTENTION,
            *delta_net_gguf.FUSED,
            *gguf_weight_maps.GATED_MOE,
        ),
        (*gguf_pairs.GROUPED, *gguf_pairs.WIDE_EXPERTS),
        fixed={"norm_topk_prob": True},
        sections=(gguf_sections.PARTLY_TURNED_HEADS, gguf_layers.DELTA_NETS),
    ),
)
