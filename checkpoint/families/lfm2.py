"""LFM2 (2025), dense and with experts: gated short convolutions among attentions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, mamba2, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention, AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from configs.recurrent_attention import ShortConvConfig

COMMON_DEFAULTS = {
    "vocab_size": 65_536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "tie_word_embeddings": True,
}
DEFAULTS = COMMON_DEFAULTS | {
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
"""Values of transformers\' Lfm2Config for keys that a config.json leaves out."""
MOE_DEFAULTS = COMMON_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
}
"""Values of Lfm2MoeConfig."""

CONV, WHOLE = "conv", "full_attention"
BASE = 1_000_000.0


def read_dense(settings: Settings) -> ModelConfig:
    """Files of the first release say layer_types by full_attn_idxs."""
    count = config_sections.read_num_layers(settings)
    whole = settings.items("full_attn_idxs", of=int, default=list(range(count)))
    default = [WHOLE if i in whole else CONV for i in range(count)]
    ffn = DenseConfig(d_ff=_read_width(settings))
    attentions = _read_attentions(settings, default)
    return _read_model(settings, [LayerSpec(attention=each, ffn=ffn) for each in attentions])


def _read_width(settings: Settings) -> int:
    """d_ff, which intermediate_size is the start of."""
    width = settings.integer("block_ff_dim", "intermediate_size")
    if not settings.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    factor = settings.number("block_ffn_dim_multiplier", default=None)
    if factor is None:
        return width
    multiple = settings.integer("block_multiple_of", default=256)
    return multiple * math.ceil(int(factor * width) / multiple)


def read_moe(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    is_biased = settings.flag("use_expert_bias", default=True)
    router = RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        scores="sigmoid",
        normalize_gates=settings.flag("norm_topk_prob", default=True),
        gate_scale=settings.number("routed_scaling_factor", default=1.0),
        balance="loss_free" if is_biased else "none",
        bias_rate=1e-3 if is_biased else None,
        load_balance_weight=0.0,
        z_loss_weight=0.0,
    )
    moe = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        router=router,
    )
    dense = DenseConfig(d_ff=settings.integer("intermediate_size"))
    first = settings.integer("num_dense_layers", least=0)
    attentions = _read_attentions(settings, None, count)
    layers = [
        LayerSpec(attention=each, ffn=dense if i < first else moe)
        for i, each in enumerate(attentions)
    ]
    return _read_model(settings, layers)


def _read_attentions(
    settings: Settings, default: list[str] | None, count: int | None = None
) -> list[Attention]:
    """Each layer's, by layer_types."""
    count = len(default) if default is not None else count
    kinds = settings.items("layer_types", of=str, default=default)
    if kinds is None or len(kinds) != count or not set(kinds) <= {CONV, WHOLE}:
        raise UserError(
            f"{settings.where} has layer_types={kinds}, expected {CONV!r} or {WHOLE!r} for each of "
            f"num_hidden_layers={count}"
        )
    whole = config_sections.read_grouped_query(settings, rope_base=BASE, bias=False, qk_norm="head")
    conv = ShortConvConfig(
        channels=settings.integer("hidden_size"),
        conv_width=settings.integer("conv_L_cache", default=3),
        bias=settings.flag("conv_bias", default=False),
    )
    return [whole if kind == WHOLE else conv for kind in kinds]


def _read_model(settings: Settings, layers: list[LayerSpec]) -> ModelConfig:
    tied = settings.flag("tie_embedding", "tie_word_embeddings", default=True)
    own = Settings(
        settings.values | {"tie_word_embeddings": tied}, settings.where, settings.defaults
    )
    return config_sections.read_model(own, layers, norm_eps=1e-5, norm_key="norm_eps")


