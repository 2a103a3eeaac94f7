"""Gemma 4 (2026), text, dense (31B, E2B, E4B) and with experts (26B-A4B): values normed, whole
layers with heads of their own and values of the keys' projection, a dense layer beside the experts;
in the E models embeddings for each layer, and keys and values that the last layers take from
earlier ones.
"""

import dataclasses
from typing import Any

from checkpoint import gguf_rope
from checkpoint.config_reader import Settings
from checkpoint.families import (
    config_sections,
    gemma,
    gemma2,
    gemma3,
    gemma4_gguf,
    rope_section,
    text_part,
    weight_maps,
    windows,
)
from checkpoint.families.base import Family
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from configs.shared_keys import shares_keys

DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
"""Values of transformers\' Gemma4TextConfig for keys that a config.json leaves out."""

GLOBAL_HEAD_DIM = 512
ROPE = {
    windows.WINDOW: {"rope_type": "default", "rope_theta": 10_000.0},
    windows.WHOLE: {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
"""rope_parameters where a config.json has none."""


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    default = [windows.WINDOW if (i + 1) % 6 else windows.WHOLE for i in range(count)]
    default[-1] = windows.WHOLE
    sizes = windows.read(settings, default)
    if sizes[-1] is not None:
        raise UserError(
            f"{settings.where} has {windows.WINDOW!r} for the last of layer_types, which is "
            f"{windows.WHOLE!r} whatever it says: say so"
        )
    first_sharing = _read_first_sharing(settings, sizes)
    moe = _read_moe(settings)
    layers = []
    for i, size in enumerate(sizes):
        dense, is_sharing = gemma.read_ffn(settings), i >= first_sharing
        if is_sharing and settings.flag("use_double_wide_mlp", default=False):
            dense = dataclasses.replace(dense, d_ff=2 * dense.d_ff)
        layers.append(
            LayerSpec(
                attention=dataclasses.replace(
                    _read_attention(settings, size, i), shares_keys=is_sharing
                ),
                ffn=dense if moe is None else moe,
                dense=None if moe is None else dense,
                norms="sandwich",
                output_scale=True,
            )
        )
    return gemma.read_model(
        settings,
        layers,
        gemma2.ACTIVATION_KEY,
        logit_cap=gemma2.read_logit_cap(settings),
        zero_centered_norms=False,
        per_layer_embeddings=_read_per_layer_embeddings(settings),
    )


def _read_per_layer_embeddings(settings: Settings) -> PerLayerEmbeddingConfig | None:
    """
    Raises:
      UserError: a table of another vocabulary than the embedding's.
    """
    width = settings.integer("hidden_size_per_layer_input", default=0, least=0)
    if not width:
        return None
    size = settings.integer("vocab_size")
    settings.expect("vocab_size_per_layer_input", size)
    return PerLayerEmbeddingConfig(width=width, activation="geglu")


def _read_first_sharing(settings: Settings, sizes: list[int | None]) -> int:
    """The first layer that takes its keys and values from the last one of its kind before.

    Raises:
      UserError: there is none of its kind.
    """
    shared = settings.integer("num_kv_shared_layers", default=0, least=0)
    first = len(sizes) - shared
    missing = [] if not shared else [x for x in sizes[first:] if x not in sizes[: max(first, 0)]]
    if first < 0 or missing:
        raise UserError(
            f"{settings.where} has num_kv_shared_layers={shared} of {len(sizes)} layers, and a "
            "layer of each kind that these have must come before them: set it lower"
        )
    return first


def _read_moe(settings: Settings) -> MoEConfig | None:
    if not settings.flag("enable_moe_block", default=False):
        return None
    router = RouterConfig(
        top_k=settings.integer("top_k_experts"),
        expert_scales=True,
        input_norm=True,
        z_loss_weight=0.0,
    )
    return MoEConfig(
        num_experts=settings.integer("num_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        activation="geglu",
        router=router,
    )


def _read_attention(settings: Settings, window_size: int | None, number: int) -> AttentionConfig:
    kind = windows.WHOLE if window_size is None else windows.WINDOW
    given = settings.part("rope_parameters")
    rope = None if given is None else given.part(kind)
    rope = Settings(ROPE[kind], settings.where) if rope is None else rope
    own = {k: v for k, v in settings.values.items() if k not in gemma3.ROPE_KEYS}
    takes_keys = window_size is None and settings.flag("attention_k_eq_v", default=False)
    heads = _read_heads(settings, number, is_whole=window_size is None, takes_keys=takes_keys)
    turned = _read_pairs(rope, heads.get("head_dim", settings.integer("head_dim")))
    shown = {k: v for k, v in rope.values.items() if k != "partial_rotary_factor" or not turned}
    if turned:
        shown["rope_type"] = "default"
    attention = config_sections.read_grouped_query(
        Settings({**own, **heads, "rope_parameters": shown}, settings.where, settings.defaults),
        rope_base=ROPE[kind]["rope_theta"],
        qk_norm="head",
        window_size=window_size,
        score_scale=1.0,
        value_norm=True,
        values_from_keys=takes_keys,
    )
    return dataclasses.replace(attention, **turned)


def _read_heads(
    settings: Settings, number: int, *, is_whole: bool, takes_keys: bool
) -> dict[str, Any]:
    """What a layer has instead of head_dim and num_key_value_heads: told layer by layer
    (per_layer_config), or for all whole layers at once.

    Raises:
      UserError: something else is told layer by layer.
    """
    by_layer = settings.part("per_layer_config")
    if by_layer is not None:
        own = by_layer.part(str(number))
        found = {} if own is None else own.values
        others = set(found) - {"head_dim", "num_key_value_heads"}
        if others:
            raise UserError(
                f"{by_layer.where} has {', '.join(sorted(others))} for layer {number}: only "
                "head_dim and num_key_value_heads of a layer's own are built"
            )
        return dict(found)
    if not is_whole:
        return {}
    heads = {"head_dim": settings.integer("global_head_dim", default=GLOBAL_HEAD_DIM)}
    groups = settings.integer("num_global_key_value_heads", default=None)
    if takes_keys and groups is not None:
        heads["num_key_value_heads"] = groups
    return heads


def _read_pairs(rope: Settings, head_dim: int) -> dict[str, Any]:
    """The settings of a "proportional" RoPE, which turns some pairs of the whole head."""
    if rope.text("rope_type", "type", default="default") != "proportional":
        return {}
    rope.expect("factor", 1.0, 1)
    share = rope.number("partial_rotary_factor", default=1.0)
    pairs = int(share * head_dim // 2)
    if not 0 < pairs < head_dim // 2:
        raise UserError(
            f"{rope.where} has partial_rotary_factor={share}, expected a number that turns some "
            f"pairs of a head of {head_dim} entries and not all"
        )
    return {"rotary_dim": 2 * pairs, "rotary_pairs": "across"}


def write_config(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    is_sharing = [shares_keys(layer.attention) for layer in layers]
    attentions = [
        dataclasses.replace(each, shares_keys=False)
        for each in config_sections.grouped_queries(config)
    ]
    local = [each for each in attentions if each.window_size is not None]
    whole = [each for each in attentions if each.window_size is None]
    one_whole = config_sections.the_one(whole, "attention without a window")
    one_local = config_sections.the_one(local, "attention with a window") if local else one_whole
    written = config_sections.write_grouped_query(
        dataclasses.replace(one_local, rotary_dim=None, rotary_pairs="within")
    )
    ffns = [layer.dense or layer.ffn for layer in layers]
    dense = config_sections.the_one(_of(ffns, is_sharing, False) or ffns, "dense layer")
    widths = [ffn.d_ff for ffn in _of(ffns, is_sharing, True)]
    is_double = bool(widths) and widths[0] == 2 * dense.d_ff
    added = config.per_layer_embeddings
    return {
        **config_sections.write_model(config, gemma2.ACTIVATION_KEY),
        **{k: v for k, v in written.items() if k not in gemma3.ROPE_KEYS},
        **windows.write([each.window_size for each in attentions], unused=512),
        **_write_moe(config),
        "rope_parameters": {
            windows.WINDOW: _write_rope(one_local) if local else ROPE[windows.WINDOW],
            windows.WHOLE: _write_rope(one_whole),
        },
        "per_layer_config": {
            str(i): _write_heads(each, one_local)
            for i, each in enumerate(attentions)
            if each.window_size is None
        },
        "global_head_dim": one_whole.head_dim,
        "num_global_key_value_heads": one_whole.num_kv_heads,
        "attention_k_eq_v": one_whole.values_from_keys,
        "final_logit_softcapping": config.logit_cap,
        "intermediate_size": dense.d_ff,
        "hidden_size_per_layer_input": 0 if added is None else added.width,
        **({} if added is None else {"vocab_size_per_layer_input": config.vocab_size}),
        "num_kv_shared_layers": sum(is_sharing),
        "use_double_wide_mlp": is_double,
    }


def _of(values: list[Any], is_sharing: list[bool], wanted: bool) -> list[Any]:
    """The values of the layers that share keys, or of the others."""
    return [value for value, sharing in zip(values, is_sharing, strict=True) if sharing == wanted]


def _write_heads(whole: AttentionConfig, local: AttentionConfig) -> dict[str, int]:
    """What a whole layer's heads have of their own."""
    heads = {"head_dim": whole.head_dim}
    if whole.num_kv_heads != local.num_kv_heads:
        heads["num_key_value_heads"] = whole.num_kv_heads
    return heads


def _write_rope(attention: AttentionConfig) -> dict[str, Any]:
    plain = rope_section.write_rope(attention.rope_base, attention.rope_scaling)["rope_parameters"]
    if attention.rotary_pairs == "within" or attention.rotary_dim is None:
        return plain
    share = gguf_rope.turned_share(attention.rotary_dim // 2, attention.head_dim)
    return plain | {"rope_type": "proportional", "partial_rotary_factor": share}


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    if all(isinstance(layer.ffn, DenseConfig) for layer in config_sections.unfolded(config)):
        return {"enable_moe_block": False}
    moe = config_sections.the_moe(config)
    return {
        "enable_moe_block": True,
        "num_experts": moe.num_experts,
        "top_k_experts": moe.router.top_k,
        "moe_intermediate_size": moe.d_ff,
    }


LAYER = weight_maps.LAYER


def unused_tensors(config: ModelConfig) -> list[str]:
    """Keys and values of layers that take another's, which released files hold all the same."""
    numbers = config_sections.sharing_layers(config)
    return [rf"model\.layers\.{i}\.self_attn\.(k_proj|v_proj|k_norm)\.weight" for i in numbers]


def _norm(parameter: str, name: str) -> Row:
    return Row(f"layers.*.{parameter}.scale", f"{LAYER}.{name}.weight", "d -> d")


GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    unused=unused_tensors,
    gguf=gemma4_gguf.GGUF_FORM,
    rows=(
        *gemma3.GEMMA3.rows,
        Row("layers.*.attention.k", f"{weight_maps.ATTENTION}.k_proj.weight", "(g c) d -> d g c"),
        Row("layers.*.output_scale", f"{LAYER}.layer_scalar", "s -> s"),
        _norm("dense_norm_after", "post_feedforward_layernorm_1"),
        _norm("moe_norm_after", "post_feedforward_layernorm_2"),
        _norm("moe_norm", "pre_feedforward_layernorm_2"),
        Row("per_layer_embeddings.table", "model.embed_tokens_per_layer.weight", "v x -> v x"),
        Row(
            "per_layer_embeddings.projection",
            "model.per_layer_model_projection.weight",
            "x d -> d x",
        ),
        Row("per_layer_embeddings.norm.scale", "model.per_layer_projection_norm.weight", "w -> w"),
        Row("layers.*.per_layer.gate", f"{LAYER}.per_layer_input_gate.weight", "w d -> d w"),
        Row("layers.*.per_layer.projection", f"{LAYER}.per_layer_projection.weight", "d w -> w d"),
        _norm("per_layer_norm", "post_per_layer_input_norm"),
        Row("layers.*.moe.router", f"{LAYER}.router.proj.weight", "e d -> d e"),
        Row("layers.*.moe.router_norm.scale", f"{LAYER}.router.scale", "d -> d"),
        Row("layers.*.moe.expert_scales", f"{LAYER}.router.per_expert_scale", "e -> e"),
        Row("layers.*.moe.gate_up", f"{LAYER}.experts.gate_up_proj", "e (i f) d -> e d i f"),
        Row("layers.*.moe.down", f"{LAYER}.experts.down_proj", "e d f -> e f d"),
    ),
)
GEMMA4 = text_part.beside_encoders("gemma4", "Gemma4ForConditionalGeneration", GEMMA4_TEXT)
