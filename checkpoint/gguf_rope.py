"""How RoPE is stretched, in a GGUF file's metadata and in a config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import Keys

from checkpoint.config_reader import Settings
from checkpoint.gguf_sections import Given, Section, plain
from configs.checks import UserError

ATTENTION, ROPE = Keys.Attention, Keys.Rope

ROPE_FREQS = "rope_freqs.weight"
"""How much slower each pair turns, float32 [head_dim / 2]: Llama 3's scaling, or which pairs of
Gemma 4's heads turn at all."""

SCALING_KEYS = (
    ROPE.SCALING_TYPE,
    ROPE.SCALING_FACTOR,
    ROPE.SCALING_ORIG_CTX_LEN,
    ROPE.SCALING_YARN_BETA_FAST,
    ROPE.SCALING_YARN_BETA_SLOW,
    ROPE.SCALING_YARN_LOG_MUL,
)
_PLAIN_ALONE = ("glm-dsa",)
"""Whose indexers would turn otherwise than their attention."""
_LINEAR_ALONE = ("gemma2", "gemma3", "gemma4")
"""Whose layers with windows would turn by YaRN's factors, too."""
WHOLE, WINDOW = "full_attention", "sliding_attention"


def read_scaling(asked: Settings, architecture: str) -> dict[str, Any] | None:
    """config.json's rope_scaling, None for RoPE as it is.

    Args:
      asked: the metadata.
    """

    def name(key: str) -> str:
        return key.format(arch=architecture)

    kind = asked.text(name(ROPE.SCALING_TYPE), default="linear")
    factor = asked.number(name(ROPE.SCALING_FACTOR), default=1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    is_plain = architecture in _PLAIN_ALONE
    if kind == "linear" and architecture != "deepseek2" and not is_plain:  # which scales scores too
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or architecture in _LINEAR_ALONE or is_plain:
        raise UserError(
            f"{asked.where} has rope.scaling.type={kind!r}: only 'yarn' (but for Gemma and GLM), "
            "'linear' (but for DeepSeek and GLM) and 'none' are built"
        )
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": asked.integer(name(ROPE.SCALING_ORIG_CTX_LEN)),
        "beta_fast": asked.number(name(ROPE.SCALING_YARN_BETA_FAST), default=32.0),
        "beta_slow": asked.number(name(ROPE.SCALING_YARN_BETA_SLOW), default=1.0),
        "truncate": architecture != "gpt-oss",
    }
    multiplier = asked.number(name(ROPE.SCALING_YARN_LOG_MUL), default=0.0)
    return scaling | _read_multiplier(multiplier, architecture, asked.where)


def _read_multiplier(multiplier: float, architecture: str, where: str) -> dict[str, Any]:
    """What yarn_log_multiplier makes of the factors on sines and scores."""
    if architecture == "deepseek2":
        if not multiplier:
            raise UserError(
                f"{where} has no rope.scaling.yarn_log_multiplier, and llama.cpp then scales "
                "the rotary part of latent attention apart: not built for GGUF"
            )
        mscale = round(multiplier / 0.1, 6)
        return {"mscale": mscale, "mscale_all_dim": mscale, "attention_factor": 1.0}
    if architecture == "mistral3":
        return {"mscale": 1.0, "mscale_all_dim": multiplier} if multiplier else {}
    if multiplier:
        raise UserError(f"{where} has rope.scaling.yarn_log_multiplier={multiplier}: not built")
    return {}


def written_scaling(scaling: Mapping[str, Any] | None, architecture: str) -> dict[str, Any]:
    """Llama 3's and Gemma 4's are a tensor instead: see `FACTORS`."""
    if not scaling or scaling["rope_type"] in ("default", PROPORTIONAL):
        return {}
    if scaling["rope_type"] == "llama3":
        if FACTORS.get(architecture) is not LLAMA3:
            raise UserError(
                f"llama.cpp's {architecture} has no rope_scaling of the type 'llama3': the "
                "model can't be written as GGUF"
            )
        return {}
    written = {
        ROPE.SCALING_TYPE: scaling["rope_type"],
        ROPE.SCALING_FACTOR: float(scaling["factor"]),
    }
    if scaling["rope_type"] == "linear":
        return written
    written |= {
        ROPE.SCALING_ORIG_CTX_LEN: scaling["original_max_position_embeddings"],
        ROPE.SCALING_YARN_BETA_FAST: float(scaling["beta_fast"]),
        ROPE.SCALING_YARN_BETA_SLOW: float(scaling["beta_slow"]),
    }
    if architecture == "deepseek2":
        written[ROPE.SCALING_YARN_LOG_MUL] = 0.1 * scaling["mscale_all_dim"]
    elif architecture == "mistral3" and "mscale_all_dim" in scaling:
        written[ROPE.SCALING_YARN_LOG_MUL] = float(scaling["mscale_all_dim"])
    return written