def _write(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    attentions = [layer.attention for layer in layers]
    whole = [each for each in attentions if isinstance(each, AttentionConfig)]
    convs = [each for each in attentions if isinstance(each, ShortConvConfig)]
    if len(whole) + len(convs) != len(layers):
        raise UserError("this family has attentions and short convolutions, the model has others")
    heads = config_sections.write_grouped_query(config_sections.the_one(whole, "attention"))
    written = config_sections.write_model(config, norm_key="norm_eps")
    return {
        **{k: v for k, v in written.items() if k not in ("hidden_act", "mlp_bias")},
        **{k: v for k, v in heads.items() if k != "attention_bias"},
        **_write_conv(convs),
        "layer_types": [CONV if isinstance(x, ShortConvConfig) else WHOLE for x in attentions],
    }


def _write_conv(convs: Sequence[ShortConvConfig]) -> dict[str, Any]:
    if not convs:
        return {}
    conv = config_sections.the_one(convs, "short convolution")
    return {"conv_L_cache": conv.conv_width, "conv_bias": conv.bias}


def write_dense(config: ModelConfig) -> dict[str, Any]:
    width = config_sections.the_dense(config).d_ff
    return {**_write(config), "intermediate_size": width, "block_auto_adjust_ff_dim": False}


def write_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config_sections.the_moe(config)
    ffns = [layer.ffn for layer in config_sections.unfolded(config)]
    dense = [ffn for ffn in ffns if isinstance(ffn, DenseConfig)]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    return {
        **_write(config),
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.normalize_gates,
        "routed_scaling_factor": moe.router.gate_scale,
        "use_expert_bias": moe.router.balance != "none",
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "intermediate_size": width,
        "num_dense_layers": ffns.index(moe),
    }


LAYER, ATTENTION = weight_maps.LAYER, weight_maps.ATTENTION
FFN = f"{LAYER}.feed_forward"
MIXER = "layers.*.attention"


def _of_attention(row: Row) -> Row:
    """The row of grouped-query attention with LFM2's name, where there is one."""
    name = row.name.replace(".o_proj.", ".out_proj.")
    return Row(row.parameter, name, row.pattern, row.order, requires=f"{MIXER}.q")


def swiglu(parameter: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{parameter}.gate_up", f"{name}.w1.weight", "f d -> d 0 f"),
        Row(f"{parameter}.gate_up", f"{name}.w3.weight", "f d -> d 1 f"),
        Row(f"{parameter}.down", f"{name}.w2.weight", "d f -> f d"),
    )


ROWS = (
    *weight_maps.EMBEDDING[:2],
    Row("final_norm.scale", "model.embedding_norm.weight", "d -> d"),
    Row("layers.*.attention_norm.scale", f"{LAYER}.operator_norm.weight", "d -> d"),
    Row("layers.*.ffn_norm.scale", f"{LAYER}.ffn_norm.weight", "d -> d"),
    *(_of_attention(row) for row in weight_maps.grouped_query() if not row.name.endswith("bias")),
    Row(f"{MIXER}.q_norm.scale", f"{ATTENTION}.q_layernorm.weight", "c -> c"),
    Row(f"{MIXER}.k_norm.scale", f"{ATTENTION}.k_layernorm.weight", "c -> c"),
    Row(f"{MIXER}.in", f"{LAYER}.conv.in_proj.weight", "(i n) d -> d i n"),
    Row(f"{MIXER}.in_bias", f"{LAYER}.conv.in_proj.bias", "(i n) -> i n"),
    Row(f"{MIXER}.conv", f"{LAYER}.conv.conv.weight", "n k t -> t n"),
    Row(f"{MIXER}.conv_bias", f"{LAYER}.conv.conv.bias", "n -> n"),
    Row(
        f"{MIXER}.o",
        f"{LAYER}.conv.out_proj.weight",
        "d n -> n d",
        requires=f"{MIXER}.in",
    ),
    Row(f"{MIXER}.o_bias", f"{LAYER}.conv.out_proj.bias", "d -> d"),
    *swiglu("layers.*.ffn", FFN),
)

BLOCK = gguf_weight_maps.BLOCK
GGUF_DENSE = GGUF(
    "lfm2",
    (
        *gguf_weight_maps.EMBEDDING[:2],
        Row("final_norm.scale", "token_embd_norm.weight", "d -> d"),
        *gguf_weight_maps.NORMS,
        *mamba2.beside(gguf_weight_maps.grouped_query()),
        *gguf_weight_maps.QK_NORM,
        Row(f"{MIXER}.in", f"{BLOCK}.shortconv.in_proj.weight", "(i n) d -> d i n"),
        Row(f"{MIXER}.conv", f"{BLOCK}.shortconv.conv.weight", "n t -> t n"),
        Row(
            f"{MIXER}.o",
            f"{BLOCK}.shortconv.out_proj.weight",
            "d n -> n d",
            requires=f"{MIXER}.in",
        ),
        *gguf_weight_maps.DENSE,
        *gguf_weight_maps.EXPERTS,
        gguf_weight_maps.CHOICE_BIAS,
    ),
    (
        *gguf_pairs.renamed(gguf_pairs.GROUPED, rms_norm_eps="norm_eps", num_key_value_heads=None),
        (gguf_pairs.SHORT_CONV_TAPS, "conv_L_cache"),
    ),
    fixed={"block_auto_adjust_ff_dim": False},
    sections=(gguf_layers.keys_by_layer((CONV, WHOLE)), gguf_sections.HEADS),
)
GGUF_MOE = dataclasses.replace(
    GGUF_DENSE,
    architecture="lfm2moe",
    pairs=(
        *GGUF_DENSE.pairs,
        (gguf_pairs.LLM.EXPERT_COUNT, "num_experts"),
        (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
        (gguf_pairs.LLM.LEADING_DENSE_BLOCK_COUNT, "num_dense_layers"),
    ),
    fixed={"num_dense_layers": 0},
    derived=lambda _: gguf_pairs.SIGMOID,
)

LFM2 = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    read_config=read_dense,
    write_config=write_dense,
    defaults=DEFAULTS,
    rows=ROWS,
    gguf=GGUF_DENSE,
)
LFM2_MOE = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    read_config=read_moe,
    write_config=write_moe,
    defaults=MOE_DEFAULTS,
    rows=(
        *ROWS,
        Row("layers.*.moe.router", f"{FFN}.gate.weight", "e d -> d e"),
        Row("layers.*.moe.state.bias_E", f"{FFN}.expert_bias", "e -> e"),
        *weight_maps.experts(f"{FFN}.experts.{{e}}", "w1", "w3", "w2"),
    ),
    gguf=GGUF_MOE,
)
