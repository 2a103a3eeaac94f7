"""Qwen2-MoE and Qwen1.5-MoE (2024): biased queries, keys and values, a gated shared expert."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, qwen3_moe, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import ModelConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
"""Values of transformers\' Qwen2MoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    config_sections.expect_no_windows(settings)
    has_bias = settings.flag("qkv_bias", default=True)
    attention = config_sections.read_grouped_query(
        settings, bias=has_bias, output_bias=not has_bias
    )
    moe = read_moe(settings, normalize=settings.flag("norm_topk_prob", default=False))
    layers = qwen3_moe.read_layers(settings, attention, moe)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def read_moe(settings: Settings, *, normalize: bool) -> MoEConfig:
    """Experts with a shared one that has a gate.

    Args:
      normalize: whether the gates of the chosen ones sum to 1.
    """
    width = settings.integer("moe_intermediate_size")
    return MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=width,
        num_shared_experts=_read_shared(settings, width),
        shared_gate=True,
        router=config_sections.read_softmax_router(settings, normalize=normalize, auxiliary=1e-3),
    )


def _read_shared(settings: Settings, width: int) -> int:
    """Shared experts of the routed ones' width."""
    shared = settings.integer("shared_expert_intermediate_size")
    if shared % width:
        raise UserError(
            f"{settings.where} has shared_expert_intermediate_size={shared}, expected a multiple "
            f"of moe_intermediate_size={width}: a shared expert of another width is not built"
        )
    return shared // width


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, moe = config_sections.grouped_query(config), config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **qwen3_moe.write_layers(config),
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.d_ff,
        "qkv_bias": attention.bias,
    }


MLP = f"{weight_maps.LAYER}.mlp"

SHARED = (
    *weight_maps.swiglu("layers.*.moe.shared", f"{MLP}.shared_expert"),
    Row("layers.*.moe.shared_gate", f"{MLP}.shared_expert_gate.weight", "u d -> d"),
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.DENSE,
        weight_maps.ROUTER,
        *weight_maps.EXPERTS,
        *SHARED,
    ),
    fuses_experts=True,
    gguf=GGUF(
        "qwen2moe",
        gguf_weight_maps.QWEN2_MOE,
        (
            *gguf_pairs.GROUPED,
            *gguf_pairs.WIDE_EXPERTS,
        ),
        fixed={"norm_topk_prob": False},
        optional={"qkv_bias": "blk.0.attn_q.bias"},
    ),
)
