"""DeepSeek-V2 and V2-Lite (2024): latent attention, softmax scores, groups by their best expert."""

from typing import Any

from checkpoint import gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, latent, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import ModelConfig
from configs.feed_forward import RouterConfig

DEFAULTS = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
}
"""Values of transformers\' DeepseekV2Config for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("scoring_func", "softmax")
    settings.expect("norm_topk_prob", False)
    method = settings.text(
        "topk_method", choices=("greedy", "group_limited_greedy"), default="greedy"
    )
    is_limited = method == "group_limited_greedy"
    groups, best = deepseek_moe.read_groups(settings) if is_limited else (None, None)
    weight = settings.number("aux_loss_alpha", default=1e-3)
    is_sequence = settings.flag("seq_aux", default=True)
    router = RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        normalize_gates=False,
        gate_scale=settings.number("routed_scaling_factor", default=1.0),
        num_groups=groups,
        top_groups=best,
        group_score="best" if groups else "best_two",
        load_balance_weight=0.0 if is_sequence else weight,
        sequence_weight=weight if is_sequence else 0.0,
        z_loss_weight=0.0,
    )
    return latent.read_model(settings, router)


def write_config(config: ModelConfig) -> dict[str, Any]:
    router = config_sections.the_moe(config).router
    is_sequence = router.sequence_weight > 0
    return {
        **latent.write_model(config),
        "topk_method": "group_limited_greedy" if router.num_groups else "greedy",
        "aux_loss_alpha": router.sequence_weight if is_sequence else router.load_balance_weight,
        "seq_aux": is_sequence,
    }


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.LATENT, *weight_maps.DEEPSEEK_MOE),
    fuses_experts=True,
    gguf=GGUF(
        "deepseek2",
        gguf_weight_maps.DEEPSEEK2,
        gguf_pairs.LATENT,
        fixed={**gguf_pairs.DEEPSEEK_MOE_FIXED, "scoring_func": "softmax"},
        sections=(gguf_sections.LATENT, gguf_sections.QUERY_RANK),
        is_meant=lambda metadata: not gguf_pairs.has_sigmoid_scores(metadata),
    ),
)
