"""The tiny models of each family whose logits record.py records: CASE to the model_type of
transformers and the settings beside BASE."""

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
LATENT = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
V2 = LATENT | {"n_shared_experts": 2, "num_experts_per_tok": 3, "q_lora_rank": 24}
V3 = LATENT | {
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V4 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.0,
    "hc_sinkhorn_iters": 4,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 4,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "compress": YARN | {"rope_theta": 160000.0, "partial_rotary_factor": 0.25},
    },
}
QWEN = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
DENSE = {"intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
GLM = EXPERTS | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.35,
    "logits_scaling": 1.5,
}
DELTA = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 16,
}
"""Of widths at which float32 and float64 agree to 5e-5 of deviation 1 in transformers itself: a
query that is nearly at right angles to all keys lets what is rounded grow, in narrow heads more."""
MAMBA2 = {
    "head_dim": 16,
    "ssm_state_size": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
GRANITE_MAMBA2 = {
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_state": 12,
    "mamba_chunk_size": 16,
}
GEMMA4 = DENSE | {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 2.0,
}
GEMMA4_E = GEMMA4 | {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": BASE["vocab_size"],
}
CASES = {
    "llama": ("llama", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "llama3_biased": (
        "llama",
        {
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_stretched": (
        "llama",
        {
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "smollm2": (
        "llama",
        {
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "rms_norm_eps": 1e-5,
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "qwen3_moe": ("qwen3_moe", QWEN | {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        QWEN | {"norm_topk_prob": False, "mlp_only_layers": [0, 2], "num_hidden_layers": 4},
    ),
    "olmoe": (
        "olmoe",
        {
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "clip_qkv": 1.0,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        V2
        | {
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        V2 | {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        V3 | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v32": (
        "deepseek_v32",
        V3 | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 4},
    ),
    "deepseek_v32_biased": (
        "deepseek_v32",
        V3
        | {
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 8,
            "attention_bias": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        V3
        | {
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "glm_moe_dsa_shared": (
        "glm_moe_dsa",
        V3
        | {
            "num_hidden_layers": 6,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "indexer_types": ["full", "shared", "shared", "full", "shared", "shared"],
        },
    ),
    "deepseek_v4": ("deepseek_v4", V4),
    "qwen2": ("qwen2", DENSE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", DENSE | {"head_dim": 20, "attention_bias": True}),
    "mistral": ("mistral", DENSE | {"head_dim": 20, "sliding_window": 16}),
    "ministral": (
        "ministral",
        DENSE
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "kimi_k2": (
        "deepseek_v3",
        V3
        | {
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "dots1": (
        "dots1",
        EXPERTS
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "head_dim": 20,
        },
    ),
    "hy_v3": ("hy_v3", EXPERTS | {"num_experts": 8, "head_dim": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {key: value for key, value in EXPERTS.items() if key != "num_experts_per_tok"}
        | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        EXPERTS
        | {
            "num_experts": 8,
            "shared_expert_intermediate_size": 64,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    ),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4_moe_biased": (
        "glm4_moe",
        GLM
        | {
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.25},
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "smollm3": (
        "smollm3",
        DENSE | {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "pad_token_id": 0},
    ),
    "olmo2": ("olmo2", DENSE | {"pad_token_id": 0}),
    "olmo3": (
        "olmo3",
        DENSE
        | {
            "pad_token_id": 0,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": YARN,
            },
        },
    ),
    "flex_olmo": (
        "flex_olmo",
        {
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "pad_token_id": 0,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS
        | DELTA
        | {
            "num_experts": 8,
            "shared_expert_intermediate_size": 32,
            "attention_bias": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        DENSE | DELTA | {"linear_num_key_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {key: value for key, value in EXPERTS.items() if key != "intermediate_size"}
        | DELTA
        | {"num_experts": 8, "shared_expert_intermediate_size": 32},
    ),
    "kimi_linear": (
        "kimi_linear",
        LATENT
        | {
            "num_local_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_head_dim": 24,
            "linear_num_heads": 4,
            "pad_token_id": 0,
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        DENSE
        | {key: value for key, value in DELTA.items() if key != "head_dim"}
        | {"pad_token_id": 0, "rope_theta": None},
    ),
    "olmo_hybrid_turned": (
        "olmo_hybrid",
        DENSE
        | {"pad_token_id": 0, "num_hidden_layers": 3, "linear_allow_neg_eigval": False}
        | {"attention_bias": True},
    ),
    "granite": ("granite", DENSE | GRANITE),
    "granitemoe": (
        "granitemoe",
        DENSE | GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", DENSE | {"head_dim": 16}),
    "ministral3": (
        "ministral3",
        DENSE
        | {
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": YARN
            | {
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.4,
            },
        },
    ),
    "llama4": (
        "llama4_text",
        EXPERTS
        | {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 12,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
    ),
    "gemma4": (
        "gemma4_text",
        GEMMA4
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4_dense": ("gemma4_text", GEMMA4 | {"final_logit_softcapping": None}),
    "gemma4_e2b": (
        "gemma4_text",
        GEMMA4_E
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 4,
            "num_key_value_heads": 1,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4_e4b": (
        "gemma4_text",
        GEMMA4_E
        | {
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "lfm2": (
        "lfm2",
        DENSE
        | {
            "block_multiple_of": 16,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "conv", "full_attention"],
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        EXPERTS
        | {
            "num_experts": 8,
            "num_dense_layers": 1,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "conv_bias": True,
            "conv_L_cache": 4,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        EXPERTS
        | MAMBA2
        | {
            "hybrid_override_pattern": "MEM*-ME",
            "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 2.5,
        },
    ),
    "nemotron_h_latent": (
        "nemotron_h",
        EXPERTS
        | MAMBA2
        | {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": 8,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
            "moe_latent_size": 64,
            "n_group": 4,
            "topk_group": 2,
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_min": 0.6,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        GRANITE
        | GRANITE_MAMBA2
        | {
            "intermediate_size": 64,
            "shared_intermediate_size": 96,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "time_step_limit": [0.6, float("inf")],
        },
    ),
    "granitemoehybrid_dense": (
        "granitemoehybrid",
        GRANITE
        | GRANITE_MAMBA2
        | {
            "shared_intermediate_size": 96,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_n_groups": 2,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": ("gemma", DENSE | {"head_dim": 20}),
    "gemma2": (
        "gemma2",
        DENSE
        | {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "attn_logit_softcapping": 0.8,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        DENSE
        | {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "final_logit_softcapping": 2.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "moe_topk": 2,
        },
    ),
}


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
WITH_IMAGES = {
    "qwen3_5": {
        "text_config": CASES["qwen3_5_text"][1],
        "vision_config": VISION,
        "tie_word_embeddings": True,
    },
    "qwen3_5_moe": {"text_config": CASES["qwen3_5_moe_text"][1], "vision_config": VISION},
}
"""Models with an encoder for images, of which the logits of text are recorded, in vision/."""

KNOWN_AS = {"kimi_k2": "deepseek_v3"}
"""Cases of families that transformers knows by another name alone."""
