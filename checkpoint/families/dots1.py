"""dots.llm1 (2025): Qwen3's attention, DeepSeek-V3's experts."""

from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import ModelConfig
from configs.checks import UserError

DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 4608,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "norm_topk_prob": False,
    "max_position_embeddings": 2048,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
"""Values of transformers\' Dots1Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("scoring_func", "noaux_tc", "sigmoid")
    config_sections.expect_no_windows(settings)
    _expect_no_late_windows(settings)
    attention = config_sections.read_grouped_query(settings, qk_norm="head")
    router = deepseek_moe.biased_router(settings)
    layers = deepseek_moe.read_layers(settings, attention, router)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _expect_no_late_windows(settings: Settings) -> None:
    """Where layer_types are left out, the layers from max_window_layers on have windows."""
    size = settings.integer("sliding_window", default=None)
    count = settings.integer("num_hidden_layers")
    first = settings.integer("max_window_layers", default=count)
    if size is not None and first < count and "layer_types" not in settings:
        raise UserError(
            f"{settings.where} has sliding_window={size} from layer max_window_layers={first} on: "
            "windows are not built for this family"
        )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        **deepseek_moe.write_layers(config),
        "layer_types": ["full_attention"] * config.num_layers,
        "scoring_func": "noaux_tc",
    }


def _derived(values: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = values.get("num_attention_heads")
    kv_heads = values.get("num_key_value_heads", heads)
    if kv_heads != heads:
        raise UserError(
            f"llama.cpp's dots1 has as many heads of keys as of queries, the model has {kv_heads} "
            f"and {heads}: keep it in Hugging Face form"
        )
    return gguf_pairs.SIGMOID


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM,
        *weight_maps.DEEPSEEK_MOE,
        weight_maps.CHOICE_BIAS,
    ),
    fuses_experts=True,
    gguf=GGUF(
        "dots1",
        gguf_weight_maps.DOTS1,
        gguf_pairs.GROUPED_DEEPSEEK_MOE,
        fixed=gguf_pairs.DEEPSEEK_MOE_FIXED,
        derived=_derived,
    ),
)
