"""Rows that several families share: see checkpoint/weight_map.py for how they read.

v vocabulary, d d_model, h query heads, g key/value heads, c a head's width, q query rank, r latent
rank, f d_ff, e experts.
"""

from checkpoint.weight_map import Order, Row, interleaved, swapped_halves

LAYER = "model.layers.*"
ATTENTION = f"{LAYER}.self_attn"

EMBEDDING = (
    Row("embedding", "model.embed_tokens.weight", "v d -> v d"),
    Row("output", "lm_head.weight", "v d -> d v"),
    Row("final_norm.scale", "model.norm.weight", "d -> d"),
)

NORMS = (
    Row("layers.*.attention_norm.scale", f"{LAYER}.input_layernorm.weight", "d -> d"),
    Row("layers.*.ffn_norm.scale", f"{LAYER}.post_attention_layernorm.weight", "d -> d"),
)

POST_NORMS = (
    Row(
        "layers.*.attention_norm_after.scale",
        f"{LAYER}.post_attention_layernorm.weight",
        "d -> d",
    ),
    Row("layers.*.ffn_norm_after.scale", f"{LAYER}.post_feedforward_layernorm.weight", "d -> d"),
)
"""Of LayerSpec.norms="post", as OLMo names them."""

SANDWICH_NORMS = (
    NORMS[0],
    Row("layers.*.ffn_norm.scale", f"{LAYER}.pre_feedforward_layernorm.weight", "d -> d"),
    *POST_NORMS,
)
"""Of LayerSpec.norms="sandwich", as Gemma names them."""


def grouped_query(order: Order | None = None) -> tuple[Row, ...]:
    """
    Args:
      order: of the entries of query and key heads.
    """
    return (
        Row("layers.*.attention.q", f"{ATTENTION}.q_proj.weight", "(h c) d -> d h c", order),
        Row("layers.*.attention.kv", f"{ATTENTION}.k_proj.weight", "(g c) d -> d 0 g c", order),
        Row("layers.*.attention.kv", f"{ATTENTION}.v_proj.weight", "(g c) d -> d 1 g c"),
        Row("layers.*.attention.o", f"{ATTENTION}.o_proj.weight", "d (h c) -> h c d"),
        Row("layers.*.attention.q_bias", f"{ATTENTION}.q_proj.bias", "(h c) -> h c", order),
        Row("layers.*.attention.kv_bias", f"{ATTENTION}.k_proj.bias", "(g c) -> 0 g c", order),
        Row("layers.*.attention.kv_bias", f"{ATTENTION}.v_proj.bias", "(g c) -> 1 g c"),
        Row("layers.*.attention.o_bias", f"{ATTENTION}.o_proj.bias", "d -> d"),
    )


GROUPED_QUERY = (*NORMS, *grouped_query())

QK_NORM = (
    Row("layers.*.attention.q_norm.scale", f"{ATTENTION}.q_norm.weight", "c -> c"),
    Row("layers.*.attention.k_norm.scale", f"{ATTENTION}.k_norm.weight", "c -> c"),
)
"""Of each head by itself."""
QK_NORM_OF_ALL = (
    Row("layers.*.attention.q_norm.scale", f"{ATTENTION}.q_norm.weight", "(h c) -> h c"),
    Row("layers.*.attention.k_norm.scale", f"{ATTENTION}.k_norm.weight", "(h c) -> h c"),
)
"""Of all heads together."""

LATENT = (
    *NORMS,
    Row("layers.*.attention.q_down", f"{ATTENTION}.q_a_proj.weight", "q d -> d q"),
    Row("layers.*.attention.q_norm.scale", f"{ATTENTION}.q_a_layernorm.weight", "q -> q"),
    Row(
        "layers.*.attention.kv_down",
        f"{ATTENTION}.kv_a_proj_with_mqa.weight",
        "c d -> d c",
        interleaved("rope_head_dim"),
    ),
    Row("layers.*.attention.kv_norm.scale", f"{ATTENTION}.kv_a_layernorm.weight", "r -> r"),
    Row("layers.*.attention.kv_up", f"{ATTENTION}.kv_b_proj.weight", "(h c) r -> r h c"),
    Row("layers.*.attention.o", f"{ATTENTION}.o_proj.weight", "d (h c) -> h c d"),
    Row(
        "layers.*.attention.q",
        f"{ATTENTION}.q_b_proj.weight",
        "(h c) q -> q h c",
        interleaved("rope_head_dim"),
        requires="layers.*.attention.q_down",
    ),
    Row(
        "layers.*.attention.q",
        f"{ATTENTION}.q_proj.weight",
        "(h c) d -> d h c",
        interleaved("rope_head_dim"),
        unless="layers.*.attention.q_down",
    ),
    Row("layers.*.attention.q_down_bias", f"{ATTENTION}.q_a_proj.bias", "q -> q"),
    Row(
        "layers.*.attention.kv_down_bias",
        f"{ATTENTION}.kv_a_proj_with_mqa.bias",
        "c -> c",
        interleaved("rope_head_dim"),
    ),
    Row("layers.*.attention.o_bias", f"{ATTENTION}.o_proj.bias", "d -> d"),
)


