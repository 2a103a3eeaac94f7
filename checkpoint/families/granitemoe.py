"""Granite 3 with experts (2024): Granite's factors, Mixtral's router, experts in two tensors."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, granite, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""Values of transformers\' GraniteMoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    ffn = MoEConfig(
        num_experts=settings.integer("num_local_experts", "num_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=config_sections.read_softmax_router(settings, normalize=True, auxiliary=1e-3),
    )
    layer = LayerSpec(attention=granite.read_attention(settings), ffn=ffn)
    layers = [layer] * config_sections.read_num_layers(settings)
    factors = granite.read_factors(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6, **factors)


def write_config(config: ModelConfig) -> dict[str, Any]:
    ffn = config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **granite.write_factors(config),
        **config_sections.write_softmax_router(ffn.router),
        "num_local_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
    }


MOE = f"{weight_maps.LAYER}.block_sparse_moe"

GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        Row("layers.*.moe.router", f"{MOE}.router.layer.weight", "e d -> d e"),
        Row("layers.*.moe.gate_up", f"{MOE}.input_linear.weight", "e (i f) d -> e d i f"),
        Row("layers.*.moe.down", f"{MOE}.output_linear.weight", "e d f -> e f d"),
    ),
    gguf=GGUF(
        "granitemoe",
        gguf_weight_maps.LLAMA_MOE,
        (*granite.PAIRS, (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts")),
    ),
)
