"""OLMo Hybrid (2026): three gated delta nets before each attention, which alone has its norms after
the branches; RoPE in it where rope_theta is not null.
"""

import dataclasses
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, delta_net, rope_section, weight_maps
from checkpoint.families.base import Family
from checkpoint.families.delta_net import FULL, IN_DELTA, LINEAR, NET
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig

DEFAULTS = {
    "vocab_size": 100_352,
    "hidden_size": 3840,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "max_position_embeddings": 65_536,
    "linear_conv_kernel_dim": 4,
}
"""Values of transformers\' OlmoHybridConfig for keys that a config.json leaves out."""
NORM_EPS = 1e-5
"""Of the norm inside a delta net, whatever rms_norm_eps the others have."""


def read_config(settings: Settings) -> ModelConfig:
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    full = LayerSpec(attention=_read_attention(settings), ffn=ffn, norms="post")
    linear = LayerSpec(attention=_read_delta(settings), ffn=ffn)
    layers = [linear if kind == LINEAR else full for kind in _read_kinds(settings)]
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def _read_kinds(settings: Settings) -> list[str]:
    count = config_sections.read_num_layers(settings)
    default = [LINEAR if (i + 1) % delta_net.EVERY else FULL for i in range(count)]
    if FULL not in default:
        default[-1] = FULL
    return delta_net.read_kinds(settings, default)


def _read_attention(settings: Settings) -> AttentionConfig:
    if _has_rope(settings):
        return config_sections.read_grouped_query(settings, qk_norm="all")
    values = {k: v for k, v in settings.values.items() if not k.startswith("rope_")}
    plain = Settings(values, settings.where, settings.defaults)
    attention = config_sections.read_grouped_query(plain, qk_norm="all")
    return dataclasses.replace(attention, rotary_dim=0)


def _has_rope(settings: Settings) -> bool:
    """A rope_theta of null says that there is none; one that is left out does not."""
    given = rope_section.rope_keys(settings)
    inner = {} if given is None else given.values
    for values in (inner, settings.values):
        if "rope_theta" in values:
            return values["rope_theta"] is not None
    return True


def _read_delta(settings: Settings) -> GatedDeltaConfig:
    heads = settings.integer("num_attention_heads")
    key_heads = settings.integer("linear_num_key_heads", default=heads)
    width = int(0.75 * settings.integer("hidden_size") / key_heads)
    width = settings.integer("linear_key_head_dim", default=width)
    values = {
        **settings.values,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": settings.integer("linear_num_value_heads", default=heads),
        "linear_key_head_dim": width,
        "linear_value_head_dim": settings.integer("linear_value_head_dim", default=2 * width),
    }
    doubled = settings.flag("linear_allow_neg_eigval", default=True)
    whole = Settings(values, settings.where, settings.defaults)
    return delta_net.read_delta(whole, doubled_beta=doubled, norm_eps=NORM_EPS)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """
    Raises:
      UserError: feed-forward layers or one of the two attentions differ from layer to layer.
    """
    attentions = [layer.attention for layer in config_sections.unfolded(config)]
    deltas = [each for each in attentions if isinstance(each, GatedDeltaConfig)]
    values = {
        **config_sections.write_model(config),
        "pad_token_id": None,
        **delta_net.write_layers(config),
        "intermediate_size": config_sections.the_dense(config).d_ff,
        "linear_allow_neg_eigval": config_sections.the_one(deltas, "delta net").doubled_beta,
    }
    full = [each for each in attentions if isinstance(each, AttentionConfig)]
    if config_sections.the_one(full, "attention over everything").rotary_dim != 0:
        return values
    none = {"rope_theta": None, "rope_type": "default"}
    values = {k: v for k, v in values.items() if k != "partial_rotary_factor"}
    return values | {"rope_theta": None, "rope_scaling": None, "rope_parameters": none}


RENAMES = (
    (r"\.attention_layer_norm\.", ".input_layernorm."),
    (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
)
"""Released names of norms, which transformers renames as it reads, and those it holds them by."""

OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.NORMS,
        *weight_maps.POST_NORMS,
        *delta_net.beside_delta(weight_maps.grouped_query()),
        *weight_maps.QK_NORM_OF_ALL,
        *delta_net.separate(f"{NET}.{{x}}_proj.weight", f"{NET}.{{x}}_conv1d.weight"),
        Row("layers.*.attention.decay", f"{NET}.a_proj.weight", "h d -> d h 0"),
        Row("layers.*.attention.beta", f"{NET}.b_proj.weight", "h d -> d h"),
        Row("layers.*.attention.gate", f"{NET}.g_proj.weight", "(h c) d -> d h c"),
        Row("layers.*.attention.decay_bias", f"{NET}.dt_bias", "h -> h 0"),
        Row(IN_DELTA, f"{NET}.A_log", "h -> h"),
        Row("layers.*.attention.norm.scale", f"{NET}.o_norm.weight", "c -> c"),
        Row("layers.*.attention.o", f"{NET}.o_proj.weight", "d (h c) -> h c d", requires=IN_DELTA),
        *weight_maps.DENSE,
    ),
    renames=RENAMES,
)
