"""Nemotron-H (2025) and Nemotron 3: layers of Mamba-2, of attention without positions, of a dense
feed-forward or of experts, each by itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, mamba2
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row, interleaved
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.attention_traits import NoAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, NoFeedForwardConfig
from configs.recurrent_attention import Mamba2Config

DEFAULTS = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "mlp_hidden_act": "relu2",
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
}
"""Values of transformers\' NemotronHConfig for keys that a config.json leaves out."""

MAMBA, ATTENTION, MLP, MOE = "linear_attention", "full_attention", "mlp", "moe"
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": MOE}
"""Of hybrid_override_pattern, as released files have it."""
OLDER = {"mamba": MAMBA, "attention": ATTENTION}


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("attention_bias", False)
    settings.expect("sliding_window", None)
    settings.expect("tie_word_embeddings", False)
    kinds = _read_kinds(settings)
    if MOE in kinds and settings.flag("mlp_bias", default=False):
        raise UserError(
            f"{settings.where} has mlp_bias=True beside experts: biases of shared experts and of "
            "latent projections are not built"
        )
    alone, nothing = NoFeedForwardConfig(), NoAttentionConfig()
    layer = {
        MAMBA: lambda: LayerSpec(attention=_read_mamba(settings), ffn=alone),
        ATTENTION: lambda: LayerSpec(attention=_read_attention(settings), ffn=alone),
        MLP: lambda: LayerSpec(attention=nothing, ffn=_read_dense(settings)),
        MOE: lambda: LayerSpec(attention=nothing, ffn=_read_moe(settings)),
    }
    made = {kind: layer[kind]() for kind in set(kinds)}
    return config_sections.read_model(
        settings,
        [made[kind] for kind in kinds],
        norm_eps=1e-5,
        activation_key="mlp_hidden_act",
        norm_key="layer_norm_epsilon",
    )


def _read_kinds(settings: Settings) -> list[str]:
    """What each layer is."""
    pattern: str = settings.text("hybrid_override_pattern", default="ME*-")
    letters = [LETTERS.get(letter, letter) for letter in pattern]
    kinds: list[str] = settings.items("layers_block_type", "layer_types", of=str, default=letters)
    kinds = [OLDER.get(kind, kind) for kind in kinds]
    unknown = sorted(set(kinds) - set(LETTERS.values()))
    if unknown or not 0 < len(kinds) <= config_sections.MAX_LAYERS:
        raise UserError(
            f"{settings.where} has layers {unknown or kinds[:3]} in layers_block_type or "
            f"hybrid_override_pattern, expected 1 to {config_sections.MAX_LAYERS} of "
            f"{sorted(LETTERS.values())} or of {' '.join(LETTERS)}"
        )
    return kinds


def _read_mamba(settings: Settings) -> Mamba2Config:
    settings.expect("mamba_hidden_act", "silu", "swish")
    return Mamba2Config(
        num_heads=settings.integer("mamba_num_heads"),
        head_dim=settings.integer("mamba_head_dim"),
        state_dim=settings.integer("ssm_state_size"),
        num_groups=settings.integer("mamba_n_groups", "n_groups"),
        conv_width=settings.integer("mamba_d_conv", "conv_kernel", default=4),
        conv_bias=settings.flag("mamba_conv_bias", "use_conv_bias", default=True),
        bias=settings.flag("use_bias", default=False),
        norm_by_group=True,
        least_step=settings.number("mamba_dt_min", "time_step_min", default=0.001),
    )


def _read_attention(settings: Settings) -> AttentionConfig:
    heads = settings.integer("num_attention_heads")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads", default=heads),
        head_dim=settings.integer("head_dim"),
        rotary_dim=0,
    )


def _read_dense(settings: Settings) -> DenseConfig:
    return DenseConfig(
        d_ff=settings.integer("intermediate_size"),
        activation="relu2",
        bias=settings.flag("mlp_bias", default=False),
    )


