"""Gemma 4 in llama.cpp's files: heads by kind of layer, layers that read the keys of earlier ones,
and the tensors of its experts and of its embeddings for each layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_rope
from checkpoint.families import config_sections, gemma2
from checkpoint.families.base import GGUF
from checkpoint.gguf_rope import WHOLE, WINDOW
from checkpoint.gguf_sections import ATTENTION, HEAD_KEYS, LLM, ROPE, Given, Section
from checkpoint.gguf_weight_maps import (
    BLOCK,
    DENSE,
    EMBEDDING,
    EXPERTS,
    NORMS,
    POST_NORMS,
    QK_NORM,
    grouped_query,
)
from checkpoint.weight_map import Row
from configs.architecture import ModelConfig
from configs.checks import UserError

ARCHITECTURE = "gemma4"
LOGIT_CAP = 30.0
"""What llama.cpp bounds logits by where a file doesn't say; 0 there is no bound."""
WINDOW_BASE = 10_000.0
"""The base of RoPE in layers with windows where a file doesn't say it."""
WINDOW_HEAD_KEYS = (
    ATTENTION.KEY_LENGTH_SWA,
    ATTENTION.VALUE_LENGTH_SWA,
    ROPE.DIMENSION_COUNT_SWA,
)
"""Each is head_dim; `HEAD_KEYS` are global_head_dim."""


def _width(given: Given, keys: Sequence[str]) -> int:
    """The width of a head that the first of the keys tells, and the others where they are there.

    Raises:
      UserError: one tells another.
    """
    width = given.integer(keys[0])
    for key in keys[1:]:
        if given.get(key, width) != width:
            raise UserError(
                f"{given.where} has {given.name(key)}={str(given.get(key))[:60]} and heads of "
                f"width {width}: only models with one width for all of a head are built"
            )
    return width


def _read_heads(given: Given) -> dict[str, Any]:
    kinds: list[str] = given.values["layer_types"]
    has_windows = WINDOW in kinds
    whole = _width(given, HEAD_KEYS)
    widths = {WHOLE: whole, WINDOW: _width(given, WINDOW_HEAD_KEYS) if has_windows else whole}
    counts = given.by_layer(ATTENTION.HEAD_COUNT_KV)
    heads = [
        {"head_dim": widths[kind], "num_key_value_heads": count}
        for kind, count in zip(kinds, counts, strict=True)
    ]
    common = heads[kinds.index(WINDOW) if has_windows else 0]
    by_layer = {str(i): own for i, own in enumerate(heads)}
    return {**common, "global_head_dim": whole, "per_layer_config": by_layer}


def _write_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    counts = {WHOLE: values["num_global_key_value_heads"], WINDOW: values["num_key_value_heads"]}
    found = [counts[kind] for kind in values["layer_types"]]
    return {
        **dict.fromkeys(HEAD_KEYS, values["global_head_dim"]),
        **dict.fromkeys(WINDOW_HEAD_KEYS, values["head_dim"]),
        ATTENTION.HEAD_COUNT_KV: found[0] if len(set(found)) == 1 else found,
    }


HEADS = Section((*HEAD_KEYS, *WINDOW_HEAD_KEYS, ATTENTION.HEAD_COUNT_KV), _read_heads, _write_heads)


def _num_own(given: Given) -> int:
    """Layers that make their own keys: the first ones."""
    return max(0, given.num_layers - given.integer(ATTENTION.SHARED_KV_LAYERS, 0, least=0))


def _read_sharing(given: Given) -> dict[str, Any]:
    """Beside the layers that read the keys of others, whether values are the keys' projection: no
    key tells it, layers without windows then have no tensor of values.

    Raises:
      UserError: some have one.
    """
    count = _num_own(given)
    whole = [i for i, kind in enumerate(given.values["layer_types"][:count]) if kind == WHOLE]
    has_values = {f"blk.{i}.attn_v.weight" in given.tensors for i in whole}
    if len(has_values) == 2:
        raise UserError(
            f"{given.where} has attn_v.weight in some of its layers without windows and not in "
            "others: only models with values of the keys' projection in all of them or in none "
            "are built"
        )
    return {
        "num_kv_shared_layers": given.num_layers - count,
        "attention_k_eq_v": has_values == {False},
    }


