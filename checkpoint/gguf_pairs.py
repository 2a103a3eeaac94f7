"""Which of llama.cpp's keys is which of config.json's, for families that share them.

A key holds {arch}, the architecture's name; see gguf_config.py for what is no pair.
"""

from collections.abc import Mapping
from typing import Any

from gguf.constants import ExpertGatingFuncType, Keys

LLM, ATTENTION, ROPE = Keys.LLM, Keys.Attention, Keys.Rope
SSM, KDA = Keys.SSM, Keys.KDA
Pairs = tuple[tuple[str, str], ...]

_COMMON: Pairs = (
    (LLM.CONTEXT_LENGTH, "max_position_embeddings"),
    (LLM.EMBEDDING_LENGTH, "hidden_size"),
    (LLM.BLOCK_COUNT, "num_hidden_layers"),
    (LLM.FEED_FORWARD_LENGTH, "intermediate_size"),
    (LLM.EXPERT_USED_COUNT, "num_experts_per_tok"),
    (ATTENTION.HEAD_COUNT, "num_attention_heads"),
    (ATTENTION.LAYERNORM_RMS_EPS, "rms_norm_eps"),
    (ROPE.FREQ_BASE, "rope_theta"),
)
SHORT_CONV_TAPS = Keys.ShortConv.L_CACHE
GROUPED: Pairs = (*_COMMON, (ATTENTION.HEAD_COUNT_KV, "num_key_value_heads"))
DEEPSEEK_EXPERTS: Pairs = (
    (LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
    (LLM.EXPERT_COUNT, "n_routed_experts"),
    (LLM.EXPERT_SHARED_COUNT, "n_shared_experts"),
    (LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor"),
    (LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob"),
)
_DEEPSEEK_MOE: Pairs = (
    (LLM.LEADING_DENSE_BLOCK_COUNT, "first_k_dense_replace"),
    *DEEPSEEK_EXPERTS,
)
GROUPED_DEEPSEEK_MOE: Pairs = (*GROUPED, *_DEEPSEEK_MOE)
"""DeepSeek's experts behind grouped-query attention; llama.cpp has no groups of experts there."""
LATENT: Pairs = (
    *_COMMON,
    *_DEEPSEEK_MOE,
    (LLM.EXPERT_GROUP_COUNT, "n_group"),
    (LLM.EXPERT_GROUP_USED_COUNT, "topk_group"),
    (ATTENTION.Q_LORA_RANK, "q_lora_rank"),
    (ATTENTION.KV_LORA_RANK, "kv_lora_rank"),
    (ROPE.DIMENSION_COUNT, "qk_rope_head_dim"),
)
WIDE_EXPERTS: Pairs = (
    (LLM.EXPERT_COUNT, "num_experts"),
    (LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size"),
    (LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, "shared_expert_intermediate_size"),
)
"""Qwen's, with a shared one of a width of its own."""
DEEPSEEK_MOE_FIXED = {
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
}
"""What llama.cpp means where a file leaves the key out."""
SIGMOID = {LLM.EXPERT_GATING_FUNC: int(ExpertGatingFuncType.SIGMOID)}
SOFTMAX = {LLM.EXPERT_GATING_FUNC: int(ExpertGatingFuncType.SOFTMAX)}


def renamed(pairs: Pairs, **names: str | None) -> Pairs:
    """The pairs with other names of config.json.

    Args:
      names: the pairs' name = the family's; None leaves the pair out.
    """
    found = ((key, names.get(name, name)) for key, name in pairs)
    return tuple((key, name) for key, name in found if name is not None)


def has_sigmoid_scores(metadata: Mapping[str, Any]) -> bool:
    """Whether a file of the architecture deepseek2 is V3's."""
    key = LLM.EXPERT_GATING_FUNC.format(arch="deepseek2")
    return metadata.get(key) == ExpertGatingFuncType.SIGMOID
