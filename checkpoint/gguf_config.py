"""A model's settings in a GGUF file's metadata and in a config.json, in both directions.

Each family has a table of pairs (llama.cpp's key, config.json's name, see gguf_pairs.py); what is
no pair stands in the functions: widths of heads, rotary scaling, DeepSeek's latent attention.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf.constants import ExpertGatingFuncType, Keys

from checkpoint.config_reader import Settings
from checkpoint.families import FAMILIES
from checkpoint.families.base import GGUF, Family, no_gguf
from configs.checks import UserError

LLM, ATTENTION, ROPE = Keys.LLM, Keys.Attention, Keys.Rope
Shapes = Mapping[str, tuple[int, ...]]

ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's scaling as a factor for each pair, float32 [head_dim / 2]."""

LITE_LAYERS = (26, 27)
"""By which llama.cpp tells that queries have no rank of their own."""

_HEAD_KEYS = (ATTENTION.KEY_LENGTH, ATTENTION.VALUE_LENGTH, ROPE.DIMENSION_COUNT)
"""Each is head_dim, but in latent attention."""
_SCALING_KEYS = (
    ROPE.SCALING_TYPE,
    ROPE.SCALING_FACTOR,
    ROPE.SCALING_ORIG_CTX_LEN,
    ROPE.SCALING_YARN_BETA_FAST,
    ROPE.SCALING_YARN_BETA_SLOW,
    ROPE.SCALING_YARN_LOG_MUL,
)
_IDLE = (
    LLM.VOCAB_SIZE,  # the embedding says it
    LLM.TENSOR_DATA_LAYOUT,
    ROPE.SCALING_FINETUNED,
    LLM.NEXTN_PREDICT_LAYERS,  # checked apart
)
"""Keys that change nothing that is computed."""


_LATENT_KEYS = (
    ATTENTION.HEAD_COUNT_KV,
    ATTENTION.KEY_LENGTH,
    ATTENTION.VALUE_LENGTH,
    ATTENTION.KEY_LENGTH_MLA,
    ATTENTION.VALUE_LENGTH_MLA,
    LLM.EXPERT_GATING_FUNC,
)


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Shapes, read: Callable[[str], np.ndarray], where: str
) -> dict[str, Any]:
    """The config.json that says what a GGUF file's metadata says.

    Args:
      shapes: of its tensors.
      read: gives a tensor; asked for `ROPE_FREQS` alone.
      where: the file, for sentences.
    Raises:
      UserError: an architecture that is not built, or a key that may change what is computed.
    """
    family = _family(metadata, where)
    form = _form(family)

    def get(key: str, default: Any = None) -> Any:
        return _plain(metadata.get(key.format(arch=form.architecture), default))

    values = {name: get(key) for key, name in form.pairs if get(key) is not None}
    values = {"model_type": family.model_type, "rope_theta": 10_000.0, **form.fixed, **values}
    _check_known(metadata, form, form.derived(values), where)
    values["tie_word_embeddings"] = "output.weight" not in shapes
    if "token_embd.weight" in shapes:
        values["vocab_size"] = shapes["token_embd.weight"][0]
    values |= {name: tensor in shapes for name, tensor in form.optional.items()}
    asked = Settings({key: _plain(value) for key, value in metadata.items()}, where)
    values["rope_scaling"] = _read_scaling(asked, form) or {"rope_type": "default"}
    if form.architecture == "deepseek2":
        values |= _read_latent(get, where)
    else:
        values |= _read_heads(get, values, form, where)
    if ROPE_FREQS in shapes:
        values["rope_scaling"] = _read_llama3(read(ROPE_FREQS), values, where)
    return values


