"""ERNIE 4.5 with experts (2025): rotary pairs side by side, softmax scores with a bias on the
choice, shared experts."""

import itertools
from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row, interleaved
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 103_424,
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
"""Values of transformers\' Ernie4_5_MoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("use_bias", False)
    attention = config_sections.read_grouped_query(settings, rope_base=500_000.0, bias=False)
    moe = MoEConfig(
        num_experts=settings.integer("moe_num_experts", "num_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        num_shared_experts=settings.integer("moe_num_shared_experts", default=0, least=0),
        router=RouterConfig(
            top_k=settings.integer("moe_k", "num_experts_per_tok"),
            balance="loss_free",
            bias_rate=1e-3,
            load_balance_weight=settings.number("router_aux_loss_coef", default=1e-3),
            z_loss_weight=0.0,
        ),
    )
    dense = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [
        LayerSpec(attention=attention, ffn=moe if has_experts else dense)
        for has_experts in _read_places(settings)
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _read_places(settings: Settings) -> list[bool]:
    """Which layers have experts."""
    count = config_sections.read_num_layers(settings)
    every = settings.integer("moe_layer_interval", default=1)
    first = settings.integer("moe_layer_start_index", least=0)
    last = settings.integer("moe_layer_end_index", default=-1, least=-1)
    last = count - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % every == 0 for i in range(count)]


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers, moe = config_sections.unfolded(config), config_sections.the_moe(config)
    dense = [layer.ffn for layer in layers if isinstance(layer.ffn, DenseConfig)]
    attention = config_sections.write_grouped_query(config_sections.grouped_query(config))
    return {
        **config_sections.write_model(config),
        **attention,
        **_write_places([isinstance(layer.ffn, MoEConfig) for layer in layers]),
        "use_bias": False,
        "intermediate_size": config_sections.the_one(dense, "dense layer").d_ff if dense else 1,
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.router.top_k,
        "moe_intermediate_size": moe.d_ff,
        "moe_num_shared_experts": moe.num_shared_experts,
        "router_aux_loss_coef": moe.router.load_balance_weight,
    }


def _write_places(has_experts: list[bool]) -> dict[str, int]:
    """
    Raises:
      UserError: experts lie in layers that no interval gives.
    """
    places = [i for i, has in enumerate(has_experts) if has]
    steps = {b - a for a, b in itertools.pairwise(places)} or {1}
    every, first, last = min(steps), places[0], places[-1]
    if len(steps) > 1 or (first + 1) % every:
        raise UserError(
            f"this family has experts in every n-th layer, the model has them in layers {places}"
        )
    return {
        "moe_layer_interval": every,
        "moe_layer_start_index": first,
        "moe_layer_end_index": len(has_experts) - 1 if last + every >= len(has_experts) else last,
    }


def _shared_width(values: Mapping[str, Any]) -> dict[str, Any]:
    width, count = values.get("moe_intermediate_size"), values.get("moe_num_shared_experts")
    if not isinstance(width, int) or not isinstance(count, int) or count == 0:
        return {}
    return {gguf_pairs.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: width * count}


GATE = f"{weight_maps.LAYER}.mlp.gate"

ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.NORMS,
        *weight_maps.grouped_query(interleaved("head_dim")),
        *weight_maps.DEEPSEEK_MOE,
        Row(
            "layers.*.moe.state.bias_E",
            f"{weight_maps.LAYER}.mlp.moe_statics.e_score_correction_bias",
            "u e -> e",
        ),
    ),
    gguf=GGUF(
        "ernie4_5-moe",
        gguf_weight_maps.ERNIE_MOE,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.EXPERT_COUNT, "moe_num_experts"),
            (gguf_pairs.LLM.EXPERT_USED_COUNT, "moe_k"),
            (gguf_pairs.LLM.EXPERT_SHARED_COUNT, "moe_num_shared_experts"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
            (gguf_pairs.LLM.INTERLEAVE_MOE_LAYER_STEP, "moe_layer_interval"),
            (gguf_pairs.LLM.LEADING_DENSE_BLOCK_COUNT, "moe_layer_start_index"),
        ),
        derived=_shared_width,
    ),
)