@dataclass(frozen=True)
class Factors:
    """What `ROPE_FREQS` and a config.json say of each other."""

    write: Callable[[Mapping[str, Any]], np.ndarray | None]
    """The tensor; None for models without."""
    read: Callable[[np.ndarray | None, Mapping[str, Any], str], dict[str, Any]]
    """(the tensor, None in files without; config.json so far; the file) -> config.json's names."""


def _write_llama3(values: Mapping[str, Any]) -> np.ndarray | None:
    scaling = values.get("rope_scaling")
    if not scaling or scaling["rope_type"] != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    width, base = values["head_dim"], values["rope_theta"]
    turns_C = base ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    turns_C *= scaling["original_max_position_embeddings"]
    kept_C = np.clip((turns_C - low) / (high - low), 0, 1)
    return (1 / (kept_C + (1 - kept_C) / scaling["factor"])).astype(np.float32)


def _read_llama3(
    factors_C: np.ndarray | None, values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The scaling whose factors the tensor has: the file keeps only what it makes of it, and all
    Llama models share the rest.
    """
    if factors_C is None:
        return {}
    asked = Settings(dict(values), where)
    if asked.number("rope_theta") <= 1:
        raise UserError(f"{where} has rope.freq_base={values['rope_theta']}, expected more than 1")
    _check_pairs(factors_C, asked.integer("head_dim"), where)
    scaling = {
        "rope_type": "llama3",
        "factor": plain(float(factors_C.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    again = _write_llama3({**values, "rope_scaling": scaling})
    if again is None or again.shape != factors_C.shape or not np.allclose(again, factors_C, 1e-3):
        raise UserError(
            f"{where} has {ROPE_FREQS} that is not Llama 3's scaling by factors of 1 to "
            f"{factors_C.max():.3g}: read the model's Hugging Face form"
        )
    return {"rope_scaling": scaling}


def _check_pairs(factors_C: np.ndarray, head_dim: int, where: str) -> None:
    if factors_C.ndim != 1 or head_dim != 2 * factors_C.size:
        raise UserError(
            f"{where} has {ROPE_FREQS} of shape {factors_C.shape} and heads of width "
            f"{head_dim}, expected one factor for each two"
        )


LLAMA3 = Factors(_write_llama3, _read_llama3)
PROPORTIONAL = "proportional"
"""The rope_type that turns the first pairs of a whole head alone."""
_STILL = 1e30
"""How much slower llama.cpp's converter lets the others turn: not at all, in float32."""


def _write_proportional(values: Mapping[str, Any]) -> np.ndarray:
    rope, width = values["rope_parameters"][WHOLE], values["global_head_dim"]
    is_whole = rope["rope_type"] != PROPORTIONAL
    turned = width // 2 if is_whole else round(rope["partial_rotary_factor"] * width) // 2
    return np.where(np.arange(width // 2) < turned, 1.0, _STILL).astype(np.float32)


def _read_proportional(
    factors_C: np.ndarray | None, values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    if factors_C is None:
        raise UserError(
            f"{where} has no {ROPE_FREQS}, which tells how many pairs of its heads turn in layers "
            "without windows: get the file again"
        )
    width = values["global_head_dim"]
    _check_pairs(factors_C, width, where)
    turned = int((factors_C == 1).sum())
    if (factors_C[:turned] != 1).any() or (factors_C[turned:] < _STILL / 1e10).any():
        raise UserError(
            f"{where} has {ROPE_FREQS} of {factors_C.min():.3g} to {factors_C.max():.3g}, expected "
            f"1 for the first pairs of a head and {_STILL:g} for the others: nothing else is built"
        )
    ropes = values["rope_parameters"]
    if turned == factors_C.size:
        return {}
    share = {"rope_type": PROPORTIONAL, "partial_rotary_factor": turned_share(turned, width)}
    return {"rope_parameters": {**ropes, WHOLE: {**ropes[WHOLE], **share}}}


def turned_share(pairs: int, width: int) -> float:
    """partial_rotary_factor of a head of which so many pairs turn: what transformers makes of it is
    rounded down, so it is never too small.
    """
    share = 2 * pairs / width
    return share if int(share * width // 2) == pairs else math.nextafter(share, 1.0)


FACTORS = {
    "llama": LLAMA3,
    "llama4": LLAMA3,
    "gemma4": Factors(_write_proportional, _read_proportional),
}
"""Of the architectures whose graphs read the tensor."""


def by_kind(architecture: str, window_base: float | None) -> Section:
    """RoPE told by kind of layer; where there are windows it is not stretched.

    Args:
      window_base: theirs where a file doesn't say it; None: that of the others.
    """

    def read(given: Given) -> dict[str, Any]:
        base, scaling = given.values["rope_theta"], given.values["rope_scaling"]
        own = given.get(ROPE.FREQ_BASE_SWA, base if window_base is None else window_base)
        ropes = {
            WHOLE: {**scaling, "rope_theta": base},
            WINDOW: {"rope_type": "default", "rope_theta": own},
        }
        return {"rope_scaling": None, "rope_parameters": ropes}

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        ropes = values["rope_parameters"]
        return {
            ROPE.FREQ_BASE: float(ropes[WHOLE]["rope_theta"]),
            ROPE.FREQ_BASE_SWA: float(ropes[WINDOW]["rope_theta"]),
            **written_scaling(ropes[WHOLE], architecture),
        }

    return Section((ROPE.FREQ_BASE, ROPE.FREQ_BASE_SWA), read, write)


def _read_growth(given: Given) -> dict[str, Any]:
    """Queries that grow with their position, told among RoPE's keys."""
    length = given.get(ROPE.SCALING_ORIG_CTX_LEN, given.get(Keys.LLM.CONTEXT_LENGTH))
    growth = {
        "llama_4_scaling_beta": given.get(ATTENTION.TEMPERATURE_SCALE, 0.0),
        "original_max_position_embeddings": length,
    }
    return {"rope_scaling": given.values["rope_scaling"] | growth}


def _write_growth(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = values["rope_parameters"]
    written = written_scaling(rope, "mistral3")
    if rope["llama_4_scaling_beta"]:
        written[ATTENTION.TEMPERATURE_SCALE] = float(rope["llama_4_scaling_beta"])
        written[ROPE.SCALING_ORIG_CTX_LEN] = rope["original_max_position_embeddings"]
    return written


GROWING_QUERIES = Section((ATTENTION.TEMPERATURE_SCALE,), _read_growth, _write_growth)
"""Of mistral3."""


def _sections(rotary: int) -> list[int]:
    """Pairs that turn by the positions in time, height and width, one after the other, and by a
    fourth."""
    pairs = rotary // 2
    return [-(-pairs // 3), -(-(pairs - 1) // 3), pairs // 3, 0]


def _read_interleaved(given: Given) -> dict[str, Any]:
    rotary = given.integer(ROPE.DIMENSION_COUNT)
    found = given.get(ROPE.DIMENSION_SECTIONS)
    is_list = isinstance(found, list) and len(found) == 4 and all(type(x) is int for x in found)
    if not is_list or not _turn_as_text(found, rotary // 2):
        raise UserError(
            f"{given.where} has {given.name(ROPE.DIMENSION_SECTIONS)}={str(found)[:60]}, expected "
            f"something like {_sections(rotary)}: text would not turn as by plain RoPE"
        )
    return {}


def _turn_as_text(sections: Sequence[int], pairs: int) -> bool:
    """Whether no pair turns by the fourth position, which text has none of: they turn by each of
    the first three in turn, as long as its section goes."""
    total = sum(sections)
    if min(sections) < 0 or not total:
        return False
    places = (pair % total for pair in range(min(pairs, total)))
    return all(place < 3 * sections[place % 3] for place in places)


def _write_interleaved(values: Mapping[str, Any]) -> dict[str, Any]:
    rotary = round(values["partial_rotary_factor"] * values["head_dim"])
    return {ROPE.DIMENSION_SECTIONS: _sections(rotary)}


INTERLEAVED = Section((ROPE.DIMENSION_SECTIONS,), _read_interleaved, _write_interleaved)
"""Interleaved M-RoPE, which turns text as plain RoPE does."""
