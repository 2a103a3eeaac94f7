"""Weight maps of GGUF files, one for each architecture of llama.cpp: see checkpoint/weight_map.py
for how rows read. Shapes are in numpy's order; letters are those of families/weight_maps.py. Delta
nets, Mamba-2 and short convolutions have theirs beside those of config.json's form (families/).
"""

import dataclasses
from collections.abc import Sequence

from checkpoint.gguf_values import ONE_ABOVE
from checkpoint.weight_map import Order, Row, interleaved, interleaved_first

BLOCK = "blk.*"

EMBEDDING = (
    Row("embedding", "token_embd.weight", "v d -> v d"),
    Row("output", "output.weight", "v d -> d v"),
    Row("final_norm.scale", "output_norm.weight", "d -> d"),
)

NORMS = (
    Row("layers.*.attention_norm.scale", f"{BLOCK}.attn_norm.weight", "d -> d"),
    Row("layers.*.ffn_norm.scale", f"{BLOCK}.ffn_norm.weight", "d -> d"),
)


AFTER_ATTENTION = Row("layers.*.ffn_norm.scale", f"{BLOCK}.post_attention_norm.weight", "d -> d")
"""The feed-forward's norm, where llama.cpp names it by what comes before."""


def zero_centered(table: Sequence[Row]) -> tuple[Row, ...]:
    """The rows of a model whose norms are centered on zero."""
    return tuple(
        dataclasses.replace(row, values=ONE_ABOVE) if row.parameter.endswith(".scale") else row
        for row in table
    )


def grouped_query(order: Order | None = None) -> tuple[Row, ...]:
    """
    Args:
      order: of the entries of query and key heads.
    """
    return (
        Row("layers.*.attention.q", f"{BLOCK}.attn_q.weight", "(h c) d -> d h c", order),
        Row("layers.*.attention.kv", f"{BLOCK}.attn_k.weight", "(g c) d -> d 0 g c", order),
        Row("layers.*.attention.kv", f"{BLOCK}.attn_v.weight", "(g c) d -> d 1 g c"),
        Row("layers.*.attention.o", f"{BLOCK}.attn_output.weight", "d (h c) -> h c d"),
        Row("layers.*.attention.q_bias", f"{BLOCK}.attn_q.bias", "(h c) -> h c", order),
        Row("layers.*.attention.kv_bias", f"{BLOCK}.attn_k.bias", "(g c) -> 0 g c", order),
        Row("layers.*.attention.kv_bias", f"{BLOCK}.attn_v.bias", "(g c) -> 1 g c"),
        Row("layers.*.attention.o_bias", f"{BLOCK}.attn_output.bias", "d -> d"),
    )


def swiglu(parameter: str, suffix: str) -> tuple[Row, ...]:
    """A dense SwiGLU layer, or shared experts."""
    return (
        Row(f"{parameter}.gate_up", f"{BLOCK}.ffn_gate{suffix}.weight", "f d -> d 0 f"),
        Row(f"{parameter}.gate_up", f"{BLOCK}.ffn_up{suffix}.weight", "f d -> d 1 f"),
        Row(f"{parameter}.down", f"{BLOCK}.ffn_down{suffix}.weight", "d f -> f d"),
    )


DENSE = swiglu("layers.*.ffn", "")

EXPERTS = (
    Row("layers.*.moe.router", f"{BLOCK}.ffn_gate_inp.weight", "e d -> d e"),
    Row("layers.*.moe.gate_up", f"{BLOCK}.ffn_gate_exps.weight", "e f d -> e d 0 f"),
    Row("layers.*.moe.gate_up", f"{BLOCK}.ffn_up_exps.weight", "e f d -> e d 1 f"),
    Row("layers.*.moe.down", f"{BLOCK}.ffn_down_exps.weight", "e d f -> e f d"),
)


