"""Parts of config.json that several families share, each read and written side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from checkpoint.config_reader import Settings
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from configs.rope import LinearRopeConfig, Llama3RopeConfig, RopeScaling, YarnConfig

MAX_LAYERS = 4096
"""More than any model has."""

ROPE_TYPES = ("default", "dynamic", "linear", "yarn", "llama3")
"""Dynamic is plain RoPE here: its base begins to grow past max_position_embeddings, where a model's
context_length ends, whatever else it says (transformers' modeling_rope_utils)."""

PLACES = 12
"""Of mscale worked out of factors: without the last digits, what is written reads back the same."""


def read_model(
    settings: Settings, layers: Sequence[LayerSpec], *, norm_eps: float, **extra: Any
) -> ModelConfig:
    """What every family has, around its layers.

    Args:
      norm_eps: the family's own, where the config doesn't say.
    """
    settings.expect("hidden_act", "silu", "swish")
    settings.expect("mlp_bias", _has_dense_bias(layers))
    prefix, pattern = folded(layers)
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        d_model=settings.integer("hidden_size"),
        num_layers=len(layers),
        prefix=prefix,
        pattern=pattern,
        context_length=settings.integer("max_position_embeddings"),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        norm_eps=settings.number("rms_norm_eps", default=norm_eps),
        **extra,
    )


def read_num_layers(settings: Settings) -> int:
    """Bounded: each layer is a value of its own on the way to a ModelConfig."""
    return settings.integer("num_hidden_layers", most=MAX_LAYERS)


def write_model(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "mlp_bias": _has_dense_bias(unfolded(config)),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _has_dense_bias(layers: Sequence[LayerSpec]) -> bool:
    return any(isinstance(layer.ffn, DenseConfig) and layer.ffn.bias for layer in layers)


def folded(layers: Sequence[LayerSpec]) -> tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]:
    """(prefix, pattern): dense layers before the first experts, then the shortest period of the
    rest.
    """
    moe = [i for i, layer in enumerate(layers) if isinstance(layer.ffn, MoEConfig)]
    first = moe[0] if moe else 0
    rest = tuple(layers[first:])
    period = next(n for n in range(1, len(rest) + 1) if len(rest) % n == 0 and _repeats(rest, n))
    return tuple(layers[:first]), rest[:period]


def _repeats(layers: Sequence[LayerSpec], period: int) -> bool:
    return all(layer == layers[i % period] for i, layer in enumerate(layers))


def unfolded(config: ModelConfig) -> list[LayerSpec]:
    """Every layer in order: what `folded` was given."""
    return [*config.prefix, *config.pattern * config.num_periods]


def the_one(values: Sequence[Any], what: str) -> Any:
    """The value that all layers share.

    Raises:
      UserError: layers differ, or none has such a part: the family can't say it.
    """
    if not values or any(value != values[0] for value in values):
        count = f"{len(set(values))} kinds of it" if values else "no layer with it"
        raise UserError(f"this family has one {what} for all layers, the model has {count}")
    return values[0]


def the_dense(config: ModelConfig) -> DenseConfig:
    """The feed-forward layer of a model whose layers share it.

    Raises:
      UserError: they don't, or it has experts.
    """
    ffn = the_one([layer.ffn for layer in unfolded(config)], "feed-forward layer")
    if not isinstance(ffn, DenseConfig):
        raise UserError("this family has dense layers, the model has experts")
    return ffn


def read_grouped_query(
    settings: Settings,
    *,
    rope_base: float = 10_000.0,
    rope: Mapping[str, Any] | None = None,
    bias: bool | None = None,
    **extra: Any,
) -> AttentionConfig:
    """
    Args:
      rope_base, rope: the family's own base and rope_parameters, where the config doesn't say.
      bias: the family's, if its config has no attention_bias.
    """
    heads = settings.integer("num_attention_heads")
    base, scaling = read_rope(settings, rope_base, rope)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads", default=heads),
        head_dim=settings.integer("head_dim", default=settings.integer("hidden_size") // heads),
        rope_base=base,
        rope_scaling=scaling,
        bias=settings.flag("attention_bias", default=False) if bias is None else bias,
        **extra,
    )


