"""What families on gated delta nets share: which layers have one, its settings, its tensors.

D d_model, G heads of keys, H heads of values, K width of a key, V of a value, T taps, N channels of
the convolution.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections
from checkpoint.families.weight_maps import ATTENTION, LAYER
from checkpoint.weight_map import Row, Span
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention, AttentionConfig
from configs.checks import UserError
from configs.recurrent_attention import GatedDeltaConfig

LINEAR, FULL = "linear_attention", "full_attention"
EVERY = 4
"""Of so many layers the last has attention over everything, where a config doesn't say."""


def read_kinds(settings: Settings, default: Sequence[str]) -> list[str]:
    """layer_types: a delta net or attention over everything, for each layer."""
    kinds = settings.items("layer_types", of=str, default=list(default))
    if len(kinds) != len(default) or not set(kinds) <= {LINEAR, FULL}:
        raise UserError(
            f"{settings.where} has layer_types={kinds}, expected {LINEAR!r} or {FULL!r} for each "
            f"of num_hidden_layers={len(default)}"
        )
    return kinds


def every_nth(settings: Settings) -> list[str]:
    """layer_types of a config that has none, as Qwen counts them."""
    every = settings.integer("full_attention_interval", default=EVERY)
    count = config_sections.read_num_layers(settings)
    return [LINEAR if (i + 1) % every else FULL for i in range(count)]


def read_delta(settings: Settings, **extra: Any) -> GatedDeltaConfig:
    heads = settings.integer("linear_num_value_heads")
    key_heads = settings.integer("linear_num_key_heads")
    return GatedDeltaConfig(
        num_heads=heads,
        num_key_heads=None if key_heads == heads else key_heads,
        key_head_dim=settings.integer("linear_key_head_dim"),
        value_head_dim=settings.integer("linear_value_head_dim"),
        conv_width=settings.integer("linear_conv_kernel_dim"),
        **extra,
    )


def read_gated_attention(settings: Settings) -> AttentionConfig:
    """Attention over everything as Qwen has it beside delta nets."""
    return config_sections.read_grouped_query(
        settings,
        turned_share=0.25,
        qk_norm="head",
        zero_centered_qk_norm=True,
        output_gate=True,
    )


def with_attentions(
    layers: Sequence[LayerSpec], kinds: Sequence[str], delta: Attention
) -> list[LayerSpec]:
    """The layers, those of the kind LINEAR with a delta net instead of their attention."""
    return [
        dataclasses.replace(layer, attention=delta) if kind == LINEAR else layer
        for layer, kind in zip(layers, kinds, strict=True)
    ]


def write_layers(config: ModelConfig) -> dict[str, Any]:
    """Both kinds of attention and where they are; nothing of a kind that no layer has.

    Raises:
      UserError: layers of one kind differ, or there are other kinds.
    """
    attentions = [layer.attention for layer in config_sections.unfolded(config)]
    found: dict[str, Any] = {"layer_types": [_kind(each) for each in attentions]}
    deltas = [each for each in attentions if isinstance(each, GatedDeltaConfig)]
    if deltas:
        found |= _write_delta(config_sections.the_one(deltas, "gated delta net"))
    full = [each for each in attentions if isinstance(each, AttentionConfig)]
    if full:
        one = config_sections.the_one(full, "attention over everything")
        found |= config_sections.write_grouped_query(one)
    return found


def _kind(attention: Attention) -> str:
    if isinstance(attention, GatedDeltaConfig):
        return LINEAR
    if not isinstance(attention, AttentionConfig):
        raise UserError(
            "this family has attention.kind='gated_delta' and 'grouped_query', the model has "
            f"{attention.kind!r}"
        )
    return FULL


def _write_delta(delta: GatedDeltaConfig) -> dict[str, Any]:
    return {
        "linear_num_value_heads": delta.num_heads,
        "linear_num_key_heads": delta.num_key_heads or delta.num_heads,
        "linear_key_head_dim": delta.key_head_dim,
        "linear_value_head_dim": delta.value_head_dim,
        "linear_conv_kernel_dim": delta.conv_width,
    }


def delta_of(layer: LayerSpec) -> GatedDeltaConfig:
    assert isinstance(layer.attention, GatedDeltaConfig)
    return layer.attention


def _parts_of_groups(layer: LayerSpec, widths: Sequence[int]) -> list[np.ndarray]:
    """Rows of a tensor that has parts of these widths side by side for each head of keys: of every
    part its rows, head by head."""
    groups = delta_of(layer).num_key_heads or delta_of(layer).num_heads
    rows_GW = np.arange(groups * sum(widths)).reshape(groups, -1)
    return [part.reshape(-1) for part in np.split(rows_GW, np.cumsum(widths)[:-1], axis=1)]


def _qkvz(layer: LayerSpec) -> list[np.ndarray]:
    c = delta_of(layer)
    values = c.out_width * c.key_head_dim // c.key_width
    return _parts_of_groups(layer, (c.key_head_dim, c.key_head_dim, values, values))


def _beta_and_decay(layer: LayerSpec) -> list[np.ndarray]:
    c = delta_of(layer)
    heads = c.num_heads * c.key_head_dim // c.key_width
    return _parts_of_groups(layer, (heads, heads))


