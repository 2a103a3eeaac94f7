"""Kimi Linear (2025): three Kimi delta nets before each latent attention without positions, experts
as DeepSeek-V3's.

transformers writes dense layers by the names of experts; the released files have them as others do.
"""

from collections.abc import Sequence
from typing import Any

from checkpoint import gguf_layers, gguf_pairs, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, deepseek_moe, delta_net, latent, weight_maps
from checkpoint.families.base import GGUF, Family
from checkpoint.families.delta_net import FULL, LINEAR
from checkpoint.families.weight_maps import ATTENTION, LAYER
from checkpoint.gguf_values import NEGATIVE_RATE
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from configs.recurrent_attention import GatedDeltaConfig

DEFAULTS = {
    "vocab_size": 163_840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
    "max_position_embeddings": 1_048_576,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
}
"""Values of transformers\' KimiLinearConfig for keys that a config.json leaves out."""

NAMES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
"""Released names of keys, and the names that DeepSeek's sections read."""
PARTS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""The same of linear_attn_config."""


def read_config(settings: Settings) -> ModelConfig:
    settings.expect("moe_router_activation_func", "sigmoid")
    settings.expect("mla_use_nope", True)
    kinds = _read_kinds(settings)
    settings = _renamed(settings)
    attention = LatentAttentionConfig(**latent.read_sizes(settings), has_rope=False)
    router = deepseek_moe.biased_router(settings)
    layers = deepseek_moe.read_layers(settings, attention, router, goes_by_list=True)
    layers = delta_net.with_attentions(layers, kinds, _read_delta(settings))
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _renamed(settings: Settings) -> Settings:
    """The settings with the names that others have for them; 1 dense layer where none is said."""
    part = settings.part("linear_attn_config")
    inner = {} if part is None else part.values
    values = {"first_k_dense_replace": 1, **settings.values}
    values |= {ours: values[own] for own, ours in NAMES.items() if own in values}
    values |= {ours: inner[own] for own, ours in PARTS.items() if own in inner}
    if "num_local_experts" in values:
        values["n_routed_experts"] = values["num_local_experts"]
    return Settings(values, settings.where, settings.defaults)


def _read_delta(settings: Settings) -> GatedDeltaConfig:
    width = settings.integer("linear_head_dim")
    return GatedDeltaConfig(
        num_heads=settings.integer("linear_num_heads"),
        key_head_dim=width,
        value_head_dim=width,
        conv_width=settings.integer("linear_conv_kernel_dim"),
        decay="channel",
        output_gate="sigmoid",
        gate_rank=width,
    )


def _read_kinds(settings: Settings) -> list[str]:
    """layer_types, or the lists of linear_attn_config, which count layers from 1."""
    count = config_sections.read_num_layers(settings)
    default = [FULL if i and i % delta_net.EVERY == 0 else LINEAR for i in range(count)]
    part = settings.part("linear_attn_config")
    if part is not None and "full_attn_layers" in part and "kda_layers" in part:
        default = _from_lists(part, count)
    return delta_net.read_kinds(settings, default)


def _from_lists(part: Settings, count: int) -> list[str]:
    lists = {FULL: "full_attn_layers", LINEAR: "kda_layers"}
    places = {kind: part.items(name, of=int) for kind, name in lists.items()}
    if sorted([*places[FULL], *places[LINEAR]]) != list(range(1, count + 1)):
        raise UserError(
            f"{part.where} has full_attn_layers={places[FULL]} and kda_layers={places[LINEAR]}, "
            f"expected each of the layers 1 to {count} in one of them"
        )
    return [FULL if i + 1 in places[FULL] else LINEAR for i in range(count)]


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = [layer.attention for layer in config_sections.unfolded(config)]
    deltas = [each for each in attentions if isinstance(each, GatedDeltaConfig)]
    latents = [each for each in attentions if isinstance(each, LatentAttentionConfig)]
    if len(deltas) + len(latents) != len(attentions):
        kinds = sorted({each.kind for each in attentions})
        raise UserError(
            "this family has attention.kind='gated_delta' and 'latent', the model has "
            f"{', '.join(kinds)}"
        )
    attention = config_sections.the_one(latents, "latent attention")
    values = {
        **config_sections.write_model(config),
        **deepseek_moe.write_layers(config),
        **latent.write_sizes(attention),
        "mla_use_nope": True,
        **_write_deltas(config_sections.the_one(deltas, "delta net"), attentions),
        "mlp_layer_types": _dense_places(config_sections.unfolded(config)),
        "num_local_experts": config_sections.the_moe(config).num_experts,
        "moe_router_activation_func": "sigmoid",
        "pad_token_id": None,
    }
    return values | {own: values[ours] for own, ours in NAMES.items()}


def _write_deltas(delta: GatedDeltaConfig, attentions: Sequence[Any]) -> dict[str, Any]:
    is_delta = [isinstance(each, GatedDeltaConfig) for each in attentions]
    own = {
        "linear_head_dim": delta.key_head_dim,
        "linear_num_heads": delta.num_heads,
        "linear_conv_kernel_dim": delta.conv_width,
    }
    return {
        **own,
        "layer_types": [LINEAR if each else FULL for each in is_delta],
        "linear_attn_config": {
            "full_attn_layers": [i + 1 for i, each in enumerate(is_delta) if not each],
            "kda_layers": [i + 1 for i, each in enumerate(is_delta) if each],
            **{theirs: own[ours] for theirs, ours in PARTS.items()},
        },
    }


def _dense_places(layers: Sequence[LayerSpec]) -> list[str]:
    has_experts = [layer.ffn.kind == "moe" for layer in layers]
    return [deepseek_moe.SPARSE if each else deepseek_moe.DENSE for each in has_experts]


DELTA = (
    *delta_net.separate(f"{ATTENTION}.{{x}}_proj.weight", f"{ATTENTION}.{{x}}_conv1d.weight"),
    Row("layers.*.attention.beta", f"{ATTENTION}.b_proj.weight", "h d -> d h"),
    Row("layers.*.attention.decay_in", f"{ATTENTION}.f_a_proj.weight", "m d -> d m"),
    Row("layers.*.attention.decay_out", f"{ATTENTION}.f_b_proj.weight", "(h c) m -> m h c"),
    Row("layers.*.attention.decay_bias", f"{ATTENTION}.dt_bias", "(h c) -> h c"),
    Row("layers.*.attention.log_rate", f"{ATTENTION}.A_log", "u w h x -> h"),
    Row("layers.*.attention.gate_in", f"{ATTENTION}.g_a_proj.weight", "m d -> d m"),
    Row("layers.*.attention.gate_out", f"{ATTENTION}.g_b_proj.weight", "(h c) m -> m h c"),
    Row("layers.*.attention.norm.scale", f"{ATTENTION}.o_norm.weight", "c -> c"),
)
"""The result's projection has the name that latent attention's has."""

MOE = f"{LAYER}.block_sparse_moe"

BLOCK = gguf_weight_maps.BLOCK
GGUF_DELTA = (
    *delta_net.separate(
        f"{BLOCK}.attn_{{x}}.weight", f"{BLOCK}.ssm_conv1d_{{x}}.weight", "u n w t -> t n"
    ),
    Row("layers.*.attention.beta", f"{BLOCK}.ssm_beta.weight", "h d -> d h"),
    Row("layers.*.attention.decay_in", f"{BLOCK}.ssm_f_a.weight", "m d -> d m"),
    Row("layers.*.attention.decay_out", f"{BLOCK}.ssm_f_b.weight", "(h c) m -> m h c"),
    Row("layers.*.attention.decay_bias", f"{BLOCK}.ssm_dt.bias", "(h c) -> h c"),
    Row("layers.*.attention.log_rate", f"{BLOCK}.ssm_a", "u w h x -> h", values=NEGATIVE_RATE),
    Row("layers.*.attention.gate_in", f"{BLOCK}.ssm_g_a.weight", "m d -> d m"),
    Row("layers.*.attention.gate_out", f"{BLOCK}.ssm_g_b.weight", "(h c) m -> m h c"),
    Row("layers.*.attention.norm.scale", f"{BLOCK}.ssm_norm.weight", "c -> c"),
)

KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.LATENT,
        *DELTA,
        *weight_maps.DENSE,
        Row("layers.*.moe.router", f"{MOE}.gate.weight", "e d -> d e"),
        Row("layers.*.moe.state.bias_E", f"{MOE}.gate.e_score_correction_bias", "e -> e"),
        *weight_maps.experts(f"{MOE}.experts.{{e}}", "w1", "w3", "w2"),
        *weight_maps.swiglu("layers.*.moe.shared", f"{MOE}.shared_experts"),
    ),
    renames=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    gguf=GGUF(
        "kimi-linear",
        (*gguf_weight_maps.DEEPSEEK2, *GGUF_DELTA),
        (
            *gguf_pairs.LATENT,
            (gguf_pairs.SSM.CONV_KERNEL, "linear_conv_kernel_dim"),
            (gguf_pairs.KDA.HEAD_DIM, "linear_head_dim"),
        ),
        fixed={
            **gguf_pairs.DEEPSEEK_MOE_FIXED,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
        },
        sections=(
            gguf_sections.LATENT,
            gguf_layers.keys_by_layer((LINEAR, FULL), latent_heads=1),
            gguf_layers.KIMI_HEADS,
            gguf_sections.UNTIED,
        ),
    ),
)