def write_grouped_query(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        **write_rope(attention.rope_base, attention.rope_scaling),
    }


def grouped_query(config: ModelConfig) -> AttentionConfig:
    """The one attention of a model whose layers share it.

    Raises:
      UserError: they don't, or it is of another kind.
    """
    return the_one(grouped_queries(config), "attention")


def grouped_queries(config: ModelConfig) -> list[AttentionConfig]:
    """Each layer's attention.

    Raises:
      UserError: one is of another kind.
    """
    attentions = [layer.attention for layer in unfolded(config)]
    found = [each for each in attentions if isinstance(each, AttentionConfig)]
    if len(found) != len(attentions):
        kinds = sorted({each.kind for each in attentions})
        raise UserError(
            f"this family has attention.kind='grouped_query', the model has {', '.join(kinds)}"
        )
    return found


NO_WINDOWS: Mapping[str, Any] = {"use_sliding_window": False, "sliding_window": None}


def expect_no_windows(settings: Settings) -> None:
    """Of Qwen's families, whose engines differ in which layers have one."""
    settings.expect("use_sliding_window", False)
    kinds = settings.items("layer_types", of=str, default=[])
    if set(kinds) - {"full_attention"}:
        raise UserError(
            f"{settings.where} has layer_types with {sorted(set(kinds))}: only 'full_attention' is "
            "built for this family"
        )


def read_softmax_router(
    settings: Settings, *, normalize: bool, auxiliary: float, bias: bool = False
) -> RouterConfig:
    """The router of Mixtral, Qwen3-MoE, OLMoE and gpt-oss."""
    return RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        normalize_gates=normalize,
        load_balance_weight=settings.number("router_aux_loss_coef", default=auxiliary),
        bias=bias,
        z_loss_weight=0.0,
    )


def write_softmax_router(router: RouterConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.load_balance_weight,
        "output_router_logits": False,
    }


def the_moe(config: ModelConfig) -> MoEConfig:
    """The experts that all MoE layers share."""
    ffns = [layer.ffn for layer in unfolded(config) if isinstance(layer.ffn, MoEConfig)]
    return the_one(ffns, "form of its MoE layers")