def _write_sharing(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Raises:
      UserError: llama.cpp would take other layers' keys, or load no such model.
    """
    kinds: list[str] = values["layer_types"]
    shared = values["num_kv_shared_layers"]
    if WINDOW not in kinds:
        raise UserError(
            "llama.cpp's Gemma 4 has layers with windows among those without, this model has no "
            "windows: it can't be written as GGUF"
        )
    own, sharing = kinds[: len(kinds) - shared], kinds[len(kinds) - shared :]
    needed = [WINDOW, WHOLE] if WINDOW in sharing else [WHOLE]
    if sharing and own[-len(needed) :] != needed:
        raise UserError(
            "llama.cpp takes shared keys from the last two layers that make their own, one with a "
            f"window and then one without, the model's are {own[-2:]}: it can't be written as GGUF"
        )
    return {ATTENTION.SHARED_KV_LAYERS: shared}


SHARING = Section((ATTENTION.SHARED_KV_LAYERS,), _read_sharing, _write_sharing)


def _read_widths(given: Given) -> dict[str, Any]:
    """Hidden units of dense layers: twice as many in layers that read the keys of others, or as
    many in all.
    """
    widths, count = given.by_layer(LLM.FEED_FORWARD_LENGTH), _num_own(given)
    is_double = widths[count:] and widths[-1] == 2 * widths[0]
    expected = [widths[0] * (2 if is_double and i >= count else 1) for i in range(len(widths))]
    if widths != expected:
        raise UserError(
            f"{given.where} has {given.name(LLM.FEED_FORWARD_LENGTH)}={str(widths)[:60]}, expected "
            f"one number in {count} layers, and that or twice that in those that read their keys"
        )
    return {"intermediate_size": widths[0], "use_double_wide_mlp": bool(is_double)}


def _write_widths(values: Mapping[str, Any]) -> dict[str, Any]:
    width, count = values["intermediate_size"], values["num_hidden_layers"]
    if not values["use_double_wide_mlp"]:
        return {LLM.FEED_FORWARD_LENGTH: width}
    shared = values["num_kv_shared_layers"]
    return {LLM.FEED_FORWARD_LENGTH: [width] * (count - shared) + [2 * width] * shared}


WIDTHS = Section((LLM.FEED_FORWARD_LENGTH,), _read_widths, _write_widths)


def _read_cap(given: Given) -> dict[str, Any]:
    return {"final_logit_softcapping": given.get(LLM.FINAL_LOGIT_SOFTCAPPING, LOGIT_CAP) or None}


def _write_cap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {LLM.FINAL_LOGIT_SOFTCAPPING: float(values["final_logit_softcapping"] or 0.0)}


CAP = Section((LLM.FINAL_LOGIT_SOFTCAPPING,), _read_cap, _write_cap)

PAIRS = (
    *gguf_pairs.renamed(
        gguf_pairs.GROUPED,
        num_experts_per_tok="top_k_experts",
        num_key_value_heads=None,
        intermediate_size=None,
    ),
    (LLM.EXPERT_COUNT, "num_experts"),
    (LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
    (LLM.EMBD_LENGTH_PER_LAYER_INP, "hidden_size_per_layer_input"),
)


def _vector(parameter: str, name: str) -> Row:
    return Row(f"layers.*.{parameter}", f"{BLOCK}.{name}", "d -> d")


ROWS = (
    *EMBEDDING,
    *NORMS,
    *POST_NORMS,
    *grouped_query(),
    Row("layers.*.attention.k", f"{BLOCK}.attn_k.weight", "(g c) d -> d g c"),
    *QK_NORM,
    *DENSE,
    *EXPERTS,
    _vector("output_scale", "layer_output_scale.weight"),
    _vector("dense_norm_after.scale", "post_ffw_norm_1.weight"),
    _vector("moe_norm_after.scale", "post_ffw_norm_2.weight"),
    _vector("moe_norm.scale", "pre_ffw_norm_2.weight"),
    _vector("moe.router_norm.scale", "ffn_gate_inp.scale"),
    _vector("moe.expert_scales", "ffn_down_exps.scale"),
    Row("per_layer_embeddings.table", "per_layer_token_embd.weight", "v x -> v x"),
    Row("per_layer_embeddings.projection", "per_layer_model_proj.weight", "x d -> d x"),
    Row("per_layer_embeddings.norm.scale", "per_layer_proj_norm.weight", "w -> w"),
    Row("layers.*.per_layer.gate", f"{BLOCK}.inp_gate.weight", "w d -> d w"),
    Row("layers.*.per_layer.projection", f"{BLOCK}.proj.weight", "d w -> w d"),
    _vector("per_layer_norm.scale", "post_norm.weight"),
)


def unused_tensors(config: ModelConfig) -> list[str]:
    """As gemma4.unused_tensors, in llama.cpp's names."""
    numbers = config_sections.sharing_layers(config)
    return [rf"blk\.{i}\.(attn_k|attn_v|attn_k_norm)\.weight" for i in numbers]


GGUF_FORM = GGUF(
    ARCHITECTURE,
    ROWS,
    PAIRS,
    fixed={gemma2.ACTIVATION_KEY: "gelu_pytorch_tanh", "hidden_size_per_layer_input": 0},
    optional={"enable_moe_block": "blk.0.ffn_gate_inp.weight"},
    sections=(
        gguf_layers.windows(period=None),
        HEADS,
        SHARING,
        WIDTHS,
        CAP,
        gguf_rope.by_kind(ARCHITECTURE, WINDOW_BASE),
    ),
    unused=unused_tensors,
)