def config_to_gguf(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's metadata for a config.json as the family writes it.

    Raises:
      UserError: a family, or a setting, that llama.cpp doesn't know.
    """
    form = _form(family)
    metadata: dict[str, Any] = {Keys.General.ARCHITECTURE: form.architecture}
    said = {key: values[name] for key, name in form.pairs if values.get(name) is not None}
    said[LLM.VOCAB_SIZE] = values["vocab_size"]
    said |= {**form.derived(values), **_written_scaling(values, form)}
    if form.architecture == "deepseek2":
        said |= _written_latent(values)
    else:
        said |= dict.fromkeys(_HEAD_KEYS, values["head_dim"])
        if form.turns_part:
            share = values["partial_rotary_factor"]
            said[ROPE.DIMENSION_COUNT] = round(share * values["head_dim"])
    return metadata | {key.format(arch=form.architecture): value for key, value in said.items()}


def llama3_frequencies(values: Mapping[str, Any]) -> np.ndarray | None:
    """What `ROPE_FREQS` holds for a config.json: how much slower each pair turns; None for models
    without Llama 3's scaling.
    """
    scaling = values.get("rope_scaling")
    if not scaling or scaling["rope_type"] != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    width, base = values["head_dim"], values["rope_theta"]
    turns_C = base ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    turns_C *= scaling["original_max_position_embeddings"]
    kept_C = np.clip((turns_C - low) / (high - low), 0, 1)
    return (1 / (kept_C + (1 - kept_C) / scaling["factor"])).astype(np.float32)


def _form(family: Family) -> GGUF:
    if family.gguf is None:
        raise UserError(no_gguf(family.model_type))
    return family.gguf


def _family(metadata: Mapping[str, Any], where: str) -> Family:
    """The first of those that llama.cpp knows by this architecture, and the file may be of."""
    architecture = metadata.get(Keys.General.ARCHITECTURE)
    forms = [(family, family.gguf) for family in FAMILIES if family.gguf is not None]
    for family, form in forms:
        if form.architecture == architecture and form.is_meant(metadata):
            return family
    known = ", ".join(sorted({form.architecture for _, form in forms}))
    raise UserError(
        f"{where} has general.architecture={architecture!r}; those that can be read are {known}"
    )


def _check_known(
    metadata: Mapping[str, Any], form: GGUF, derived: Mapping[str, Any], where: str
) -> None:
    """A key that nothing here reads may change what is computed."""
    known = {*(key for key, _ in form.pairs), *_HEAD_KEYS, *_SCALING_KEYS, *_IDLE, *derived}
    if form.architecture == "deepseek2":
        known |= {*_LATENT_KEYS}
    known = {key.format(arch=form.architecture) for key in known}
    known.add(LLM.EXPERT_COUNT.format(arch=form.architecture))
    for key, value in metadata.items():
        if key.startswith(f"{form.architecture}.") and key not in known:
            raise UserError(
                f"{where} has {key}={str(value)[:60]}, which may change what the model computes "
                "and is not built"
            )
    for key, value in derived.items():
        found = metadata.get(key.format(arch=form.architecture), value)
        if found != value:
            raise UserError(
                f"{where} has {key.format(arch=form.architecture)}={str(found)[:60]}, expected "
                f"{value}: nothing else is built"
            )
    modules = metadata.get(LLM.NEXTN_PREDICT_LAYERS.format(arch=form.architecture), 0)
    if modules != 0:
        raise UserError(
            f"{where} has {modules} layers of multi-token prediction, which are not read from "
            "GGUF: read the model's Hugging Face form"
        )


def _plain(value: Any) -> Any:
    """Floats as they were meant: 1e-5, which float32 keeps as 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_heads(
    get: Callable[..., Any], values: dict[str, Any], form: GGUF, where: str
) -> dict[str, Any]:
    heads, width = get(ATTENTION.HEAD_COUNT), get(LLM.EMBEDDING_LENGTH)
    head_dim = get(ATTENTION.KEY_LENGTH)
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    rotary = get(ROPE.DIMENSION_COUNT, head_dim)
    is_part = form.turns_part and type(rotary) is type(head_dim) is int and 0 < rotary <= head_dim
    if is_part:
        values = {**values, "partial_rotary_factor": rotary / head_dim}
    for key in _HEAD_KEYS:
        if get(key, head_dim) != head_dim and not (is_part and key == ROPE.DIMENSION_COUNT):
            raise UserError(
                f"{where} has {key.format(arch='*')}={get(key)} and heads of width {head_dim}: "
                "only models with one width for all of a head are built"
            )
    return {"num_key_value_heads": heads, **values, "head_dim": head_dim}


def _read_latent(get: Callable[..., Any], where: str) -> dict[str, Any]:
    """Newer files have key_length of the cached vector and key_length_mla of a head; older ones
    have key_length of a head.
    """
    key = get(ATTENTION.KEY_LENGTH_MLA, get(ATTENTION.KEY_LENGTH))
    value = get(ATTENTION.VALUE_LENGTH_MLA, get(ATTENTION.VALUE_LENGTH))
    rotary = get(ROPE.DIMENSION_COUNT)
    if any(type(x) is not int for x in (key, value, rotary)):
        raise UserError(
            f"{where} has key_length={key}, value_length={value}, rope.dimension_count={rotary}, "
            "expected whole numbers"
        )
    groups, best = get(LLM.EXPERT_GROUP_COUNT, 1), get(LLM.EXPERT_GROUP_USED_COUNT, 1)
    latent = {"qk_nope_head_dim": key - rotary, "v_head_dim": value}
    latent["num_key_value_heads"] = get(ATTENTION.HEAD_COUNT)
    latent["routed_scaling_factor"] = get(LLM.EXPERT_WEIGHTS_SCALE) or 1.0  # 0 is for none, too
    if get(LLM.EXPERT_GATING_FUNC) != ExpertGatingFuncType.SIGMOID:
        latent["topk_method"] = "greedy" if groups == best else "group_limited_greedy"
    return latent


def _read_scaling(asked: Settings, form: GGUF) -> dict[str, Any] | None:
    def name(key: str) -> str:
        return key.format(arch=form.architecture)

    kind = asked.text(name(ROPE.SCALING_TYPE), default="linear")
    factor = asked.number(name(ROPE.SCALING_FACTOR), default=1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear" and form.architecture != "deepseek2":  # which scales its scores too then
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(
            f"{asked.where} has rope.scaling.type={kind!r}: only 'yarn', 'linear' (but for "
            "DeepSeek) and 'none' are built"
        )
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": asked.integer(name(ROPE.SCALING_ORIG_CTX_LEN)),
        "beta_fast": asked.number(name(ROPE.SCALING_YARN_BETA_FAST), default=32.0),
        "beta_slow": asked.number(name(ROPE.SCALING_YARN_BETA_SLOW), default=1.0),
        "truncate": form.architecture != "gpt-oss",
    }
    multiplier = asked.number(name(ROPE.SCALING_YARN_LOG_MUL), default=0.0)
    if form.architecture == "deepseek2":
        if not multiplier:
            raise UserError(
                f"{asked.where} has no rope.scaling.yarn_log_multiplier, and llama.cpp then scales "
                "the rotary part of latent attention apart: not built for GGUF"
            )
        mscale = round(multiplier / 0.1, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale, "attention_factor": 1.0}
    elif multiplier:
        raise UserError(
            f"{asked.where} has rope.scaling.yarn_log_multiplier={multiplier}: not built"
        )
    return scaling


def _written_scaling(values: Mapping[str, Any], form: GGUF) -> dict[str, Any]:
    """Llama 3's is a tensor instead: see `llama3_frequencies`."""
    scaling = values.get("rope_scaling")
    if not scaling:
        return {}
    if scaling["rope_type"] == "llama3":
        if form.architecture != "llama":
            raise UserError(
                f"llama.cpp's {form.architecture} has no rope_scaling of the type 'llama3': the "
                "model can't be written as GGUF"
            )
        return {}
    written = {
        ROPE.SCALING_TYPE: scaling["rope_type"],
        ROPE.SCALING_FACTOR: float(scaling["factor"]),
    }
    if scaling["rope_type"] == "linear":
        return written
    return written | {
        ROPE.SCALING_ORIG_CTX_LEN: scaling["original_max_position_embeddings"],
        ROPE.SCALING_YARN_BETA_FAST: float(scaling["beta_fast"]),
        ROPE.SCALING_YARN_BETA_SLOW: float(scaling["beta_slow"]),
    }


def _written_latent(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("topk_method") == "group_limited_greedy":
        raise UserError(
            "llama.cpp judges a group by its best two experts, DeepSeek-V2's groups go by their "
            "best one: the model can't be written as GGUF"
        )
    if values["q_lora_rank"] is None and values["num_hidden_layers"] not in LITE_LAYERS:
        raise UserError(
            f"llama.cpp takes DeepSeek without a query rank for V2-Lite, of {LITE_LAYERS} layers, "
            f"the model has {values['num_hidden_layers']}: it can't be written as GGUF"
        )
    rank, rotary = values["kv_lora_rank"], values["qk_rope_head_dim"]
    is_sigmoid = values["scoring_func"] == "sigmoid"
    gating = ExpertGatingFuncType.SIGMOID if is_sigmoid else ExpertGatingFuncType.SOFTMAX
    written = {
        ATTENTION.HEAD_COUNT_KV: 1,
        ATTENTION.KEY_LENGTH: rank + rotary,
        ATTENTION.VALUE_LENGTH: rank,
        ATTENTION.KEY_LENGTH_MLA: values["qk_nope_head_dim"] + rotary,
        ATTENTION.VALUE_LENGTH_MLA: values["v_head_dim"],
        LLM.EXPERT_GATING_FUNC: int(gating),
    }
    scaling = values.get("rope_scaling")
    if scaling and scaling["rope_type"] == "yarn":
        written[ROPE.SCALING_YARN_LOG_MUL] = 0.1 * scaling["mscale_all_dim"]
    return written


def _read_llama3(factors_C: np.ndarray, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scaling whose factors the tensor has: the file keeps only what it makes of it, and all
    Llama models share the rest.
    """
    asked = Settings(dict(values), where)
    if asked.number("rope_theta") <= 1:
        raise UserError(f"{where} has rope.freq_base={values['rope_theta']}, expected more than 1")
    if factors_C.ndim != 1 or asked.integer("head_dim") != 2 * factors_C.size:
        raise UserError(
            f"{where} has {ROPE_FREQS} of shape {factors_C.shape} and heads of width "
            f"{values['head_dim']}, expected one factor for each two"
        )
    scaling = {
        "rope_type": "llama3",
        "factor": _plain(float(factors_C.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    again = llama3_frequencies({**values, "rope_scaling": scaling})
    if again is None or again.shape != factors_C.shape or not np.allclose(again, factors_C, 1e-3):
        raise UserError(
            f"{where} has {ROPE_FREQS} that is not Llama 3's scaling by factors of 1 to "
            f"{factors_C.max():.3g}: read the model's Hugging Face form"
        )
    return scaling