def ungated(parameter: str, suffix: str) -> tuple[Row, ...]:
    """A dense layer without a gate, or shared experts."""
    return (
        Row(f"{parameter}.gate_up", f"{BLOCK}.ffn_up{suffix}.weight", "f d -> d 0 f"),
        Row(f"{parameter}.down", f"{BLOCK}.ffn_down{suffix}.weight", "d f -> f d"),
        Row(f"{parameter}.gate_up_bias", f"{BLOCK}.ffn_up{suffix}.bias", "f -> 0 f"),
        Row(f"{parameter}.down_bias", f"{BLOCK}.ffn_down{suffix}.bias", "d -> d"),
    )


LLAMA = (
    *EMBEDDING,
    *NORMS,
    *grouped_query(interleaved("head_dim")),
    *DENSE,
    Row("layers.*.ffn.gate_up_bias", f"{BLOCK}.ffn_gate.bias", "f -> 0 f"),
    Row("layers.*.ffn.gate_up_bias", f"{BLOCK}.ffn_up.bias", "f -> 1 f"),
    Row("layers.*.ffn.down_bias", f"{BLOCK}.ffn_down.bias", "d -> d"),
)
"""Heads turn pairs side by side, where the Hugging Face form has halves."""

LLAMA_MOE = (*EMBEDDING, *NORMS, *grouped_query(interleaved("head_dim")), *EXPERTS)
"""Mixtral, which is an architecture "llama" with experts."""

QK_NORM = (
    Row("layers.*.attention.q_norm.scale", f"{BLOCK}.attn_q_norm.weight", "c -> c"),
    Row("layers.*.attention.k_norm.scale", f"{BLOCK}.attn_k_norm.weight", "c -> c"),
)
QK_NORM_OF_ALL = (
    Row("layers.*.attention.q_norm.scale", f"{BLOCK}.attn_q_norm.weight", "(h c) -> h c"),
    Row("layers.*.attention.k_norm.scale", f"{BLOCK}.attn_k_norm.weight", "(h c) -> h c"),
)
CHOICE_BIAS = Row("layers.*.moe.state.bias_E", f"{BLOCK}.exp_probs_b.bias", "e -> e")
UNGATED_MOE = (
    EXPERTS[0],
    Row("layers.*.moe.gate_up", f"{BLOCK}.ffn_up_exps.weight", "e f d -> e d 0 f"),
    EXPERTS[-1],
    *ungated("layers.*.moe.shared", "_shexp"),
    CHOICE_BIAS,
    Row("layers.*.moe.latent_in", f"{BLOCK}.ffn_latent_down.weight", "r d -> d r"),
    Row("layers.*.moe.latent_out", f"{BLOCK}.ffn_latent_up.weight", "d r -> r d"),
)
SHARED = swiglu("layers.*.moe.shared", "_shexp")

POST_NORMS = (
    Row("layers.*.attention_norm_after.scale", f"{BLOCK}.post_attention_norm.weight", "d -> d"),
    Row("layers.*.ffn_norm_after.scale", f"{BLOCK}.post_ffw_norm.weight", "d -> d"),
)
SHARED_GATE = Row("layers.*.moe.shared_gate", f"{BLOCK}.ffn_gate_inp_shexp.weight", "d -> d")

QWEN2 = (*EMBEDDING, *NORMS, *grouped_query(), *DENSE)
QWEN3 = (*QWEN2, *QK_NORM)
QWEN3_MOE = (*EMBEDDING, *NORMS, *grouped_query(), *QK_NORM, *EXPERTS)
DOTS1 = (*QWEN3, *EXPERTS, *SHARED, CHOICE_BIAS)
OLMOE = (*EMBEDDING, *NORMS, *grouped_query(), *QK_NORM_OF_ALL, *EXPERTS)
OLMO2 = (*EMBEDDING, *POST_NORMS, *grouped_query(), *QK_NORM_OF_ALL, *DENSE)
GATED_MOE = (*EXPERTS, *SHARED, SHARED_GATE)
QWEN2_MOE = (*QWEN2, *GATED_MOE)
HUNYUAN_MOE = (*EMBEDDING, *NORMS, *grouped_query(), *QK_NORM, *EXPERTS, *SHARED)
MINIMAX_M2 = (*OLMOE, CHOICE_BIAS)
GLM4_MOE = (
    *EMBEDDING,
    NORMS[0],
    AFTER_ATTENTION,
    *grouped_query(),
    *QK_NORM,
    *DENSE,
    *EXPERTS,
    *SHARED,
    CHOICE_BIAS,
)
ERNIE_MOE = (
    *EMBEDDING,
    *NORMS,
    *grouped_query(interleaved("head_dim")),
    *DENSE,
    *EXPERTS,
    *SHARED,
    CHOICE_BIAS,
)

