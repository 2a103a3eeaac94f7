"""Llama 4 (2025), text: chunks where RoPE turns, growing queries where it does not, gates on what
experts read."""

import dataclasses
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, text_part, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.weight_map import Row, interleaved
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig, QueryTemperatureConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 202_048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
"""Values of transformers\' Llama4TextConfig for keys that a config.json leaves out."""

BASE = 500_000.0
CHUNKS, WHOLE = "chunked_attention", "full_attention"


def read_config(settings: Settings) -> ModelConfig:
    moe = MoEConfig(
        num_experts=settings.integer("num_local_experts", "num_experts"),
        d_ff=settings.integer("intermediate_size"),
        num_shared_experts=1,
        router=RouterConfig(
            top_k=settings.integer("num_experts_per_tok"),
            scores="sigmoid",
            normalize_gates=False,
            gates_on="inputs",
            load_balance_weight=settings.number("router_aux_loss_coef", default=1e-3),
            z_loss_weight=0.0,
        ),
    )
    dense = DenseConfig(d_ff=settings.integer("intermediate_size_mlp"))
    count = config_sections.read_num_layers(settings)
    with_experts = _read_moe_layers(settings, count)
    layers = [
        LayerSpec(attention=attention, ffn=moe if i in with_experts else dense)
        for i, attention in enumerate(_read_attentions(settings, count))
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _read_moe_layers(settings: Settings, count: int) -> list[int]:
    every = settings.integer("interleave_moe_layer_step", default=1)
    default = list(range(every - 1, count, every))
    return settings.items("moe_layers", of=int, default=default)


def _read_attentions(settings: Settings, count: int) -> list[AttentionConfig]:
    """Each layer's: with RoPE or without, in chunks or whole."""
    every = settings.integer("no_rope_layer_interval", default=4)
    default = [int((i + 1) % every != 0) for i in range(count)]
    places = settings.items("no_rope_layers", of=int, default=default) or default
    kinds = [CHUNKS if has_rope else WHOLE for has_rope in places]
    kinds = settings.items("layer_types", of=str, default=kinds)
    known = set(places) <= {0, 1} and set(kinds) <= {CHUNKS, WHOLE}
    if len(places) < count or len(kinds) < count or not known:
        raise UserError(
            f"{settings.where} has no_rope_layers={places} and layer_types={kinds}, expected 1 or "
            f"0, and {CHUNKS!r} or {WHOLE!r}, for each of num_hidden_layers={count}"
        )
    size = settings.integer("attention_chunk_size", default=None)
    if size is None and CHUNKS in kinds[:count]:
        raise UserError(
            f"{settings.where} has {CHUNKS!r} in layer_types and no attention_chunk_size: it must "
            "say how many tokens a chunk holds"
        )
    turned, still = _read_turned(settings), _read_still(settings)
    return [
        dataclasses.replace(
            turned if has_rope else still, chunk_size=size if kind == CHUNKS else None
        )
        for has_rope, kind in zip(places[:count], kinds[:count], strict=True)
    ]


def _read_turned(settings: Settings) -> AttentionConfig:
    """The attention of layers with RoPE."""
    is_normed = settings.flag("use_qk_norm", default=True)
    return config_sections.read_grouped_query(
        settings,
        rope_base=BASE,
        qk_norm="head_unscaled" if is_normed else None,
        qk_norm_after_rope=is_normed,
    )


def _read_still(settings: Settings) -> AttentionConfig:
    """That of layers without."""
    temperature = None
    if settings.flag("attn_temperature_tuning", default=True):
        temperature = QueryTemperatureConfig(
            growth=settings.number("attn_scale"),
            length=settings.integer("floor_scale"),
            counts_itself=True,
        )
    return dataclasses.replace(
        _read_turned(settings),
        rotary_dim=0,
        rope_base=10_000.0,
        rope_scaling=None,
        qk_norm=None,
        qk_norm_after_rope=False,
        query_temperature=temperature,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    moe = config_sections.the_moe(config)
    attentions = config_sections.grouped_queries(config)
    ffns = [layer.ffn for layer in config_sections.unfolded(config)]
    dense = [ffn for ffn in ffns if isinstance(ffn, DenseConfig)]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    turned = [_bare(each) for each in attentions if each.rotary_dim != 0]
    attention = config_sections.the_one(turned, "attention with RoPE")
    sizes = [each.chunk_size for each in attentions if each.chunk_size is not None]
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.write_softmax_router(moe.router),
        **_write_temperature([each for each in attentions if each.rotary_dim == 0]),
        "num_local_experts": moe.num_experts,
        "intermediate_size": moe.d_ff,
        "intermediate_size_mlp": width,
        "moe_layers": [i for i, ffn in enumerate(ffns) if isinstance(ffn, MoEConfig)],
        "use_qk_norm": attention.qk_norm is not None,
        "no_rope_layers": [int(each.rotary_dim != 0) for each in attentions],
        "layer_types": [WHOLE if each.chunk_size is None else CHUNKS for each in attentions],
        "attention_chunk_size": config_sections.the_one(sizes, "chunk size") if sizes else None,
        "router_jitter_noise": 0.0,
    }


def _bare(attention: AttentionConfig) -> AttentionConfig:
    return dataclasses.replace(attention, chunk_size=None)


def _write_temperature(still: list[AttentionConfig]) -> dict[str, Any]:
    temperatures = [each.query_temperature for each in still]
    if not temperatures:
        return {}
    temperature = config_sections.the_one(temperatures, "growth of queries")
    if temperature is None:
        return {"attn_temperature_tuning": False}
    return {
        "attn_temperature_tuning": True,
        "attn_scale": temperature.growth,
        "floor_scale": temperature.length,
    }


FFN = f"{weight_maps.LAYER}.feed_forward"

LLAMA4_TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.NORMS,
        *weight_maps.grouped_query(interleaved("head_dim")),
        *weight_maps.swiglu("layers.*.ffn", FFN),
        Row("layers.*.moe.router", f"{FFN}.router.weight", "e d -> d e"),
        Row("layers.*.moe.gate_up", f"{FFN}.experts.gate_up_proj", "e d (i f) -> e d i f"),
        Row("layers.*.moe.down", f"{FFN}.experts.down_proj", "e f d -> e f d"),
        *weight_maps.swiglu("layers.*.moe.shared", f"{FFN}.shared_expert"),
    ),
    gguf=GGUF(
        "llama4",
        gguf_weight_maps.LLAMA4,
        (
            *gguf_pairs.renamed(gguf_pairs.GROUPED, intermediate_size="intermediate_size_mlp"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "intermediate_size"),
            (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts"),
        ),
        fixed={"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
        sections=(gguf_sections.HEADS, gguf_layers.LLAMA4),
    ),
)
LLAMA4 = text_part.beside_encoders("llama4", "Llama4ForConditionalGeneration", LLAMA4_TEXT)
