"""Qwen3.5 and later (2026), text: Qwen3-Next with projections of their own, dense or with experts.

Qwen3.6 and 3.8 have the same form. Released files hold an encoder for images and mtp modules
beside the text model, which alone is read, and written as the text model that it is. Interleaved
M-RoPE counts text as plain RoPE does: all three of its positions are the token's.
"""

from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_rope, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import (
    config_sections,
    delta_net,
    delta_net_gguf,
    qwen2_moe,
    text_part,
    weight_maps,
)
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig, MoEConfig

COMMON_DEFAULTS = {
    "vocab_size": 248_320,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
DEFAULTS = COMMON_DEFAULTS | {
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
"""Values of transformers\' Qwen3_5TextConfig for keys that a config.json leaves out."""
MOE_DEFAULTS = COMMON_DEFAULTS | {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
"""Values of Qwen3_5MoeTextConfig."""


def read_dense(settings: Settings) -> ModelConfig:
    return _read(settings, DenseConfig(d_ff=settings.integer("intermediate_size")))


def read_moe(settings: Settings) -> ModelConfig:
    return _read(settings, qwen2_moe.read_moe(settings, normalize=True))


def _read(settings: Settings, ffn: DenseConfig | MoEConfig) -> ModelConfig:
    kinds = delta_net.read_kinds(settings, delta_net.every_nth(settings))
    layers = [LayerSpec(attention=delta_net.read_gated_attention(settings), ffn=ffn)] * len(kinds)
    layers = delta_net.with_attentions(layers, kinds, delta_net.read_delta(settings))
    return config_sections.read_model(settings, layers, norm_eps=1e-6, zero_centered_norms=True)


def write_dense(config: ModelConfig) -> dict[str, Any]:
    width = config_sections.the_dense(config).d_ff
    return _write(config) | {"intermediate_size": width}


def write_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config_sections.the_moe(config)
    return _write(config) | {
        **config_sections.write_softmax_router(moe.router),
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.d_ff,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**config_sections.write_model(config), **delta_net.write_layers(config)}


UNREAD = (
    (r"model\.visual\..*", "an encoder for images"),
    (r"mtp\..*", "multi-token modules"),
)

CORE = (
    *weight_maps.EMBEDDING,
    *weight_maps.NORMS,
    *delta_net.gated_query(weight_maps.grouped_query()),
    *weight_maps.QK_NORM,
    *delta_net.SEPARATE_PROJECTIONS,
    *delta_net.CORE,
)

GGUF_CORE = (*delta_net_gguf.AROUND, *delta_net_gguf.ATTENTION, *delta_net_gguf.SEPARATE)
GGUF_SECTIONS = (
    gguf_sections.PARTLY_TURNED_HEADS,
    gguf_rope.INTERLEAVED,
    gguf_layers.DELTA_NETS,
)

QWEN3_5_TEXT = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read_config=read_dense,
    write_config=write_dense,
    defaults=DEFAULTS,
    rows=(*CORE, *weight_maps.DENSE),
    renames=text_part.RENAMES,
    unread=UNREAD,
    gguf=GGUF("qwen35", (*GGUF_CORE, *gguf_weight_maps.DENSE), sections=GGUF_SECTIONS),
)
QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read_config=read_moe,
    write_config=write_moe,
    defaults=MOE_DEFAULTS,
    rows=(*CORE, weight_maps.ROUTER, *weight_maps.EXPERTS, *qwen2_moe.SHARED),
    fuses_experts=True,
    renames=text_part.RENAMES,
    unread=UNREAD,
    gguf=GGUF(
        "qwen35moe",
        (*GGUF_CORE, *gguf_weight_maps.GATED_MOE),
        (*gguf_pairs.GROUPED, *gguf_pairs.WIDE_EXPERTS),
        sections=GGUF_SECTIONS,
    ),
)


QWEN3_5 = text_part.beside_encoders("qwen3_5", "Qwen3_5ForConditionalGeneration", QWEN3_5_TEXT)
QWEN3_5_MOE = text_part.beside_encoders(
    "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", QWEN3_5_MOE_TEXT
)
