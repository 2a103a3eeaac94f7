"""Config sections of DeepSeek's experts, which other families have behind other attentions: dense
layers before experts, shared experts, a router with groups and a bias on the choice."""

from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig

DENSE, SPARSE = "dense", "sparse"


def read_layers(
    settings: Settings, attention: Attention, router: RouterConfig, *, goes_by_list: bool = False
) -> list[LayerSpec]:
    """
    Args:
      goes_by_list: whether mlp_layer_types counts, where it is given.
    """
    settings.expect("moe_layer_freq", 1)
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
    if goes_by_list:
        kinds = read_kinds(settings, kinds)
    return [LayerSpec(attention=attention, ffn=dense if k == DENSE else moe) for k in kinds]


def read_kinds(settings: Settings, default: list[str]) -> list[str]:
    """mlp_layer_types: which layers are dense."""
    kinds = settings.items("mlp_layer_types", of=str, default=default)
    if len(kinds) != len(default) or not set(kinds) <= {DENSE, SPARSE}:
        raise UserError(
            f"{settings.where} has mlp_layer_types={kinds}, expected {DENSE!r} or {SPARSE!r} for "
            f"each of num_hidden_layers={len(default)}"
        )
    return kinds


def write_layers(config: ModelConfig) -> dict[str, Any]:
    moe, ffns = config_sections.the_moe(config), [x.ffn for x in config_sections.unfolded(config)]
    dense = [ffn for ffn in ffns if isinstance(ffn, DenseConfig)]
    width = config_sections.the_one(dense, "dense layer").d_ff if dense else moe.d_ff
    return {
        "intermediate_size": width,
        "first_k_dense_replace": ffns.index(moe),
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


def read_router(settings: Settings) -> RouterConfig:
    """Of V3, whose scoring_func and topk_method transformers 5 leaves out: there are no others."""
    settings.expect("scoring_func", "sigmoid")
    settings.expect("topk_method", "noaux_tc")
    return biased_router(settings)


def biased_router(settings: Settings) -> RouterConfig:
    """Sigmoid scores and a bias on the choice."""
    groups, best = read_groups(settings)
    return RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        scores="sigmoid",
        normalize_gates=settings.flag("norm_topk_prob", default=True),
        gate_scale=settings.number("routed_scaling_factor", default=2.5),
        num_groups=groups,
        top_groups=best,
        balance="loss_free",
        bias_rate=1e-3,
        load_balance_weight=0.0,
        sequence_weight=settings.number("aux_loss_alpha", default=1e-4),
        z_loss_weight=0.0,
    )


def read_groups(settings: Settings) -> tuple[int | None, int | None]:
    """A router's num_groups and top_groups; None where all groups may be chosen from."""
    groups = settings.integer("n_group", default=1)
    best = settings.integer("topk_group", default=1)
    return (None, None) if groups == best else (groups, best)