NET = f"{LAYER}.linear_attn"
IN_DELTA = "layers.*.attention.log_rate"
"""A parameter that every delta net has, and no other attention."""

CORE = (
    Row("layers.*.attention.conv", f"{NET}.conv1d.weight", "n u t -> t n"),
    Row("layers.*.attention.decay_bias", f"{NET}.dt_bias", "h -> h 0"),
    Row(IN_DELTA, f"{NET}.A_log", "h -> h"),
    Row("layers.*.attention.norm.scale", f"{NET}.norm.weight", "c -> c"),
    Row(
        "layers.*.attention.o",
        f"{NET}.out_proj.weight",
        "d (h c) -> h c d",
        requires=IN_DELTA,
    ),
)
"""Of Qwen's nets, whatever form their projections have."""

FUSED_PROJECTIONS = (
    Row(
        "layers.*.attention.qkv",
        f"{NET}.in_proj_qkvz.weight",
        "n d -> d n",
        rows=lambda layer: np.concatenate(_qkvz(layer)[:3]),
    ),
    Row(
        "layers.*.attention.gate",
        f"{NET}.in_proj_qkvz.weight",
        "(h c) d -> d h c",
        requires=IN_DELTA,
        rows=lambda layer: _qkvz(layer)[3],
    ),
    Row(
        "layers.*.attention.beta",
        f"{NET}.in_proj_ba.weight",
        "h d -> d h",
        rows=lambda layer: _beta_and_decay(layer)[0],
    ),
    Row(
        "layers.*.attention.decay",
        f"{NET}.in_proj_ba.weight",
        "h d -> d h 0",
        rows=lambda layer: _beta_and_decay(layer)[1],
    ),
)
"""Qwen3-Next's: queries, keys, values and gates of a head of keys side by side."""

SEPARATE_PROJECTIONS = (
    Row("layers.*.attention.qkv", f"{NET}.in_proj_qkv.weight", "n d -> d n"),
    Row(
        "layers.*.attention.gate",
        f"{NET}.in_proj_z.weight",
        "(h c) d -> d h c",
        requires=IN_DELTA,
    ),
    Row("layers.*.attention.beta", f"{NET}.in_proj_b.weight", "h d -> d h"),
    Row("layers.*.attention.decay", f"{NET}.in_proj_a.weight", "h d -> d h 0"),
)
"""Qwen3.5's."""


def _queries(layer: LayerSpec) -> np.ndarray:
    return _halves(layer)[:, 0].reshape(-1)


def _gates(layer: LayerSpec) -> np.ndarray:
    return _halves(layer)[:, 1].reshape(-1)


def _halves(layer: LayerSpec) -> np.ndarray:
    """Rows of a projection that has each head's queries, then its gates: [H, 2, C]."""
    c = layer.attention
    assert isinstance(c, AttentionConfig)
    return np.arange(2 * c.out_width).reshape(c.num_heads, 2, c.head_dim)


_GATE = "layers.*.attention.gate"


def gated_query(table: Sequence[Row], query: str = f"{ATTENTION}.q_proj") -> tuple[Row, ...]:
    """The rows of grouped-query attention whose queries and gates have one projection.

    Args:
      table: without gates.
      query: what the projection's names begin with.
    """
    gated = (
        Row("layers.*.attention.q", f"{query}.weight", "(h c) d -> d h c", rows=_queries),
        Row(
            _GATE,
            f"{query}.weight",
            "(h c) d -> d h c",
            requires="layers.*.attention.q",
            rows=_gates,
        ),
        Row("layers.*.attention.q_bias", f"{query}.bias", "(h c) -> h c", rows=_queries),
        Row("layers.*.attention.gate_bias", f"{query}.bias", "(h c) -> h c", rows=_gates),
    )
    replaced = {row.parameter for row in gated}
    return (*gated, *(row for row in beside_delta(table) if row.parameter not in replaced))


def beside_delta(table: Sequence[Row]) -> tuple[Row, ...]:
    """The rows of an attention's table as they hold where other layers have delta nets."""
    return tuple(dataclasses.replace(row, unless=IN_DELTA) for row in table)


def separate(projection: str, convolution: str, pattern: str = "n u t -> t n") -> tuple[Row, ...]:
    """Queries, keys and values with a projection and a convolution each.

    Args:
      projection, convolution: the tensors' names, with {x} for q, k and v.
      pattern: of the convolution.
    """
    parts = [(x, _channels(i)) for i, x in enumerate("qkv")]
    qkv, conv = "layers.*.attention.qkv", "layers.*.attention.conv"
    return (
        *(Row(qkv, projection.format(x=x), "n d -> d n", span=span) for x, span in parts),
        *(Row(conv, convolution.format(x=x), pattern, span=span) for x, span in parts),
    )


def _channels(part: int) -> Callable[[LayerSpec], Span]:
    """Those of the queries (0), keys (1) or values (2) among what the convolution reads."""

    def span(layer: LayerSpec) -> Span:
        c = delta_of(layer)
        ends = (0, c.key_width, 2 * c.key_width, c.conv_channels)
        return Span(ends[part], ends[part + 1])

    return span
