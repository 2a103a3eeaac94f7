"""DeepSeek-V3, R1, V3.1 (2024, 2025): sigmoid scores, a bias on the choice, multi-token modules."""

from typing import Any

from checkpoint import gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, latent, weight_maps
from checkpoint.families.base import GGUF, Copy, Family, Packed
from configs.architecture import ModelConfig

DEFAULTS = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
}
"""Values of transformers\' DeepseekV3Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    return latent.read_model(settings, deepseek_moe.read_router(settings))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Other engines choose their router by topk_method and scoring_func."""
    router = config_sections.the_moe(config).router
    return {
        **latent.write_model(config),
        "topk_method": "noaux_tc",
        "aux_loss_alpha": router.sequence_weight,
        "seq_aux": True,
        "num_nextn_predict_layers": config.multi_token.depth if config.multi_token else 0,
        "ep_size": 1,
    }


COPIES = (
    Copy(
        f"{weight_maps.LAYER}.embed_tokens.weight", of="model.embed_tokens.weight", is_written=True
    ),
    Copy(f"{weight_maps.LAYER}.shared_head.head.weight", of="lm_head.weight", is_written=True),
)
"""Released multi-token modules repeat the embedding and the output layer that they share."""

PACKED = Packed(
    "float8",
    r"model\.layers\.\d+\.("
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|self_attn\.indexer\.(wq_b|wk)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj"
    r")\.weight",
)
"""Attention, the indexer's wide projections and every SwiGLU; eh_proj, the router, norms, embedding
and output layer stay bfloat16 (DeepSeek-V3, 2024, section 3.3)."""

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=weight_maps.DEEPSEEK_V3,
    copies=COPIES,
    multi_token=weight_maps.MULTI_TOKEN,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    packed=PACKED,
    fuses_experts=True,
    gguf=GGUF(
        "deepseek2",
        gguf_weight_maps.DEEPSEEK2,
        gguf_pairs.LATENT,
        fixed={
            **gguf_pairs.DEEPSEEK_MOE_FIXED,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        sections=(gguf_sections.LATENT, gguf_sections.QUERY_RANK),
        is_meant=gguf_pairs.has_sigmoid_scores,
    ),
)
