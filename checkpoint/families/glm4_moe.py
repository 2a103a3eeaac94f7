"""GLM-4.5 to 4.7 (2025): half of each head turned, DeepSeek-V3's experts and modules."""

from typing import Any

from checkpoint import gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, deepseek_v3, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import ModelConfig

DEFAULTS = {
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
"""Values of transformers\' Glm4MoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    has_bias = settings.flag("attention_bias", default=False)
    attention = config_sections.read_grouped_query(
        settings,
        bias=has_bias,
        output_bias=not has_bias,
        turned_share=0.5,
        qk_norm="head" if settings.flag("use_qk_norm", default=False) else None,
    )
    router = deepseek_moe.read_router(settings)
    layers = deepseek_moe.read_layers(settings, attention, router)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention = config_sections.grouped_query(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **deepseek_moe.write_layers(config),
        "partial_rotary_factor": (attention.rotary_dim or attention.head_dim) / attention.head_dim,
        "use_qk_norm": attention.qk_norm is not None,
        "num_nextn_predict_layers": config.multi_token.depth if config.multi_token else 0,
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM,
        *weight_maps.DEEPSEEK_MOE,
        weight_maps.CHOICE_BIAS,
        *weight_maps.MULTI_TOKEN_MODULE,
    ),
    copies=deepseek_v3.COPIES,
    multi_token=weight_maps.MULTI_TOKEN,
    fuses_experts=True,
    gguf=GGUF(
        "glm4moe",
        gguf_weight_maps.GLM4_MOE,
        gguf_pairs.GROUPED_DEEPSEEK_MOE,
        fixed=gguf_pairs.DEEPSEEK_MOE_FIXED,
        derived=lambda _: gguf_pairs.SIGMOID,
        optional={
            "attention_bias": "blk.0.attn_q.bias",
            "use_qk_norm": "blk.0.attn_q_norm.weight",
        },
        sections=(gguf_sections.PARTLY_TURNED_HEADS,),
    ),
)