def _read_moe(settings: Settings) -> MoEConfig:
    width = settings.integer("moe_intermediate_size")
    count = settings.integer("n_shared_experts")
    shared = settings.integer("moe_shared_expert_intermediate_size")
    return MoEConfig(
        num_experts=settings.integer("n_routed_experts", "num_local_experts"),
        d_ff=width,
        num_shared_experts=count,
        shared_d_ff=None if shared == count * width else shared,
        latent_width=settings.integer("moe_latent_size", default=None),
        router=deepseek_moe.biased_router(settings),
        activation="relu2",
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    attentions, ffns = [x.attention for x in layers], [x.ffn for x in layers]
    kinds = [_kind(layer) for layer in layers]
    letters = {kind: letter for letter, kind in LETTERS.items()}
    written = config_sections.write_model(
        config, activation_key="mlp_hidden_act", norm_key="layer_norm_epsilon"
    )
    return {
        **written,
        **_write_attention([x for x in attentions if isinstance(x, AttentionConfig)]),
        **_write_mamba([x for x in attentions if isinstance(x, Mamba2Config)]),
        **_write_moe([x for x in ffns if isinstance(x, MoEConfig)]),
        **_write_dense([x for x in ffns if isinstance(x, DenseConfig)]),
        "layers_block_type": kinds,
        "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
    }


def _kind(layer: LayerSpec) -> str:
    """
    Raises:
      UserError: the family has no such layer.
    """
    if layer.has_attention and layer.has_feed_forward:
        raise UserError(
            "this family's layers are an attention or a feed-forward alone, the model has some "
            "with both"
        )
    if isinstance(layer.attention, Mamba2Config):
        return MAMBA
    if isinstance(layer.attention, AttentionConfig):
        return ATTENTION
    if layer.has_attention:
        raise UserError(
            "this family has attention.kind='mamba2' and 'grouped_query', the model has "
            f"{layer.attention.kind!r}"
        )
    return MOE if isinstance(layer.ffn, MoEConfig) else MLP


def _write_attention(found: Sequence[AttentionConfig]) -> dict[str, Any]:
    if not found:
        return {}
    attention = config_sections.the_one(found, "attention")
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
    }


def _write_mamba(found: Sequence[Mamba2Config]) -> dict[str, Any]:
    if not found:
        return {}
    mamba = config_sections.the_one(found, "Mamba-2 layer")
    return {
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "time_step_min": mamba.least_step,
        "mamba_hidden_act": "silu",
    }


def _write_moe(found: Sequence[MoEConfig]) -> dict[str, Any]:
    if not found:
        return {}
    moe = config_sections.the_one(found, "form of its MoE layers")
    return {
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "n_shared_experts": moe.num_shared_experts,
        "moe_shared_expert_intermediate_size": moe.shared_width,
        "moe_latent_size": moe.latent_width,
        "num_experts_per_tok": moe.router.top_k,
        "routed_scaling_factor": moe.router.gate_scale,
        "norm_topk_prob": moe.router.normalize_gates,
        "n_group": moe.router.num_groups or 1,
        "topk_group": moe.router.top_groups or 1,
    }


def _write_dense(found: Sequence[DenseConfig]) -> dict[str, Any]:
    if not found:
        return {}
    return {"intermediate_size": config_sections.the_one(found, "dense layer").d_ff}


LAYER = "backbone.layers.*"
MIXER = f"{LAYER}.mixer"
HEADS = "layers.*.attention"
IN_ATTENTION = f"{HEADS}.q"


def ungated(parameter: str, name: str) -> tuple[Row, ...]:
    """The rows of a feed-forward without a gate."""
    return (
        Row(f"{parameter}.gate_up", f"{name}.up_proj.weight", "f d -> d 0 f"),
        Row(f"{parameter}.down", f"{name}.down_proj.weight", "d f -> f d"),
        Row(f"{parameter}.gate_up_bias", f"{name}.up_proj.bias", "f -> 0 f"),
        Row(f"{parameter}.down_bias", f"{name}.down_proj.bias", "d -> d"),
    )


BLOCK = gguf_weight_maps.BLOCK


def _gguf_sections(feed_forward: str, width: str) -> tuple[gguf_sections.Section, ...]:
    return (
        gguf_layers.one_part_each(MAMBA, ATTENTION, feed_forward, width),
        gguf_sections.UNTURNED_HEADS,
        gguf_layers.mamba2(
            heads="mamba_num_heads",
            width="mamba_head_dim",
            state="ssm_state_size",
            groups="n_groups",
            taps="conv_kernel",
        ),
        gguf_sections.LAYER_NORM_EPS,
    )


