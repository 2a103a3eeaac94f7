"""RoPE in config.json, in all spellings: read and written side by side."""

import math
from collections.abc import Mapping
from typing import Any, assert_never

from checkpoint.config_reader import Settings
from configs.checks import UserError
from configs.rope import LinearRopeConfig, Llama3RopeConfig, RopeScaling, YarnConfig

ROPE_TYPES = ("default", "dynamic", "linear", "yarn", "llama3")
"""Dynamic is plain RoPE here: its base begins to grow past max_position_embeddings, where a model's
context_length ends, whatever else it says (transformers' modeling_rope_utils)."""

PLACES = 12
"""Of mscale worked out of factors: without the last digits, what is written reads back the same."""


def rope_keys(settings: Settings) -> Settings | None:
    """The object that says how RoPE turns; None where the config has none."""
    parts = (settings.part(name) for name in ("rope_scaling", "rope_parameters"))
    return next((part for part in parts if part is not None and part.values), None)


def read_turned_share(settings: Settings, default: float) -> float:
    """partial_rotary_factor: inside RoPE's keys before beside them, above 0 and at most 1."""
    given = rope_keys(settings)
    beside = settings.number("partial_rotary_factor", default=default)
    share = beside if given is None else given.number("partial_rotary_factor", default=beside)
    if not 0 < share <= 1:
        raise UserError(
            f"{settings.where} has partial_rotary_factor={share}, expected a number above 0 and at "
            "most 1"
        )
    return share


def read_rope(
    settings: Settings,
    base: float,
    default: Mapping[str, Any] | None = None,
    *,
    turned_share: float = 1.0,
    is_on_sines: bool = False,
) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from the keys of transformers 5 (rope_parameters) or from the older
    ones (rope_theta, rope_scaling), in transformers' order: a rope_scaling goes before
    rope_parameters, and a base inside the one that counts before a rope_theta beside it
    (RotaryEmbeddingConfigMixin.convert_rope_params_to_dict).

    Args:
      base: the family's own, where the config doesn't say.
      default: the family's rope_parameters, where the config has neither.
      turned_share: of a head's width; not 1 only where the family may say so.
      is_on_sines: whether YaRN's attention_factor is no factor of the scores: a part of a head is
        turned, or a norm comes after.
    """
    if turned_share == 1.0:
        settings.expect("partial_rotary_factor", 1.0)
    beside = settings.number("rope_theta", default=base)
    given = rope_keys(settings)
    if given is None and default is None:
        return beside, None
    given = given or Settings(dict(default or {}), f"{settings.where}: rope_parameters")
    theta = given.number("rope_theta", default=beside)
    if turned_share == 1.0:
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
        return theta, _read_yarn(given, settings, is_on_sines=is_on_sines)
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


def _read_yarn(given: Settings, settings: Settings, *, is_on_sines: bool) -> YarnConfig:
    original = _original_length(given, settings)
    whole = settings.integer("max_position_embeddings")
    factor = given.number("factor", default=whole / original)
    mscale, rotary_scale = _read_scales(given, factor, is_latent="kv_lora_rank" in settings)
    if is_on_sines:  # all of attention_factor is on what turns
        mscale, rotary_scale = 0.0, (_growth(factor) * mscale + 1) * rotary_scale
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
    a head in most grouped-query attention, so that its square is the logits', but a part of a head
    in latent attention and where partial_rotary_factor says so; and mscale_all_dim on latent
    attention's scores (DeepSeek), with the sines' own divided out of attention_factor.
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


def _write_scales(yarn: YarnConfig, *, is_on_sines: bool) -> dict[str, float]:
    """mscale says it to engines that know no attention_factor, as DeepSeek's own code."""
    growth = _growth(yarn.factor)
    root = growth * yarn.mscale + 1
    if not is_on_sines:
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
    base: float, scaling: RopeScaling | None, *, is_on_sines: bool = False
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
        parameters |= _write_scales(scaling, is_on_sines=is_on_sines)
    elif not isinstance(scaling, LinearRopeConfig):
        assert_never(scaling)
    kinds = {"rope_type": scaling.kind, "type": scaling.kind}
    return {
        "rope_theta": base,
        "rope_scaling": parameters | kinds,
        "rope_parameters": parameters | {"rope_type": scaling.kind, "rope_theta": base},
    }
