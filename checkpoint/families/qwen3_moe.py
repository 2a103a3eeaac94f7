"""Qwen3-MoE (2025): heads normed before RoPE, experts in all layers or in some."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import DenseConfig, MoEConfig

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
"""Values of transformers\' Qwen3MoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("use_sliding_window", False)
    attention = config_sections.read_grouped_query(settings, qk_norm="head")
    normalize = settings.flag("norm_topk_prob", default=False)
    moe = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        router=config_sections.read_softmax_router(settings, normalize=normalize, auxiliary=1e-3),
    )
    layers = read_layers(settings, attention, moe)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def read_layers(settings: Settings, attention: AttentionConfig, moe: MoEConfig) -> list[LayerSpec]:
    """Experts in every decoder_sparse_step-th layer, but in none of mlp_only_layers."""
    dense = DenseConfig(d_ff=settings.integer("intermediate_size"))
    every = settings.integer("decoder_sparse_step", default=1)
    without = settings.items("mlp_only_layers", of=int, default=[])
    return [
        LayerSpec(attention=attention, ffn=dense if i in without or (i + 1) % every else moe)
        for i in range(config_sections.read_num_layers(settings))
    ]


def write_layers(config: ModelConfig) -> dict[str, Any]:
    moe = config_sections.the_moe(config)
    ffns = [layer.ffn for layer in config_sections.unfolded(config)]
    dense = [ffn for ffn in ffns if isinstance(ffn, DenseConfig)]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    return {
        **config_sections.write_softmax_router(moe.router),
        **config_sections.NO_WINDOWS,
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "intermediate_size": width,
        "norm_topk_prob": moe.router.normalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, ffn in enumerate(ffns) if isinstance(ffn, DenseConfig)],
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        **write_layers(config),
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM,
        *weight_maps.DENSE,
        weight_maps.ROUTER,
        *weight_maps.EXPERTS,
    ),
    fuses_experts=True,
    gguf=GGUF(
        "qwen3moe",
        gguf_weight_maps.QWEN3_MOE,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.EXPERT_COUNT, "num_experts"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
        ),
        fixed={"norm_topk_prob": True},
    ),
)
