"""DeepSeek-V4 (2026): attention over a window and compressed entries, several residual streams,
first layers whose experts a table names.

transformers writes layers by their released names, and the rest by its own; files may have either.
"""

from collections.abc import Sequence
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, rope_section, weight_maps
from checkpoint.families.base import Family
from checkpoint.families.lfm2 import swiglu
from checkpoint.families.weight_maps import LAYER
from checkpoint.weight_map import Row, interleaved
from configs.architecture import HyperConnectionConfig, LayerSpec, ModelConfig
from configs.checks import UserError
from configs.compressed_attention import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
)
from configs.feed_forward import MoEConfig, RouterConfig

DEFAULTS = {
    "vocab_size": 129_280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "num_experts_per_tok": 6,
    "n_routed_experts": 256,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1_048_576,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
}
"""Values of transformers\' DeepseekV4Config for keys that a config.json leaves out."""

WINDOW, SPARSE, HEAVY = KINDS = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
RATIOS = {0: WINDOW, 4: SPARSE, 128: HEAVY}
"""compress_ratios, which released files have instead of layer_types."""
OWN_RATES = {SPARSE: 4, HEAVY: 128}
BY_TOKEN, BY_SCORES = "hash_moe", "moe"
HASH_LAYERS = 3
SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
MAIN_BASE, COMPRESS_BASE = 10_000.0, 160_000.0
TURNED_SHARE = 64 / 512


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    attentions = {kind: _read_attention(settings, kind) for kind in KINDS}
    ffns = {kind: _read_experts(settings, kind) for kind in (BY_TOKEN, BY_SCORES)}
    layers = [
        LayerSpec(attention=attentions[attention], ffn=ffns[ffn])
        for attention, ffn in zip(
            _read_kinds(settings, count), _read_ffn_kinds(settings, count), strict=True
        )
    ]
    streams = HyperConnectionConfig(
        num_streams=settings.integer("hc_mult", default=4),
        sinkhorn_steps=settings.integer("hc_sinkhorn_iters", default=20),
        eps=settings.number("hc_eps", default=1e-6),
    )
    return config_sections.read_model(settings, layers, norm_eps=1e-6, hyper_connections=streams)


def _read_kinds(settings: Settings, count: int) -> list[str]:
    """layer_types, or compress_ratios; where there is neither, the first two and then every other
    layer compress heavily."""
    default = [SPARSE if i >= 2 and i % 2 else HEAVY for i in range(count)]
    ratios = settings.items("compress_ratios", of=int, default=None)
    if ratios is not None and settings.items("layer_types", of=str, default=None) is None:
        default = [RATIOS.get(ratio, str(ratio)) for ratio in ratios[:count]]
    return _checked(settings, "layer_types", default, KINDS, count)


def _read_ffn_kinds(settings: Settings, count: int) -> list[str]:
    hashed = settings.integer("num_hash_layers", default=HASH_LAYERS, least=0)
    default = [BY_TOKEN if i < hashed else BY_SCORES for i in range(count)]
    return _checked(settings, "mlp_layer_types", default, (BY_TOKEN, BY_SCORES), count)


def _checked(
    settings: Settings, name: str, default: list[str], known: Sequence[str], count: int
) -> list[str]:
    kinds = settings.items(name, of=str, default=default)[:count]
    if len(kinds) != count or not set(kinds) <= set(known):
        raise UserError(
            f"{settings.where} has {name}={kinds}, expected {' or '.join(map(repr, known))} for "
            f"each of num_hidden_layers={count}"
        )
    return kinds


def _read_attention(settings: Settings, kind: str) -> CompressedAttentionConfig:
    settings.expect("num_key_value_heads", 1)
    settings.expect("attention_bias", False)
    width = settings.integer("head_dim")
    base, scaling, share = _read_rope(settings, "main" if kind == WINDOW else "compress")
    return CompressedAttentionConfig(
        num_heads=settings.integer("num_attention_heads"),
        query_rank=settings.integer("q_lora_rank"),
        head_dim=width,
        rotary_dim=int(width * share),
        window_size=settings.integer("sliding_window"),
        compression=_read_compression(settings, kind),
        num_output_groups=settings.integer("o_groups"),
        output_rank=settings.integer("o_lora_rank"),
        rope_base=base,
        rope_scaling=scaling,
    )


