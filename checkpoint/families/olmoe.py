"""OLMoE (2024): queries and keys normed over all heads together, gates as they are."""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}
"""Values of transformers\' OlmoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(
        settings, qk_norm="all", clip_qkv=settings.number("clip_qkv", default=None)
    )
    normalize = settings.flag("norm_topk_prob", default=False)
    ffn = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=config_sections.read_softmax_router(settings, normalize=normalize, auxiliary=1e-2),
    )
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, ffn = config_sections.grouped_query(config), config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.write_softmax_router(ffn.router),
        "num_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "norm_topk_prob": ffn.router.normalize_gates,
        "clip_qkv": attention.clip_qkv,
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM_OF_ALL,
        weight_maps.ROUTER,
        *weight_maps.EXPERTS,
    ),
    fuses_experts=True,
    gguf=GGUF(
        "olmoe",
        gguf_weight_maps.OLMOE,
        (*gguf_pairs.GROUPED, (gguf_pairs.LLM.EXPERT_COUNT, "num_experts")),
        fixed={"norm_topk_prob": False},
    ),
)
