"""Granite 4 (2025): Granite's factors, layers of Mamba-2 among attentions, one shared feed-forward
alone or beside experts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, granite, mamba2, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.gguf_sections import Section
from checkpoint.weight_map import Row, interleaved
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention, AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig
from configs.recurrent_attention import Mamba2Config

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "shared_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_expand": 2,
}
"""Values of transformers\' GraniteMoeHybridConfig for keys that a config.json leaves out."""

MAMBA, ATTENTION = "linear_attention", "full_attention"
OLDER = {"mamba": MAMBA, "attention": ATTENTION}
"""Of layer_types, as released files have them."""


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    kinds = settings.items("layer_types", "layers_block_type", of=str, default=[MAMBA] * count)
    kinds = [OLDER.get(kind, str(kind)) for kind in kinds]
    if len(kinds) != count or not set(kinds) <= {MAMBA, ATTENTION}:
        raise UserError(
            f"{settings.where} has layer_types={kinds}, expected {MAMBA!r} or {ATTENTION!r} for "
            f"each of num_hidden_layers={count}"
        )
    attentions: dict[str, Attention] = {}
    if MAMBA in kinds:
        attentions[MAMBA] = _read_mamba(settings)
    if ATTENTION in kinds:
        attentions[ATTENTION] = _read_attention(settings)
    ffn = _read_ffn(settings)
    layers = [LayerSpec(attention=attentions[kind], ffn=ffn) for kind in kinds]
    factors = granite.read_factors(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6, **factors)


def _read_attention(settings: Settings) -> AttentionConfig:
    attention = granite.read_attention(settings)
    if settings.text("position_embedding_type", default="nope") == "rope":
        return attention
    return dataclasses.replace(attention, rotary_dim=0, rope_base=10_000.0, rope_scaling=None)


def _read_mamba(settings: Settings) -> Mamba2Config:
    heads = settings.integer("mamba_n_heads")
    width = settings.integer("mamba_expand") * settings.integer("hidden_size")
    is_worked_out = settings.values.get("mamba_d_head", "auto") == "auto"
    head_dim = width // heads if is_worked_out else settings.integer("mamba_d_head")
    if heads * head_dim != width:
        raise UserError(
            f"{settings.where} has mamba_n_heads={heads} of width {head_dim}, expected "
            f"mamba_expand x hidden_size = {width} in all"
        )
    return Mamba2Config(
        num_heads=heads,
        head_dim=head_dim,
        state_dim=settings.integer("mamba_d_state"),
        num_groups=settings.integer("mamba_n_groups"),
        conv_width=settings.integer("mamba_d_conv", default=4),
        conv_bias=settings.flag("mamba_conv_bias", default=True),
        bias=settings.flag("mamba_proj_bias", default=False),
        least_step=_read_least_step(settings),
    )


def _read_least_step(settings: Settings) -> float:
    """time_step_limit, whose upper bound must be infinite (an object, as transformers writes it, or
    JSON's Infinity)."""
    limits = settings.values.get("time_step_limit")
    if limits is None:
        return 0.0
    endless = ({"__float__": "Infinity"}, math.inf)
    is_pair = isinstance(limits, list) and len(limits) == 2 and limits[1] in endless
    if not is_pair or type(limits[0]) not in (int, float):
        raise UserError(
            f"{settings.where} has time_step_limit={limits!r:.80}, expected a number and Infinity: "
            "a bound from above is not built"
        )
    return float(limits[0])


