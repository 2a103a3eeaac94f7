"""Hunyuan 3 (2026): normed heads, sigmoid scores with a bias on the choice, a shared expert."""

from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, weight_maps
from checkpoint.families.base import Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 120_832,
    "hidden_size": 4096,
    "intermediate_size": 13_312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "router_scaling_factor": 2.826,
}
"""Values of transformers\' HYV3Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(settings, rope_base=11_158_840.0, qk_norm="head")
    moe = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        num_shared_experts=settings.integer("num_shared_experts"),
        router=_read_router(settings),
    )
    dense = DenseConfig(d_ff=settings.integer("intermediate_size"))
    count = config_sections.read_num_layers(settings)
    default = [deepseek_moe.SPARSE if i else deepseek_moe.DENSE for i in range(count)]
    layers = [
        LayerSpec(attention=attention, ffn=dense if kind == deepseek_moe.DENSE else moe)
        for kind in deepseek_moe.read_kinds(settings, default)
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _read_router(settings: Settings) -> RouterConfig:
    return RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        scores="sigmoid",
        gate_scale=settings.number("router_scaling_factor", default=2.826),
        balance="loss_free",
        bias_rate=1e-3,
        load_balance_weight=0.0,
        z_loss_weight=0.0,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    moe, ffns = (
        config_sections.the_moe(config),
        [layer.ffn for layer in config_sections.unfolded(config)],
    )
    dense = [ffn for ffn in ffns if isinstance(ffn, DenseConfig)]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    kinds = [
        deepseek_moe.DENSE if isinstance(ffn, DenseConfig) else deepseek_moe.SPARSE for ffn in ffns
    ]
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.d_ff,
        "intermediate_size": width,
        "router_scaling_factor": moe.router.gate_scale,
        "mlp_layer_types": kinds,
        "initializer_range": 0.006,
    }


MLP = f"{weight_maps.LAYER}.mlp"

HY_V3 = Family(
    model_type="hy_v3",
    architecture="HYV3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM,
        *weight_maps.DENSE,
        Row("layers.*.moe.router", f"{MLP}.router.gate.weight", "e d -> d e"),
        Row("layers.*.moe.state.bias_E", f"{MLP}.expert_bias", "e -> e"),
        *weight_maps.EXPERTS,
        *weight_maps.swiglu("layers.*.moe.shared", f"{MLP}.shared_mlp"),
    ),
)
