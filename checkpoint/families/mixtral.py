"""Mixtral (2024): every layer a mixture of experts, gates normalised."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
"""Values of transformers\' MixtralConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(
        settings, rope_base=1e6, window_size=settings.integer("sliding_window", default=None)
    )
    ffn = MoEConfig(
        num_experts=settings.integer("num_local_experts", "num_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=config_sections.read_softmax_router(settings, normalize=True, auxiliary=1e-3),
    )
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, ffn = config_sections.grouped_query(config), config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.write_softmax_router(ffn.router),
        "num_local_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "sliding_window": attention.window_size,
        "router_jitter_noise": 0.0,
    }


MOE = f"{weight_maps.LAYER}.block_sparse_moe"

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        Row("layers.*.moe.router", f"{MOE}.gate.weight", "e d -> d e"),
        *weight_maps.experts(f"{MOE}.experts.{{e}}", gate="w1", up="w3", down="w2"),
    ),
    fuses_experts=True,
    gguf=GGUF(
        "llama",
        gguf_weight_maps.LLAMA_MOE,
        (*gguf_pairs.GROUPED, (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts")),
    ),
)