COMMON_PAIRS = gguf_pairs.renamed(
    gguf_pairs.GROUPED,
    intermediate_size=None,
    num_key_value_heads=None,
    rms_norm_eps="layer_norm_epsilon",
)
GGUF_DENSE = GGUF(
    "nemotron_h",
    (
        *gguf_weight_maps.EMBEDDING,
        Row("layers.*.attention_norm.scale", f"{BLOCK}.attn_norm.weight", "d -> d"),
        Row("layers.*.ffn_norm.scale", f"{BLOCK}.attn_norm.weight", "d -> d"),
        *mamba2.GGUF_ROWS,
        *mamba2.beside(gguf_weight_maps.grouped_query(interleaved("head_dim"))),
        *gguf_weight_maps.ungated("layers.*.ffn", ""),
        *gguf_weight_maps.UNGATED_MOE,
    ),
    COMMON_PAIRS,
    fixed={"time_step_min": 0.0, "mlp_hidden_act": "relu2"},
    optional={"mlp_bias": "blk.0.ffn_up.bias"},
    sections=_gguf_sections(MLP, "intermediate_size"),
    suits=lambda values: MOE not in values["layers_block_type"],
)
GGUF_MOE = dataclasses.replace(
    GGUF_DENSE,
    architecture="nemotron_h_moe",
    pairs=(
        *COMMON_PAIRS,
        *gguf_pairs.DEEPSEEK_EXPERTS,
        (gguf_pairs.LLM.EXPERT_GROUP_COUNT, "n_group"),
        (gguf_pairs.LLM.EXPERT_GROUP_USED_COUNT, "topk_group"),
        (
            gguf_pairs.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH,
            "moe_shared_expert_intermediate_size",
        ),
        (gguf_pairs.LLM.MOE_LATENT_SIZE, "moe_latent_size"),
    ),
    fixed={**GGUF_DENSE.fixed, **gguf_pairs.DEEPSEEK_MOE_FIXED},
    optional={},
    sections=_gguf_sections(MOE, "moe_intermediate_size"),
    suits=lambda values: MOE in values["layers_block_type"],
    other=GGUF_DENSE,
)
"""The same with experts instead of dense layers."""

NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        Row("embedding", "backbone.embeddings.weight", "v d -> v d"),
        Row("output", "lm_head.weight", "v d -> d v"),
        Row("final_norm.scale", "backbone.norm_f.weight", "d -> d"),
        Row("layers.*.attention_norm.scale", f"{LAYER}.norm.weight", "d -> d"),
        Row("layers.*.ffn_norm.scale", f"{LAYER}.norm.weight", "d -> d"),
        *mamba2.rows(MIXER),
        Row(IN_ATTENTION, f"{MIXER}.q_proj.weight", "(h c) d -> d h c"),
        Row(f"{HEADS}.kv", f"{MIXER}.k_proj.weight", "(g c) d -> d 0 g c"),
        Row(f"{HEADS}.kv", f"{MIXER}.v_proj.weight", "(g c) d -> d 1 g c"),
        Row(f"{HEADS}.o", f"{MIXER}.o_proj.weight", "d (h c) -> h c d", requires=IN_ATTENTION),
        *ungated("layers.*.ffn", MIXER),
        Row("layers.*.moe.router", f"{MIXER}.gate.weight", "e d -> d e"),
        Row("layers.*.moe.state.bias_E", f"{MIXER}.gate.e_score_correction_bias", "e -> e"),
        Row("layers.*.moe.gate_up", f"{MIXER}.experts.{{e}}.up_proj.weight", "f d -> e d 0 f"),
        Row("layers.*.moe.down", f"{MIXER}.experts.{{e}}.down_proj.weight", "d f -> e f d"),
        *ungated("layers.*.moe.shared", f"{MIXER}.shared_experts"),
        Row("layers.*.moe.latent_in", f"{MIXER}.fc1_latent_proj.weight", "r d -> d r"),
        Row("layers.*.moe.latent_out", f"{MIXER}.fc2_latent_proj.weight", "d r -> r d"),
    ),
    renames=((r"^model\.", "backbone."),),
    unread=((r"mtp\..*", "multi-token modules"),),
    gguf=GGUF_MOE,
)
