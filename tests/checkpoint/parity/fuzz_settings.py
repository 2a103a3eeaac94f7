"""What the settings of random small models are drawn from, by family: for record_fuzz.py."""

from typing import Any

ROPE = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 500_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]
COMMON: dict[str, list[Any]] = {
    "hidden_size": [16, 32, 48],
    "num_hidden_layers": [1, 2, 3, 4],
    "rms_norm_eps": [1e-6, 1e-5, 1e-3],
    "hidden_act": ["silu"] * 9 + ["gelu"],
    "tie_word_embeddings": [False, True],
    "rope_parameters": ROPE,
}
GROUPED = COMMON | {
    "num_attention_heads": [2, 4],
    "num_key_value_heads": [1, 2],
    "head_dim": [8, 12, 16],
}
LATENT = COMMON | {
    "num_attention_heads": [2, 4],
    "q_lora_rank": [None, 12],
    "kv_lora_rank": [8, 16],
    "qk_nope_head_dim": [8, 12],
    "qk_rope_head_dim": [4, 8],
    "v_head_dim": [8, 12],
}
DENSE = GROUPED | {"intermediate_size": [24, 40]}
WINDOWS = {"sliding_window": [5, 9, 1000], "layer_types": ["some", None]}
DEEPSEEK = {
    "intermediate_size": [24, 40],
    "moe_intermediate_size": [8, 16],
    "n_routed_experts": [4, 8],
    "n_shared_experts": [1, 2],
    "num_experts_per_tok": [1, 2, 3],
    "first_k_dense_replace": [0, 1],
    "norm_topk_prob": [True, False],
    "routed_scaling_factor": [1.0, 2.5],
}
GROUPS = {"n_group": [1, 2], "topk_group": [1]}
FACTORS = {
    "embedding_multiplier": [1.0, 12.0],
    "residual_multiplier": [1.0, 0.22],
    "attention_multiplier": [1.0, 0.1],
    "logits_scaling": [1.0, 7.0],
}
GEMMA = {key: value for key, value in DENSE.items() if key != "hidden_act"} | {
    "hidden_activation": ["gelu_pytorch_tanh"] * 9 + ["gelu"],
    "attention_bias": [False, True],
    "pad_token_id": [0],
}
GEMMA4_ROPE: list[Any] = [
    {
        "sliding_attention": ROPE[0],
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": share,
        },
    }
    for share in (0.25, 0.5)
] + [None]
DELTA = {
    "head_dim": [16, 32],
    "layer_types": ["some", "some", None],
    "full_attention_interval": [2, 3],
    "linear_conv_kernel_dim": [2, 4],
    "linear_num_key_heads": [1, 2],
    "linear_num_value_heads": [2, 4],
    "linear_key_head_dim": [8, 12],
    "linear_value_head_dim": [8, 16],
    "rope_parameters": [*ROPE, *(rope | {"partial_rotary_factor": 0.5} for rope in ROPE)],
    "attention_bias": [False, True],
}
SHARED = {
    "moe_intermediate_size": [8, 16],
    "shared_expert_intermediate_size": [16, 16, 24],
    "num_experts": [4, 8],
    "num_experts_per_tok": [1, 2, 3],
}
LFM2 = {key: GROUPED[key] for key in GROUPED if key not in ("rms_norm_eps", "hidden_act")} | {
    "norm_eps": [1e-5, 1e-3],
    "layer_types": ["some"],
    "conv_L_cache": [2, 3, 4],
    "conv_bias": [False, True],
}
MAMBA2 = {
    "mamba_num_heads": [4, 8],
    "mamba_head_dim": [8, 12],
    "ssm_state_size": [6, 8],
    "n_groups": [1, 2],
    "use_conv_bias": [False, True],
    "use_bias": [False, True],
    "conv_kernel": [2, 4],
    "chunk_size": [8],
}
ALPHA = [*ROPE, {"rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 50.0, "factor": 1.0}]
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "qwen2": DENSE | {"use_sliding_window": [False] * 5 + [True], "max_window_layers": [1]},
    "qwen3": DENSE
    | {
        "attention_bias": [False, True],
        "use_sliding_window": [False] * 5 + [True],
        "max_window_layers": [1],
    },
    "mistral": DENSE | {"sliding_window": [None, 1, 7, 4096]},
    "ministral": DENSE | WINDOWS,
    "kimi_k2": LATENT | DEEPSEEK | GROUPS | {"attention_bias": [False, False, True]},
    "deepseek_v4": COMMON
    | {
        "num_hidden_layers": [1, 2, 3, 4],
        "num_attention_heads": [2, 4],
        "num_key_value_heads": [1],
        "head_dim": [8, 16],
        "partial_rotary_factor": [0.5, 0.25, 1.0],
        "q_lora_rank": [8, 12],
        "o_groups": [1, 2],
        "o_lora_rank": [8, 12],
        "sliding_window": [3, 8, 100],
        "layer_types": ["some", "some", None],
        "mlp_layer_types": ["some", None],
        "compress_rates": [
            {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
        ],
        "index_n_heads": [8, 16],
        "index_head_dim": [16],
        "index_topk": [1, 3, 512],
        "moe_intermediate_size": [8, 16],
        "n_routed_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "routed_scaling_factor": [1.0, 1.5],
        "scoring_func": ["sqrtsoftplus", "sqrtsoftplus", "sigmoid"],
        "swiglu_limit": [0.5, 10.0],
        "hc_mult": [2, 4],
        "hc_sinkhorn_iters": [1, 5],
        "hc_eps": [1e-6, 1e-2],
        "rope_parameters": [
            None,
            ROPE[3],
            *(
                {
                    "main": ROPE[0] | {"partial_rotary_factor": share},
                    "compress": rope | {"partial_rotary_factor": share},
                }
                for rope, share in ((ROPE[1], 0.5), (ROPE[2], 0.25), (ROPE[3], 0.5))
            ),
        ],
    },
    "dots1": GROUPED
    | DEEPSEEK
    | GROUPS
    | {"attention_bias": [False, True], "max_window_layers": [62, 62, 62, 1]},
    "hy_v3": GROUPED
    | {
        "intermediate_size": [24, 40],
        "moe_intermediate_size": [8, 16],
        "num_experts": [4, 8],
        "num_shared_experts": [1, 2],
        "num_experts_per_tok": [1, 2, 3],
        "router_scaling_factor": [1.0, 2.826],
        "attention_bias": [False, True],
        "mlp_bias": [False] * 5 + [True],
        "mlp_layer_types": ["some", None],
    },
    "ernie4_5_moe": GROUPED
    | {
        "intermediate_size": [24, 40],
        "moe_intermediate_size": [8, 16],
        "moe_num_experts": [4, 8],
        "moe_num_shared_experts": [0, 1, 2],
        "moe_k": [1, 2, 3],
        "moe_layer_start_index": [0, 1],
        "moe_layer_interval": [1, 1, 2],
        "moe_layer_end_index": [-1, -1, 2],
        "use_bias": [False] * 5 + [True],
    },
    "qwen2_moe": GROUPED
    | {
        "intermediate_size": [24, 40],
        "moe_intermediate_size": [8, 16],
        "shared_expert_intermediate_size": [16, 32, 24],
        "num_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "norm_topk_prob": [False, True],
        "decoder_sparse_step": [1, 2],
        "qkv_bias": [True, True, False],
        "num_hidden_layers": [2, 3, 4],
    },
    "glm4_moe": GROUPED
    | DEEPSEEK
    | GROUPS
    | {
        "attention_bias": [False, True],
        "use_qk_norm": [False, True],
        "rope_parameters": [*ROPE, *(rope | {"partial_rotary_factor": 0.25} for rope in ROPE)],
        "head_dim": [16, 32],
        "num_hidden_layers": [2, 3, 4],
    },
    "minimax_m2": GROUPED
    | {
        "intermediate_size": [8, 16],
        "num_local_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "head_dim": [8, 16],
        "rope_parameters": [*ROPE, *(rope | {"partial_rotary_factor": 0.5} for rope in ROPE)],
    },
    "smollm3": DENSE
    | {
        "attention_bias": [False, True],
        "mlp_bias": [False, True],
        "no_rope_layers": ["some", None],
        "no_rope_layer_interval": [2, 4],
        "num_hidden_layers": [2, 3, 4],
        "pad_token_id": [0],
    },
    "olmo2": DENSE | {"attention_bias": [False, True], "pad_token_id": [0]},
    "olmo3": DENSE
    | WINDOWS
    | {
        "attention_bias": [False, True],
        "pad_token_id": [0],
        "rope_parameters": [
            {"sliding_attention": own, "full_attention": rope} for own in ROPE[:2] for rope in ROPE
        ]
        + [None],
    },
    "flex_olmo": GROUPED
    | {
        "intermediate_size": [8, 16],
        "num_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "norm_topk_prob": [False, True],
        "attention_bias": [False, True],
        "pad_token_id": [0],
    },
    "granite": DENSE | FACTORS | {"attention_bias": [False, True], "mlp_bias": [False, True]},
    "granitemoe": GROUPED
    | FACTORS
    | {
        "intermediate_size": [8, 16],
        "num_local_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "attention_bias": [False, True],
    },
    "qwen3_next": DENSE
    | DELTA
    | SHARED
    | {
        "norm_topk_prob": [True, False],
        "decoder_sparse_step": [1, 2],
        "mlp_only_layers": [[], [0]],
        "num_hidden_layers": [2, 3, 4],
    },
    "qwen3_5_text": DENSE | DELTA,
    "qwen3_5_moe_text": GROUPED | DELTA | SHARED,
    "kimi_linear": LATENT
    | DEEPSEEK
    | GROUPS
    | {
        "num_local_experts": [4, 8],
        "layer_types": ["some", "some", None],
        "tie_word_embeddings": [False] * 5 + [True],
        "n_group": [1, 1, 2],
        "mlp_layer_types": ["some", None],
        "linear_head_dim": [8, 12],
        "linear_num_heads": [2, 4],
        "linear_conv_kernel_dim": [2, 4],
        "attention_bias": [False, True],
        "num_hidden_layers": [3, 4, 5],
        "pad_token_id": [0],
    },
    "olmo_hybrid": DENSE
    | {
        **{key: values for key, values in DELTA.items() if key.startswith("linear")},
        "linear_key_head_dim": [8, None],
        "linear_value_head_dim": [16, None],
        "linear_allow_neg_eigval": [False, True],
        "layer_types": ["some", "some", None],
        "attention_bias": [False, True],
        "rope_parameters": [*ROPE, {"rope_type": "default", "rope_theta": None}],
        "pad_token_id": [0],
    },
    "hunyuan_v1_dense": DENSE | {"attention_bias": [False, True], "rope_parameters": ALPHA},
    "ministral3": DENSE
    | {
        "sliding_window": [None, 7],
        "rope_parameters": [
            rope
            | {
                "llama_4_scaling_beta": beta,
                "original_max_position_embeddings": length,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
            for rope in (ROPE[0], ROPE[3])
            for beta, length in ((0.1, 8), (0.7, 16))
        ],
    },
    "llama4": GROUPED
    | {
        "intermediate_size": [8, 16],
        "intermediate_size_mlp": [24, 40],
        "num_local_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "interleave_moe_layer_step": [1, 2],
        "no_rope_layers": ["some", None],
        "no_rope_layer_interval": [2, 4],
        "attention_chunk_size": [5, 9, 1000],
        "use_qk_norm": [True, False],
        "attn_temperature_tuning": [True, False],
        "floor_scale": [4, 8],
        "attn_scale": [0.1, 0.5],
        "attention_bias": [False, True],
        "num_hidden_layers": [2, 3, 4],
    },
    "gemma4": {key: value for key, value in GEMMA.items() if key != "attention_bias"}
    | {
        "num_hidden_layers": [2, 3, 4],
        "sliding_window": [5, 9, 1000],
        "global_head_dim": [16, 32],
        "num_global_key_value_heads": [1, 2],
        "attention_k_eq_v": [True, True, False],
        "enable_moe_block": [True, True, False],
        "num_experts": [4, 8],
        "top_k_experts": [1, 2],
        "moe_intermediate_size": [8, 16],
        "final_logit_softcapping": [None, 5.0],
        "hidden_size_per_layer_input": [0] * 7 + [8],
        "vocab_size_per_layer_input": [40],
        "rope_parameters": GEMMA4_ROPE,
    },
    "gemma4_e2b": {key: value for key, value in GEMMA.items() if key != "attention_bias"}
    | {
        "num_hidden_layers": [5],
        "layer_types": [
            ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            ["full_attention", "sliding_attention", "sliding_attention"] + ["full_attention"] * 2,
        ],
        "sliding_window": [5, 9],
        "global_head_dim": [16, 32],
        "num_global_key_value_heads": [1, 2],
        "attention_k_eq_v": [True, False],
        "final_logit_softcapping": [None, 5.0],
        "hidden_size_per_layer_input": [0, 8, 12],
        "rope_parameters": GEMMA4_ROPE,
        "vocab_size_per_layer_input": [40] * 7 + [48],
        "num_kv_shared_layers": [0, 1, 2, 3],
        "use_double_wide_mlp": [True, False],
        "enable_moe_block": [True, False, False],
        "num_experts": [4],
        "top_k_experts": [2],
        "moe_intermediate_size": [16],
    },
    "lfm2": LFM2
    | {
        "intermediate_size": [24, 40],
        "block_multiple_of": [8, 16],
        "block_ffn_dim_multiplier": [1.0, 1.3],
        "block_auto_adjust_ff_dim": [True, False],
    },
    "lfm2_moe": LFM2
    | {
        "intermediate_size": [24, 40],
        "moe_intermediate_size": [8, 16],
        "num_dense_layers": [0, 1],
        "num_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "use_expert_bias": [True, False],
        "norm_topk_prob": [True, False],
        "routed_scaling_factor": [1.0, 2.5],
        "num_hidden_layers": [2, 3, 4],
    },
    "nemotron_h": MAMBA2
    | {
        "hidden_size": [16, 32, 48],
        "layers_block_type": ["some"],
        "num_hidden_layers": [1, 2, 3, 4, 5],
        "layer_norm_epsilon": [1e-6, 1e-5, 1e-3],
        "num_attention_heads": [2, 4],
        "num_key_value_heads": [1, 2],
        "head_dim": [8, 16],
        "intermediate_size": [24, 40],
        "mlp_hidden_act": ["relu2"] * 9 + ["silu"],
        "mlp_bias": [False, False, True],
        "time_step_min": [0.001, 0.001, 0.7],
        "n_routed_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "n_shared_experts": [1, 2],
        "moe_intermediate_size": [8, 16],
        "moe_shared_expert_intermediate_size": [16, 24],
        "moe_latent_size": [None, 12],
        "norm_topk_prob": [False, True],
        "routed_scaling_factor": [1.0, 2.5],
        "n_group": [1, 2],
        "topk_group": [1],
        "tie_word_embeddings": [False] * 9 + [True],
    },
    "granitemoehybrid": FACTORS
    | {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "rms_norm_eps")}
    | {key: COMMON[key] for key in ("hidden_act", "tie_word_embeddings", "rope_parameters")}
    | {
        "layer_types": ["some"],
        "num_attention_heads": [2, 4],
        "num_key_value_heads": [1, 2],
        "attention_bias": [False, True],
        "position_embedding_type": [None, "rope", "nope"],
        "intermediate_size": [8, 16],
        "shared_intermediate_size": [16, 24],
        "num_local_experts": [0, 4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "mamba_n_heads": [4, 8],
        "mamba_n_groups": [1, 2],
        "mamba_d_state": [6, 8],
        "mamba_d_conv": [2, 4],
        "mamba_expand": [1, 2],
        "mamba_conv_bias": [False, True],
        "mamba_proj_bias": [False, True],
        "mamba_chunk_size": [8],
    },
    "glm_moe_dsa": LATENT
    | DEEPSEEK
    | GROUPS
    | {
        "q_lora_rank": [12, 24],
        "index_topk": [4, 8, 30],
        "index_head_dim": [8, 12],
        "index_n_heads": [16, 32],  # few have scores of 0 for several keys: which is chosen is open
        "attention_bias": [False, True],
        "index_topk_freq": [1, 2, 3],
        "index_skip_topk_offset": [1, 2, 3],
    },
    "gemma": GEMMA | {"hidden_act": ["gelu_pytorch_tanh"] * 7 + ["gelu", "silu"]},
    "gemma2": GEMMA
    | WINDOWS
    | {
        "query_pre_attn_scalar": [16, 24],
        "attn_logit_softcapping": [None, 1.0, 50.0],
        "final_logit_softcapping": [None, 5.0, 30.0],
    },
    "gemma3": GEMMA
    | WINDOWS
    | {
        "query_pre_attn_scalar": [16, 24],
        "final_logit_softcapping": [None, 5.0],
        "rope_parameters": [
            {"sliding_attention": own, "full_attention": rope} for own in ROPE[:2] for rope in ROPE
        ]
        + [None],
    },
    "hunyuan_v1_moe": GROUPED
    | {
        "intermediate_size": [8, 16],
        "num_experts": [4, 8],
        "moe_topk": [1, 2, 3],
        "attention_bias": [False, True],
        "rope_parameters": ALPHA,
    },
}
"""By family; "some" in a list of layers stands for a random one."""