GPT_OSS = (
    *EMBEDDING,
    NORMS[0],
    AFTER_ATTENTION,
    *grouped_query(),
    Row("layers.*.attention.sink_logits", f"{BLOCK}.attn_sinks.weight", "h -> h"),
    *EXPERTS,
    Row("layers.*.moe.router_bias", f"{BLOCK}.ffn_gate_inp.bias", "e -> e"),
    Row("layers.*.moe.gate_up_bias", f"{BLOCK}.ffn_gate_exps.bias", "e f -> e 0 f"),
    Row("layers.*.moe.gate_up_bias", f"{BLOCK}.ffn_up_exps.bias", "e f -> e 1 f"),
    Row("layers.*.moe.down_bias", f"{BLOCK}.ffn_down_exps.bias", "e d -> e d"),
)

GEMMA = zero_centered((*EMBEDDING, *NORMS, *grouped_query(), *DENSE))
GEMMA2 = (*GEMMA, *zero_centered(POST_NORMS))
GEMMA3 = (*GEMMA2, *zero_centered(QK_NORM))
LLAMA4 = (*LLAMA, *EXPERTS, *SHARED)

_ROTARY = interleaved("rope_head_dim")
_Q, _DOWN = "layers.*.attention.q", "layers.*.attention.q_down"


LATENT = (
    Row(_DOWN, f"{BLOCK}.attn_q_a.weight", "q d -> d q"),
    Row("layers.*.attention.q_norm.scale", f"{BLOCK}.attn_q_a_norm.weight", "q -> q"),
    Row(_Q, f"{BLOCK}.attn_q_b.weight", "(h c) q -> q h c", _ROTARY, requires=_DOWN),
    Row(_Q, f"{BLOCK}.attn_q.weight", "(h c) d -> d h c", _ROTARY, unless=_DOWN),
    Row("layers.*.attention.kv_down", f"{BLOCK}.attn_kv_a_mqa.weight", "c d -> d c", _ROTARY),
    Row("layers.*.attention.kv_norm.scale", f"{BLOCK}.attn_kv_a_norm.weight", "r -> r"),
    Row("layers.*.attention.kv_up", f"{BLOCK}.attn_kv_b.weight", "(h c) r -> r h c"),
    Row("layers.*.attention.o", f"{BLOCK}.attn_output.weight", "d (h c) -> h c d"),
)

DEEPSEEK2 = (*EMBEDDING, *NORMS, *LATENT, *DENSE, *EXPERTS, *SHARED, CHOICE_BIAS)
"""DeepSeek-V2 and V3. Newer files hold attn_kv_b as two tensors: see gguf_latent.py."""

_INDEXER, _FIRST = "layers.*.attention.indexer", interleaved_first("rope_head_dim")

GLM_DSA = (
    *DEEPSEEK2,
    Row(f"{_INDEXER}.q", f"{BLOCK}.indexer.attn_q_b.weight", "(h c) q -> q h c", _FIRST),
    Row(f"{_INDEXER}.k", f"{BLOCK}.indexer.attn_k.weight", "c d -> d c", _FIRST),
    Row(f"{_INDEXER}.k_norm.scale", f"{BLOCK}.indexer.k_norm.weight", "c -> c", _FIRST),
    Row(f"{_INDEXER}.k_norm.bias", f"{BLOCK}.indexer.k_norm.bias", "c -> c", _FIRST),
    Row(f"{_INDEXER}.weights", f"{BLOCK}.indexer.proj.weight", "h d -> d h"),
)
"""DeepSeek's sparse attention: an indexer beside the latent attention."""
