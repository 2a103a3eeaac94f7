"""Gemma 3 (2025), its text model: heads normed, five layers of six with a window and a RoPE of
their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_rope, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import (
    config_sections,
    gemma,
    gemma2,
    rope_section,
    text_part,
    weight_maps,
    windows,
)
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""Values of transformers\' Gemma3TextConfig for keys that a config.json leaves out."""

BASES = {windows.WHOLE: 1_000_000.0, windows.WINDOW: 10_000.0}
OLDER_KEYS = {windows.WHOLE: "rope_theta", windows.WINDOW: "rope_local_base_freq"}
"""What says the base where rope_parameters doesn't."""


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    every = settings.integer("sliding_window_pattern", default=6)
    default = [windows.WINDOW if (i + 1) % every else windows.WHOLE for i in range(count)]
    settings.expect("attn_logit_softcapping", None)  # transformers' own layers don't read it
    layers = [
        LayerSpec(
            attention=_read_attention(settings, size),
            ffn=gemma.read_ffn(settings),
            norms="sandwich",
        )
        for size in windows.read(settings, default)
    ]
    return gemma.read_model(
        settings, layers, gemma2.ACTIVATION_KEY, logit_cap=gemma2.read_logit_cap(settings)
    )


def _read_attention(settings: Settings, window_size: int | None) -> AttentionConfig:
    kind = windows.WHOLE if window_size is None else windows.WINDOW
    attention = config_sections.read_grouped_query(
        with_rope_of(settings, kind, BASES[kind], OLDER_KEYS[kind]),
        qk_norm="head",
        zero_centered_qk_norm=True,
        window_size=window_size,
    )
    return gemma2.with_score_scale(settings, attention)


def with_rope_of(settings: Settings, kind: str, base: float, older_key: str) -> Settings:
    """The settings of one kind of layer, RoPE's as those of one rotation for all.

    Args:
      base: the family's, where neither rope_parameters nor `older_key` says it.
    Raises:
      UserError: rope_parameters are not told by kind of layer.
    """
    nested = settings.part("rope_parameters")
    by_kind: Mapping[str, Any] = {} if nested is None else nested.values
    others = set(by_kind) - {windows.WHOLE, windows.WINDOW}
    if others:
        raise UserError(
            f"{settings.where} has {', '.join(sorted(others))} in rope_parameters, expected "
            f"{windows.WHOLE!r} and {windows.WINDOW!r} alone: each kind of layer turns by its own"
        )
    own = {k: v for k, v in settings.values.items() if k not in ROPE_KEYS}
    found = settings if nested is None else nested
    rope = {"rope_type": "default", **(_part(found, kind) if nested is not None else {})}
    if kind == windows.WHOLE:
        rope |= _part(settings, "rope_scaling")
    rope.setdefault("rope_theta", settings.number(older_key, default=base))
    return Settings({**own, "rope_parameters": rope}, settings.where, settings.defaults)


ROPE_KEYS = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters")


def _part(settings: Settings, name: str) -> Mapping[str, Any]:
    part = settings.part(name)
    return {} if part is None else part.values


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = config_sections.grouped_queries(config)
    first = _without_kind(attentions[0])
    config_sections.the_one([_without_kind(each) for each in attentions], "attention")
    written = config_sections.write_grouped_query(first)
    return {
        **config_sections.write_model(config, gemma2.ACTIVATION_KEY),
        **{k: v for k, v in written.items() if k not in ROPE_KEYS},
        **windows.write([each.window_size for each in attentions], unused=4096),
        **gemma2.write_score_scale(first),
        "rope_parameters": write_ropes(attentions),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.logit_cap,
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


def _without_kind(attention: AttentionConfig) -> AttentionConfig:
    """The attention without what its kind of layer has for itself."""
    return dataclasses.replace(
        attention, window_size=None, num_sink_tokens=0, rope_base=10_000.0, rope_scaling=None
    )


def write_ropes(attentions: list[AttentionConfig]) -> dict[str, Any]:
    """rope_parameters of each kind of layer; the family's base for a kind that no layer has."""
    ropes: dict[str, Any] = {}
    for kind, default in BASES.items():
        own = [
            (each.rope_base, each.rope_scaling)
            for each in attentions
            if (each.window_size is None) == (kind == windows.WHOLE)
        ] or [(default, None)]
        base, scaling = config_sections.the_one(own, "RoPE for each kind of layer")
        ropes[kind] = rope_section.write_rope(base, scaling)["rope_parameters"]
    return ropes


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*gemma2.GEMMA2.rows, *weight_maps.QK_NORM),
    gguf=GGUF(
        "gemma3",
        gguf_weight_maps.GEMMA3,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping"),
        ),
        fixed={gemma2.ACTIVATION_KEY: "gelu_pytorch_tanh"},
        sections=(
            gguf_sections.HEADS,
            gguf_layers.windows(period=6),
            gguf_layers.query_scalar(layers_of_largest=62),
            gguf_rope.by_kind("gemma3", BASES[windows.WINDOW]),
        ),
    ),
)
GEMMA3_ENCODERS = text_part.beside_encoders("gemma3", "Gemma3ForConditionalGeneration", GEMMA3)
