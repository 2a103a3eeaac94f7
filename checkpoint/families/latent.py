"""Config sections of the DeepSeek families: latent attention, dense layers before experts."""

from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import IndexerConfig, LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig

DENSE, SPARSE = "dense", "sparse"


def read_model(
    settings: Settings, router: RouterConfig, indexer: IndexerConfig | None = None
) -> ModelConfig:
    settings.expect("rope_interleave", True)
    settings.expect("moe_layer_freq", 1)
    attention = _read_attention(settings, indexer)
    moe = MoEConfig(
        num_experts=settings.integer("n_routed_experts", "num_experts", "num_local_experts"),
        d_ff=settings.integer("moe_intermediate_size"),
        num_shared_experts=settings.integer("n_shared_experts", default=0, least=0),
        router=router,
    )
    dense = DenseConfig(d_ff=settings.integer("intermediate_size"))
    count = config_sections.read_num_layers(settings)
    first = settings.integer("first_k_dense_replace", default=0, least=0)
    kinds = [DENSE if i < first else SPARSE for i in range(count)]
    if indexer is not None:  # transformers' DeepseekV32Config, alone, goes by a list
        kinds = _read_kinds(settings, kinds)
    layers = [LayerSpec(attention=attention, ffn=dense if k == DENSE else moe) for k in kinds]
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _read_kinds(settings: Settings, default: list[str]) -> list[str]:
    kinds = settings.items("mlp_layer_types", of=str, default=default)
    if len(kinds) != len(default) or not set(kinds) <= {DENSE, SPARSE}:
        raise UserError(
            f"{settings.where} has mlp_layer_types={kinds}, expected {DENSE!r} or {SPARSE!r} for "
            f"each of num_hidden_layers={len(default)}"
        )
    return kinds


def _read_attention(settings: Settings, indexer: IndexerConfig | None) -> LatentAttentionConfig:
    base, scaling = config_sections.read_rope(settings, 10_000.0)
    return LatentAttentionConfig(
        num_heads=settings.integer("num_attention_heads"),
        query_rank=settings.integer("q_lora_rank", default=None),
        latent_rank=settings.integer("kv_lora_rank"),
        nope_head_dim=settings.integer("qk_nope_head_dim"),
        rope_head_dim=settings.integer("qk_rope_head_dim"),
        value_head_dim=settings.integer("v_head_dim"),
        rope_base=base,
        rope_scaling=scaling,
        indexer=indexer,
        bias=settings.flag("attention_bias", default=False),
    )


def write_model(config: ModelConfig) -> dict[str, Any]:
    layers = config_sections.unfolded(config)
    attention = config_sections.the_one([layer.attention for layer in layers], "attention")
    if not isinstance(attention, LatentAttentionConfig):
        raise UserError(f"DeepSeek has attention.kind='latent', the model has {attention.kind!r}")
    moe, dense = config_sections.the_moe(config), [layer.ffn for layer in config.prefix]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    return {
        **config_sections.write_model(config),
        **_write_attention(attention),
        "intermediate_size": width,
        "first_k_dense_replace": len(config.prefix),
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_ff,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.router.top_k,
        "routed_scaling_factor": moe.router.gate_scale,
        "norm_topk_prob": moe.router.normalize_gates,
        "n_group": moe.router.num_groups or 1,
        "topk_group": moe.router.top_groups or 1,
        "scoring_func": moe.router.scores,
    }


def _write_attention(attention: LatentAttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.latent_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "qk_head_dim": attention.query_head_dim,
        "head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "attention_bias": attention.bias,
        "rope_interleave": True,
        **config_sections.write_rope(attention.rope_base, attention.rope_scaling, is_latent=True),
    }


def read_groups(settings: Settings) -> tuple[int | None, int | None]:
    """A router's num_groups and top_groups; None where all groups may be chosen from."""
    groups = settings.integer("n_group", default=1)
    best = settings.integer("topk_group", default=1)
    return (None, None) if groups == best else (groups, best)