def swiglu(parameter: str, name: str) -> tuple[Row, ...]:
    """A dense SwiGLU layer, or shared experts."""
    return (
        Row(f"{parameter}.gate_up", f"{name}.gate_proj.weight", "f d -> d 0 f"),
        Row(f"{parameter}.gate_up", f"{name}.up_proj.weight", "f d -> d 1 f"),
        Row(f"{parameter}.down", f"{name}.down_proj.weight", "d f -> f d"),
        Row(f"{parameter}.gate_up_bias", f"{name}.gate_proj.bias", "f -> 0 f"),
        Row(f"{parameter}.gate_up_bias", f"{name}.up_proj.bias", "f -> 1 f"),
        Row(f"{parameter}.down_bias", f"{name}.down_proj.bias", "d -> d"),
    )


def experts(name: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Routed experts, a tensor each; `name` holds {e}."""
    return (
        Row("layers.*.moe.gate_up", f"{name}.{gate}.weight", "f d -> e d 0 f"),
        Row("layers.*.moe.gate_up", f"{name}.{up}.weight", "f d -> e d 1 f"),
        Row("layers.*.moe.down", f"{name}.{down}.weight", "d f -> e f d"),
    )


DENSE = swiglu("layers.*.ffn", f"{LAYER}.mlp")
EXPERTS = experts(f"{LAYER}.mlp.experts.{{e}}", "gate_proj", "up_proj", "down_proj")
ROUTER = Row("layers.*.moe.router", f"{LAYER}.mlp.gate.weight", "e d -> d e")

FUSED_EXPERTS = f"{LAYER}.mlp.experts.gate_up_proj"
FUSED_MOE = (
    ROUTER,
    Row("layers.*.moe.gate_up", FUSED_EXPERTS, "e (i f) d -> e d i f"),
    Row("layers.*.moe.down", f"{LAYER}.mlp.experts.down_proj", "e d f -> e f d"),
)
"""As transformers 5 holds a layer's experts in memory, all in two tensors, the gates' rows before
the ups', and writes them when asked (`save_pretrained(..., save_original_format=False)`). Mixtral's
router has another name there than in its released form."""


def with_fused_experts(table: tuple[Row, ...]) -> tuple[Row, ...]:
    """A family's rows for files whose experts are fused."""
    replaced = {row.parameter for row in FUSED_MOE}
    return (*(row for row in table if row.parameter not in replaced), *FUSED_MOE)


DEEPSEEK_MOE = (
    *DENSE,
    ROUTER,
    *EXPERTS,
    *swiglu("layers.*.moe.shared", f"{LAYER}.mlp.shared_experts"),
)

CHOICE_BIAS = Row(
    "layers.*.moe.state.bias_E", f"{LAYER}.mlp.gate.e_score_correction_bias", "e -> e"
)

MULTI_TOKEN = f"{LAYER}.eh_proj.weight"
"""Each multi-token module has one: the layer's number goes on after the model's last."""

MULTI_TOKEN_MODULE = (
    Row("multi_token.*.hidden_norm.scale", f"{LAYER}.hnorm.weight", "d -> d"),
    Row("multi_token.*.token_norm.scale", f"{LAYER}.enorm.weight", "d -> d"),
    Row("multi_token.*.norm.scale", f"{LAYER}.shared_head.norm.weight", "d -> d"),
    Row("multi_token.*.projection", MULTI_TOKEN, "d c -> c d", swapped_halves),
)

DEEPSEEK_V3 = (*EMBEDDING, *LATENT, *DEEPSEEK_MOE, CHOICE_BIAS, *MULTI_TOKEN_MODULE)

INDEXER = f"{ATTENTION}.indexer"

DEEPSEEK_V32 = (
    *DEEPSEEK_V3,
    Row("layers.*.attention.indexer.q", f"{INDEXER}.wq_b.weight", "(h c) q -> q h c"),
    Row("layers.*.attention.indexer.k", f"{INDEXER}.wk.weight", "c d -> d c"),
    Row("layers.*.attention.indexer.k_norm.scale", f"{INDEXER}.k_norm.weight", "c -> c"),
    Row("layers.*.attention.indexer.k_norm.bias", f"{INDEXER}.k_norm.bias", "c -> c"),
    Row("layers.*.attention.indexer.weights", f"{INDEXER}.weights_proj.weight", "h d -> d h"),
)
