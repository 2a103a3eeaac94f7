"""FlexOlmo (2025): OLMo 2 with experts, whose gates stay as they are."""

from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, olmo2, weight_maps
from checkpoint.families.base import Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 100_352,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 5,
    "num_experts": 7,
}
"""Values of transformers\' FlexOlmoConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(settings, rope_base=500_000.0, qk_norm="all")
    normalize = settings.flag("norm_topk_prob", default=False)
    ffn = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=config_sections.read_softmax_router(settings, normalize=normalize, auxiliary=1e-2),
    )
    layer = LayerSpec(attention=attention, ffn=ffn, norms="post")
    layers = [layer] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    ffn = config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        **config_sections.write_softmax_router(ffn.router),
        "num_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "norm_topk_prob": ffn.router.normalize_gates,
    }


FLEX_OLMO = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *olmo2.ROWS,
        weight_maps.ROUTER,
        *weight_maps.EXPERTS,
    ),
    fuses_experts=True,
)