def _read_ffn(settings: Settings) -> DenseConfig | MoEConfig:
    """The shared feed-forward alone where there are no experts."""
    shared = settings.integer("shared_intermediate_size")
    count = settings.integer("num_local_experts", "num_experts", least=0)
    if count == 0:
        return DenseConfig(d_ff=shared)
    width = settings.integer("intermediate_size")
    return MoEConfig(
        num_experts=count,
        d_ff=width,
        num_shared_experts=1,
        shared_d_ff=None if shared == width else shared,
        router=config_sections.read_softmax_router(settings, normalize=True, auxiliary=1e-3),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    attentions = [layer.attention for layer in layers]
    whole = [each for each in attentions if isinstance(each, AttentionConfig)]
    mambas = [each for each in attentions if isinstance(each, Mamba2Config)]
    if len(whole) + len(mambas) != len(layers):
        raise UserError(
            "this family has attention.kind='mamba2' and 'grouped_query', the model has others"
        )
    return {
        **config_sections.write_model(config),
        **_write_attention(config, whole),
        **_write_mamba(config, mambas),
        **_write_ffn(config_sections.the_one([layer.ffn for layer in layers], "feed-forward")),
        "layer_types": [MAMBA if isinstance(x, Mamba2Config) else ATTENTION for x in attentions],
    }


def _write_attention(config: ModelConfig, found: Sequence[AttentionConfig]) -> dict[str, Any]:
    """The model's factors too."""
    if not found:
        return granite.model_factors(config)
    attention = config_sections.the_one(found, "attention")
    written = granite.attention_factors(config, attention)
    if attention.rotary_dim == 0:
        rope = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
        written = {key: value for key, value in written.items() if key not in rope}
    return written | {"position_embedding_type": "nope" if attention.rotary_dim == 0 else "rope"}


def _write_mamba(config: ModelConfig, found: Sequence[Mamba2Config]) -> dict[str, Any]:
    """
    Raises:
      UserError: a width that is no multiple of the model's.
    """
    if not found:
        return {}
    mamba = config_sections.the_one(found, "Mamba-2 layer")
    if mamba.out_width % config.d_model:
        raise UserError(
            f"this family's Mamba-2 layers are a multiple of hidden_size={config.d_model} wide, "
            f"the model's are {mamba.out_width} wide"
        )
    return {
        "mamba_n_heads": mamba.num_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_expand": mamba.out_width // config.d_model,
        "mamba_d_state": mamba.state_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_conv": mamba.conv_width,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "time_step_limit": [mamba.least_step, {"__float__": "Infinity"}],
    }


def _write_ffn(ffn: DenseConfig | MoEConfig) -> dict[str, Any]:
    if isinstance(ffn, DenseConfig):
        return {"num_local_experts": 0, "shared_intermediate_size": ffn.d_ff}
    return {
        **config_sections.write_softmax_router(ffn.router),
        "num_local_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "shared_intermediate_size": ffn.shared_width,
    }


LAYER, MIXER = weight_maps.LAYER, "layers.*.attention"
MOE = f"{LAYER}.block_sparse_moe"


def _shared(parameter: str) -> tuple[Row, ...]:
    return (
        Row(f"{parameter}.gate_up", f"{LAYER}.shared_mlp.input_linear.weight", "(i f) d -> d i f"),
        Row(f"{parameter}.down", f"{LAYER}.shared_mlp.output_linear.weight", "d f -> f d"),
    )


def _refuse_other_mamba(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Raises:
      UserError: Mamba-2 that llama.cpp computes otherwise, or stops at.
    """
    expand, groups = values.get("mamba_expand", 2), values.get("mamba_n_groups", 1)
    if expand != 2 or groups != 1:
        raise UserError(
            "llama.cpp's Granite 4 has Mamba-2 layers twice as wide as the model and norms them by "
            f"groups, this one has mamba_expand={expand}, mamba_n_groups={groups}: it can't be "
            "written as GGUF"
        )
    return {}


GGUF_DENSE = GGUF(
    "granitehybrid",
    (
        *gguf_weight_maps.EMBEDDING,
        *gguf_weight_maps.NORMS,
        *mamba2.beside(gguf_weight_maps.grouped_query(interleaved("head_dim"))),
        *mamba2.GGUF_ROWS,
        *gguf_weight_maps.DENSE,
        *gguf_weight_maps.EXPERTS,
        *gguf_weight_maps.SHARED,
    ),
    (
        *gguf_pairs.renamed(
            granite.PAIRS, intermediate_size="shared_intermediate_size", num_key_value_heads=None
        ),
        (gguf_pairs.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, "shared_intermediate_size"),
    ),
    fixed={"num_local_experts": 0, "mamba_expand": 2},
    sections=(
        gguf_layers.keys_by_layer((MAMBA, ATTENTION)),
        gguf_sections.HEADS,
        gguf_layers.mamba2(
            heads="mamba_n_heads",
            width="mamba_d_head",
            state="mamba_d_state",
            groups="mamba_n_groups",
            taps="mamba_d_conv",
        ),
        gguf_layers.POSITIONS,
        Section((), lambda _: {}, _refuse_other_mamba),
    ),
    suits=lambda values: values["num_local_experts"] == 0,
)
"""The shared feed-forward is the only one."""
GGUF_MOE = dataclasses.replace(
    GGUF_DENSE,
    pairs=(
        *gguf_pairs.renamed(granite.PAIRS, num_key_value_heads=None),
        (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts"),
        (gguf_pairs.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, "shared_intermediate_size"),
    ),
    fixed={"mamba_expand": 2},
    is_meant=lambda metadata: metadata.get("granitehybrid.expert_count", 0) != 0,
    suits=lambda values: values["num_local_experts"] != 0,
    other=GGUF_DENSE,
)

GRANITEMOEHYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.NORMS,
        *mamba2.beside(weight_maps.grouped_query()),
        *mamba2.rows(f"{LAYER}.mamba"),
        *_shared("layers.*.ffn"),
        *_shared("layers.*.moe.shared"),
        Row("layers.*.moe.router", f"{MOE}.router.layer.weight", "e d -> d e"),
        Row("layers.*.moe.gate_up", f"{MOE}.input_linear.weight", "e (i f) d -> e d i f"),
        Row("layers.*.moe.down", f"{MOE}.output_linear.weight", "e d f -> e f d"),
    ),
    gguf=GGUF_MOE,
)