def _read_compression(settings: Settings, kind: str) -> CompressionConfig | None:
    if kind == WINDOW:
        return None
    older = {SPARSE: "compress_rate_csa", HEAVY: "compress_rate_hca"}[kind]
    rates = settings.part("compress_rates")
    own = OWN_RATES[kind] if rates is None else rates.integer(kind, default=OWN_RATES[kind])
    rate = settings.integer(older, default=own)
    if kind == HEAVY:
        return CompressionConfig(rate=rate)
    indexer = EntryIndexerConfig(
        num_heads=settings.integer("index_n_heads"),
        head_dim=settings.integer("index_head_dim"),
        top_k=settings.integer("index_topk"),
    )
    return CompressionConfig(rate=rate, overlaps=True, indexer=indexer)


def _read_rope(settings: Settings, part: str) -> tuple[float, Any, float]:
    """Base, scaling and the share of a head that is turned, of windows ("main") or of layers that
    compress. RoPE's keys in one object are about the latter, whose attention_factor then is 1."""
    base, key = {
        "main": (MAIN_BASE, "rope_theta"),
        "compress": (COMPRESS_BASE, "compress_rope_theta"),
    }[part]
    base = settings.number(key, default=base)
    share = settings.number("partial_rotary_factor", default=None)
    if share is None:
        turned = settings.integer("qk_rope_head_dim", default=None)
        share = TURNED_SHARE if turned is None else turned / settings.integer("head_dim")
    given = rope_section.rope_keys(settings)
    nested = None if given is None else (given.part("main"), given.part("compress"))
    if given is not None and nested is not None and None not in nested:
        own = given.part(part)
        assert own is not None
        values = {"partial_rotary_factor": 1.0, **own.values}
    else:
        values = {"rope_type": "default"}
        if given is not None and part == "compress":
            values = {k: v for k, v in given.values.items() if k not in ("main", "compress")}
            values |= {} if "attention_factor" in values else _flat_factor(given)
        values |= {"rope_theta": base, "partial_rotary_factor": share}
    length = settings.integer("max_position_embeddings")
    where = settings.where if given is None else given.where
    inside = Settings({"rope_parameters": values, "max_position_embeddings": length}, where)
    share = rope_section.read_turned_share(inside, 1.0)
    base, scaling = rope_section.read_rope(inside, base, turned_share=share, is_on_sines=True)
    return base, scaling, share


def _flat_factor(given: Settings) -> dict[str, Any]:
    is_yarn = given.text("rope_type", "type", default="default") == "yarn"
    return {"attention_factor": 1.0} if is_yarn else {}