def read_rope(
    settings: Settings, base: float, default: Mapping[str, Any] | None = None
) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from the keys of transformers 5 (rope_parameters) or from the older
    ones (rope_theta, rope_scaling), in transformers' order: a rope_scaling goes before
    rope_parameters, and a base inside the one that counts before a rope_theta beside it
    (RotaryEmbeddingConfigMixin.convert_rope_params_to_dict).

    Args:
      base: the family's own, where the config doesn't say.
      default: the family's rope_parameters, where the config has neither.
    """
    settings.expect("partial_rotary_factor", 1.0)
    beside = settings.number("rope_theta", default=base)
    parts = (settings.part(name) for name in ("rope_scaling", "rope_parameters"))
    given = next((part for part in parts if part is not None and part.values), None)
    if given is None and default is None:
        return beside, None
    given = given or Settings(dict(default or {}), f"{settings.where}: rope_parameters")
    theta = given.number("rope_theta", default=beside)
    given.expect("partial_rotary_factor", 1.0)
    for name, value in given.values.items():
        if isinstance(value, dict):
            raise UserError(f"{given.where} has {name}={value}: one rotation for all is built")
    kind = given.text("rope_type", "type", choices=ROPE_TYPES, default="default")
    if kind not in ("default", "yarn") and "kv_lora_rank" in settings:
        given.expect("mscale_all_dim", None, 0)  # transformers scales latent attention by it
    if kind == "llama3":
        return theta, _read_llama3(given, settings)
    if kind == "linear":
        return theta, LinearRopeConfig(factor=given.number("factor"))
    if kind == "yarn":
        return theta, _read_yarn(given, settings)
    assert kind in ("default", "dynamic"), kind
    return theta, None


def _read_llama3(given: Settings, settings: Settings) -> Llama3RopeConfig:
    return Llama3RopeConfig(
        factor=given.number("factor"),
        low_freq_factor=given.number("low_freq_factor"),
        high_freq_factor=given.number("high_freq_factor"),
        original_length=_original_length(given, settings),
    )


def _original_length(given: Settings, settings: Settings) -> int:
    whole = settings.integer("max_position_embeddings")
    return given.integer("original_max_position_embeddings", default=whole)


def _read_yarn(given: Settings, settings: Settings) -> YarnConfig:
    original = _original_length(given, settings)
    whole = settings.integer("max_position_embeddings")
    factor = given.number("factor", default=whole / original)
    mscale, rotary_scale = _read_scales(given, factor, is_latent="kv_lora_rank" in settings)
    return YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=given.number("beta_fast", default=32.0),
        beta_slow=given.number("beta_slow", default=1.0),
        mscale=mscale,
        rotary_scale=rotary_scale,
        truncate=given.flag("truncate", default=True),
    )


def _read_scales(given: Settings, factor: float, *, is_latent: bool) -> tuple[float, float]:
    """YaRN's mscale and rotary_scale.

    Two factors stand for them in the wild: attention_factor on sines and cosines, which turn all of
    a head in grouped-query attention, so that its square is the logits', but a part of a head in
    latent attention; and mscale_all_dim on latent attention's scores (DeepSeek), with the sines'
    own divided out of attention_factor.
    """
    growth = _growth(factor)
    turned, whole = given.number("mscale", default=0.0), given.number("mscale_all_dim", default=0.0)
    if whole < 0:
        raise UserError(f"{given.where} has mscale_all_dim={whole}, below 0")
    both = bool(turned and whole)
    ratio = (growth * turned + 1) / (growth * whole + 1) if both else growth + 1
    ratio = given.number("attention_factor", default=ratio)
    if ratio <= 0:
        raise UserError(
            f"{given.where} has mscale={turned} or attention_factor={ratio}, which leave nothing "
            "of the scores: the factor must be greater than 0"
        )
    if is_latent or not growth:
        return (whole if growth else 1.0), ratio
    return round((ratio - 1) / growth, PLACES), 1.0


def _write_scales(yarn: YarnConfig, *, is_latent: bool) -> dict[str, float]:
    """mscale says it to engines that know no attention_factor, as DeepSeek's own code."""
    growth = _growth(yarn.factor)
    root = growth * yarn.mscale + 1
    if not is_latent:
        is_default = yarn.mscale == yarn.rotary_scale == 1.0
        return {} if is_default else {"attention_factor": root * yarn.rotary_scale}
    scales = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale}
    if growth and yarn.rotary_scale != 1.0:
        scales["mscale"] = round((root * yarn.rotary_scale - 1) / growth, PLACES)
    if yarn.rotary_scale != 1.0 or yarn.mscale == 0.0:
        scales["attention_factor"] = yarn.rotary_scale
    return scales


def _growth(factor: float) -> float:
    return 0.1 * math.log(factor) if factor > 1 else 0.0


def write_rope(
    base: float, scaling: RopeScaling | None, *, is_latent: bool = False
) -> dict[str, Any]:
    """Both generations of keys: other engines read one or the other."""
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        return {"rope_theta": base, "rope_scaling": None, "rope_parameters": parameters}
    parameters = {"factor": scaling.factor}
    if not isinstance(scaling, LinearRopeConfig):
        parameters["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, Llama3RopeConfig):
        parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    elif isinstance(scaling, YarnConfig):
        parameters |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        parameters |= _write_scales(scaling, is_latent=is_latent)
    elif not isinstance(scaling, LinearRopeConfig):
        assert_never(scaling)
    kinds = {"rope_type": scaling.kind, "type": scaling.kind}
    return {
        "rope_theta": base,
        "rope_scaling": parameters | kinds,
        "rope_parameters": parameters | {"rope_type": scaling.kind, "rope_theta": base},
    }
