"""MiniMax-M2 (2025): a part of each head turned, norms over all heads, sigmoid scores, a bias."""

from typing import Any

from checkpoint import gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, rope_section, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 200_064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196_608,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
}
"""Values of transformers\' MiniMaxM2Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = config_sections.read_grouped_query(
        settings,
        rope_base=5_000_000.0,
        bias=False,
        turned_share=_read_share(settings),
        qk_norm="all",
    )
    ffn = MoEConfig(
        num_experts=settings.integer("num_local_experts", "num_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=RouterConfig(
            top_k=settings.integer("num_experts_per_tok"),
            scores="sigmoid",
            balance="loss_free",
            bias_rate=1e-3,
            load_balance_weight=settings.number("router_aux_loss_coef", default=1e-3),
            z_loss_weight=0.0,
        ),
    )
    layers = [LayerSpec(attention=attention, ffn=ffn)] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _read_share(settings: Settings) -> float:
    """Released configs say rotary_dim, transformers' class partial_rotary_factor.

    Raises:
      UserError: they say both, and not the same.
    """
    heads = settings.integer("num_attention_heads")
    width = settings.integer("head_dim", default=settings.integer("hidden_size") // heads)
    turned = settings.integer("rotary_dim", default=width)
    share = rope_section.read_turned_share(settings, turned / width)
    if "rotary_dim" in settings and int(width * share) != turned:
        raise UserError(
            f"{settings.where} has rotary_dim={turned} and partial_rotary_factor={share} of "
            f"head_dim={width}, which are not the same: leave one of them out"
        )
    return share


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, ffn = config_sections.grouped_query(config), config_sections.the_moe(config)
    turned = attention.rotary_dim or attention.head_dim
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.write_softmax_router(ffn.router),
        "num_local_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "rotary_dim": turned,
        "partial_rotary_factor": turned / attention.head_dim,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "use_routing_bias": True,
    }


MOE = f"{weight_maps.LAYER}.block_sparse_moe"

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        *weight_maps.QK_NORM_OF_ALL,
        Row("layers.*.moe.router", f"{MOE}.gate.weight", "e d -> d e"),
        Row("layers.*.moe.state.bias_E", f"{MOE}.e_score_correction_bias", "e -> e"),
        *weight_maps.experts(f"{MOE}.experts.{{e}}", gate="w1", up="w3", down="w2"),
    ),
    gguf=GGUF(
        "minimax-m2",
        gguf_weight_maps.MINIMAX_M2,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "intermediate_size"),
        ),
        derived=lambda _: gguf_pairs.SIGMOID,
        sections=(gguf_sections.PARTLY_TURNED_HEADS,),
    ),
)