def _read_experts(settings: Settings, kind: str) -> MoEConfig:
    settings.expect("norm_topk_prob", True)
    settings.expect("n_shared_experts", 1)
    scores: Any = SCORES[
        settings.text("scoring_func", choices=tuple(SCORES), default="sqrtsoftplus")
    ]
    is_free = kind == BY_SCORES
    router = RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        scores=scores,
        choice="scores" if is_free else "token",
        gate_scale=settings.number("routed_scaling_factor"),
        balance="loss_free" if is_free else "none",
        bias_rate=1e-3 if is_free else None,
        load_balance_weight=0.0,
        sequence_weight=1e-4 if is_free else 0.0,
        z_loss_weight=0.0,
    )
    return MoEConfig(
        num_experts=settings.integer("n_routed_experts", "num_local_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        num_shared_experts=1,
        router=router,
        activation="bounded_swiglu",
        swiglu_limit=settings.number("swiglu_limit"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    attentions = [x.attention for x in layers if isinstance(x.attention, CompressedAttentionConfig)]
    streams = config.hyper_connections
    if len(attentions) != len(layers) or streams is None:
        kinds = sorted({layer.attention.kind for layer in layers})
        raise UserError(
            "this family has attention.kind='compressed' and hyper_connections, the model has "
            f"{', '.join(kinds)} and hyper_connections={streams}"
        )
    kinds = [_kind_of(each) for each in attentions]
    return {
        **config_sections.write_model(config),
        **_write_attentions(dict(zip(kinds, attentions, strict=True)), kinds),
        **_write_experts(layers),
        "hc_mult": streams.num_streams,
        "hc_sinkhorn_iters": streams.sinkhorn_steps,
        "hc_eps": streams.eps,
        "num_nextn_predict_layers": 0,
    }


def _kind_of(attention: CompressedAttentionConfig) -> str:
    c = attention.compression
    if c is None:
        return WINDOW
    return HEAVY if c.indexer is None else SPARSE


def _write_attentions(
    by_kind: dict[str, CompressedAttentionConfig], kinds: list[str]
) -> dict[str, Any]:
    one = next(iter(by_kind.values()))
    rates, indexer = dict(OWN_RATES), None
    for kind, each in by_kind.items():
        if each.compression is not None:
            rates[kind], indexer = each.compression.rate, each.compression.indexer or indexer
    values: dict[str, Any] = {
        "num_attention_heads": one.num_heads,
        "num_key_value_heads": 1,
        "head_dim": one.head_dim,
        "q_lora_rank": one.query_rank,
        "qk_rope_head_dim": one.rotary_dim,
        "partial_rotary_factor": one.rotary_dim / one.head_dim,
        "sliding_window": one.window_size,
        "attention_bias": False,
        "o_groups": one.num_output_groups,
        "o_lora_rank": one.output_rank,
        "layer_types": kinds,
        "compress_rates": rates,
        "compress_ratios": [rates.get(kind, 0) for kind in kinds],
        **_write_rope(by_kind),
    }
    if indexer is not None:
        names = ("index_n_heads", "index_head_dim", "index_topk")
        own = (indexer.num_heads, indexer.head_dim, indexer.top_k)
        values |= dict(zip(names, own, strict=True))
    return values


def _write_rope(by_kind: dict[str, CompressedAttentionConfig]) -> dict[str, Any]:
    """What a model has no layers of has the family's own base."""
    any_one = next(iter(by_kind.values()))
    parts = {}
    for part, base, kinds in (
        ("main", MAIN_BASE, (WINDOW,)),
        ("compress", COMPRESS_BASE, (SPARSE, HEAVY)),
    ):
        own = next((by_kind[kind] for kind in kinds if kind in by_kind), None)
        scaling = None if own is None else own.rope_scaling
        written = rope_section.write_rope(
            base if own is None else own.rope_base, scaling, is_on_sines=True
        )
        turned = own or any_one
        share = {"partial_rotary_factor": turned.rotary_dim / turned.head_dim}
        parts[part] = written["rope_parameters"] | share
    return {
        "rope_parameters": parts,
        "rope_theta": parts["main"]["rope_theta"],
        "compress_rope_theta": parts["compress"]["rope_theta"],
    }


def _write_experts(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    found = [layer.ffn for layer in layers if isinstance(layer.ffn, MoEConfig)]
    if len(found) != len(layers):
        raise UserError("this family has experts in all layers, the model has dense ones")
    moe = found[-1]
    named = {name: score for score, name in SCORES.items()}
    is_free = [each.router.choice == "scores" for each in found]
    if moe.router.scores not in named:
        raise UserError(
            f"this family has router.scores {' or '.join(named)}, the model has "
            f"{moe.router.scores!r}"
        )
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.d_ff,
        "num_experts_per_tok": moe.router.top_k,
        "routed_scaling_factor": moe.router.gate_scale,
        "norm_topk_prob": moe.router.normalize_gates,
        "scoring_func": named[moe.router.scores],
        "swiglu_limit": moe.swiglu_limit,
        "mlp_layer_types": [BY_SCORES if each else BY_TOKEN for each in is_free],
        "num_hash_layers": is_free.index(True) if True in is_free else len(is_free),
    }


MIXER, ATTENTION, FFN = "layers.*.attention", f"{LAYER}.attn", f"{LAYER}.ffn"
TURNED = interleaved("rotary_dim")


def _compressor(parameter: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{parameter}.kv", f"{name}.wkv.weight", "(s c) d -> d s c", TURNED),
        Row(f"{parameter}.gate", f"{name}.wgate.weight", "(s c) d -> d s c", TURNED),
        Row(f"{parameter}.place_bias", f"{name}.ape", "m (s c) -> m s c", TURNED),
        Row(f"{parameter}.norm.scale", f"{name}.norm.weight", "c -> c", TURNED),
    )


def _streams(parameter: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{parameter}.mix", f"{name}fn", "k (n d) -> n d k"),
        Row(f"{parameter}.bias", f"{name}base", "k -> k"),
        Row(f"{parameter}.scale", f"{name}scale", "k -> k"),
    )


ROWS = (
    Row("embedding", "model.embed_tokens.weight", "v d -> v d"),
    Row("output", "head.weight", "v d -> d v"),
    Row("final_norm.scale", "model.norm.weight", "d -> d"),
    *_streams("final_streams", "model.hc_head.hc_"),
    Row("layers.*.attention_norm.scale", f"{LAYER}.attn_norm.weight", "d -> d"),
    Row("layers.*.ffn_norm.scale", f"{LAYER}.ffn_norm.weight", "d -> d"),
    *_streams("layers.*.attention_streams", f"{LAYER}.hc_attn_"),
    *_streams("layers.*.ffn_streams", f"{LAYER}.hc_ffn_"),
    Row(f"{MIXER}.q_down", f"{ATTENTION}.wq_a.weight", "q d -> d q"),
    Row(f"{MIXER}.q_norm.scale", f"{ATTENTION}.q_norm.weight", "q -> q"),
    Row(f"{MIXER}.q", f"{ATTENTION}.wq_b.weight", "(h c) q -> q h c", TURNED),
    Row(f"{MIXER}.kv", f"{ATTENTION}.wkv.weight", "c d -> d c", TURNED),
    Row(f"{MIXER}.kv_norm.scale", f"{ATTENTION}.norm.weight", "c -> c", TURNED),
    Row(f"{MIXER}.sink_logits", f"{ATTENTION}.attn_sink", "h -> h"),
    Row(f"{MIXER}.o_down", f"{ATTENTION}.wo_a.weight", "(g r) (k c) -> g k c r", TURNED),
    Row(f"{MIXER}.o_up", f"{ATTENTION}.wo_b.weight", "d (g r) -> g r d"),
    *_compressor(f"{MIXER}.compressor", f"{ATTENTION}.compressor"),
    Row(f"{MIXER}.indexer.q", f"{ATTENTION}.indexer.wq_b.weight", "(h c) q -> q h c", TURNED),
    Row(f"{MIXER}.indexer.weights", f"{ATTENTION}.indexer.weights_proj.weight", "h d -> d h"),
    *_compressor(f"{MIXER}.indexer.compressor", f"{ATTENTION}.indexer.compressor"),
    Row("layers.*.moe.router", f"{FFN}.gate.weight", "e d -> d e"),
    Row("layers.*.moe.state.bias_E", f"{FFN}.gate.bias", "e -> e"),
    Row("layers.*.moe.token_experts", f"{FFN}.gate.tid2eid", "v k -> v k"),
    *weight_maps.experts(f"{FFN}.experts.{{e}}", "w1", "w3", "w2"),
    *swiglu("layers.*.moe.shared", f"{FFN}.shared_experts"),
)

DEEPSEEK_V4 = Family(
    model_type="deepseek_v4",
    architecture="DeepseekV4ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=ROWS,
    unread=((r"mtp\..*", "multi-token modules"),),
    renames=(
        (r"^(layers\.|norm\.)", r"model.\1"),
        (r"^embed\.", "model.embed_tokens."),
        (r"^lm_head\.", "head."),
        (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    ),
)
