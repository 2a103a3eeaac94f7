"""Hunyuan-A13B (2025): heads normed after RoPE, experts beside one shared expert."""

from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, hunyuan_v1_dense, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 290_943,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "num_experts": 1,
    "moe_topk": 1,
}
"""Values of transformers\' HunYuanMoEV1Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    top_k = _same_everywhere(settings, "moe_topk", "num_experts_per_tok")
    width = settings.integer("intermediate_size")
    if _same_everywhere(settings, "moe_intermediate_size", default=width) != width:
        raise UserError(
            f"{settings.where} has a moe_intermediate_size other than intermediate_size={width}: "
            "transformers has one width for routed and shared experts"
        )
    settings.expect("num_shared_expert", 1, [1] * config_sections.read_num_layers(settings))
    attention = hunyuan_v1_dense.read_attention(settings)
    ffn = MoEConfig(
        num_experts=_same_everywhere(settings, "num_experts", "num_local_experts"),
        d_ff=width,
        num_shared_experts=1,
        router=RouterConfig(top_k=top_k, z_loss_weight=0.0),
    )
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _same_everywhere(settings: Settings, *names: str, default: Any = None) -> int:
    """A number, or a list with the same one for each layer."""
    for name in names:
        value = settings.values.get(name)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            return Settings({name: value[0]}, settings.where).integer(name)
    return settings.integer(*names, **({} if default is None else {"default": default}))


def write_config(config: ModelConfig) -> dict[str, Any]:
    ffn = config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "num_experts": ffn.num_experts,
        "moe_topk": ffn.router.top_k,
        "intermediate_size": ffn.d_ff,
        "moe_intermediate_size": [ffn.d_ff] * config.num_layers,
        "num_shared_expert": [1] * config.num_layers,
    }


def _shared_width(values: Mapping[str, Any]) -> dict[str, Any]:
    width = values.get("intermediate_size")
    return {} if width is None else {gguf_pairs.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: width}


MLP = f"{weight_maps.LAYER}.mlp"

HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *hunyuan_v1_dense.ROWS,
        Row("layers.*.moe.router", f"{MLP}.gate.wg.weight", "e d -> d e"),
        *weight_maps.EXPERTS,
        *weight_maps.swiglu("layers.*.moe.shared", f"{MLP}.shared_mlp"),
    ),
    gguf=GGUF(
        "hunyuan-moe",
        gguf_weight_maps.HUNYUAN_MOE,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.EXPERT_COUNT, "num_experts"),
            (gguf_pairs.LLM.EXPERT_USED_COUNT, "moe_topk"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "intermediate_size"),
        ),
        derived=_shared_width,
    ),
)
