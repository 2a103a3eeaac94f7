"""Settings that are no pair of a key and a name: several keys of llama.cpp make several of
config.json's. Here are the widths of heads; gguf_rope.py and gguf_layers.py have others.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import ExpertGatingFuncType, Keys

from configs.checks import UserError

LLM, ATTENTION, ROPE = Keys.LLM, Keys.Attention, Keys.Rope

MAX_LAYERS = 4096
"""More than any model has."""

LITE_LAYERS = (26, 27)
"""By which llama.cpp tells that DeepSeek's queries have no rank of their own."""

HEAD_KEYS = (ATTENTION.KEY_LENGTH, ATTENTION.VALUE_LENGTH, ROPE.DIMENSION_COUNT)
"""Each is head_dim, but in latent attention."""


def plain(value: Any) -> Any:
    """Floats as they were meant: 1e-5, which float32 keeps as 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if isinstance(value, float) else value


@dataclass(frozen=True)
class Given:
    """A file's metadata on the way to a config.json."""

    metadata: Mapping[str, Any]
    architecture: str
    where: str
    """The file, for sentences."""
    values: Mapping[str, Any]
    """Of config.json, as far as they are known."""
    tensors: Collection[str] = ()
    """The names of the file's."""

    def name(self, key: str) -> str:
        return key.format(arch=self.architecture)

    def get(self, key: str, default: Any = None) -> Any:
        return plain(self.metadata.get(self.name(key), default))

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < least:
            raise UserError(
                f"{self.where} has {self.name(key)}={str(value)[:60]}, expected a whole number "
                f"from {least}"
            )
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise UserError(
                f"{self.where} has {self.name(key)}={str(value)[:60]}, expected true or false"
            )
        return value

    @property
    def num_layers(self) -> int:
        count = self.integer(LLM.BLOCK_COUNT)
        if count > MAX_LAYERS:
            raise UserError(f"{self.where} has {count} layers, expected at most {MAX_LAYERS}")
        return count

    def by_layer(self, key: str) -> list[int]:
        """Whole numbers: one for each layer, or one for all.

        Raises:
          UserError: the key is not there, or has something else.
        """
        value, count = self.get(key), self.num_layers
        values = [value] * count if type(value) is int else value
        is_list = isinstance(values, list) and len(values) == count
        if not is_list or any(type(x) not in (int, bool) or x < 0 for x in values):
            raise UserError(
                f"{self.where} has {self.name(key)}={str(value)[:60]}, expected a whole number "
                f"for each of {count} layers"
            )
        return values

    def the_one(self, key: str) -> int:
        """The number that all layers share which have more than 0 of it.

        Raises:
          UserError: they share none.
        """
        found = set(self.by_layer(key)) - {0}
        if len(found) != 1:
            raise UserError(
                f"{self.where} has {self.name(key)} of {sorted(found)}, expected one number in "
                "all layers that have any"
            )
        return found.pop()


@dataclass(frozen=True)
class Section:
    """What some keys and names say together, both ways."""

    keys: tuple[str, ...]
    read: Callable[[Given], dict[str, Any]]
    """config.json's names."""
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    """llama.cpp's keys; UserError where it can't say the values."""


def needs(values: Mapping[str, Any], name: str, what: str) -> Any:
    """A setting of a kind of layer that llama.cpp's architecture always has.

    Raises:
      UserError: the model has no such layer.
    """
    if values.get(name) is None:
        raise UserError(
            f"llama.cpp's models of this architecture have {what}, this one has none: it can't be "
            "written as GGUF"
        )
    return values[name]


def _read_heads(given: Given, *, turns_part: bool = False, turns: bool = True) -> dict[str, Any]:
    heads, width = given.get(ATTENTION.HEAD_COUNT), given.get(LLM.EMBEDDING_LENGTH)
    head_dim = given.get(ATTENTION.KEY_LENGTH)
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    rotary = given.get(ROPE.DIMENSION_COUNT, head_dim)
    is_part = turns_part and type(rotary) is type(head_dim) is int and 0 < rotary <= head_dim
    for key in HEAD_KEYS:
        may_differ = key == ROPE.DIMENSION_COUNT and (is_part or not turns)
        if given.get(key, head_dim) != head_dim and not may_differ:
            raise UserError(
                f"{given.where} has {key.format(arch='*')}={given.get(key)} and heads of width "
                f"{head_dim}: only models with one width for all of a head are built"
            )
    share = {"partial_rotary_factor": rotary / head_dim} if is_part else {}
    kv_heads = given.values.get("num_key_value_heads", heads)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim, **share}


def _write_heads(values: Mapping[str, Any], *, turns_part: bool = False) -> dict[str, Any]:
    head_dim = needs(values, "head_dim", "attention")
    written: dict[str, Any] = dict.fromkeys(HEAD_KEYS, head_dim)
    if turns_part:
        written[ROPE.DIMENSION_COUNT] = round(values.get("partial_rotary_factor", 1.0) * head_dim)
    return written


HEADS = Section(HEAD_KEYS, _read_heads, _write_heads)
UNTURNED_HEADS = Section(HEAD_KEYS, lambda given: _read_heads(given, turns=False), _write_heads)
"""Of attention without positions, whatever rope.dimension_count says."""
PARTLY_TURNED_HEADS = Section(
    HEAD_KEYS,
    lambda given: _read_heads(given, turns_part=True),
    lambda values: _write_heads(values, turns_part=True),
)
"""rope.dimension_count may be less than a head's width (partial_rotary_factor)."""


def _read_latent(given: Given) -> dict[str, Any]:
    """Newer files have key_length of the cached vector and key_length_mla of a head; older ones
    have key_length of a head.
    """
    key = given.get(ATTENTION.KEY_LENGTH_MLA, given.get(ATTENTION.KEY_LENGTH))
    value = given.get(ATTENTION.VALUE_LENGTH_MLA, given.get(ATTENTION.VALUE_LENGTH))
    rotary = given.get(ROPE.DIMENSION_COUNT)
    if any(type(x) is not int for x in (key, value, rotary)):
        raise UserError(
            f"{given.where} has key_length={key}, value_length={value}, "
            f"rope.dimension_count={rotary}, expected whole numbers"
        )
    groups, best = given.get(LLM.EXPERT_GROUP_COUNT, 1), given.get(LLM.EXPERT_GROUP_USED_COUNT, 1)
    latent = {"qk_nope_head_dim": key - rotary, "v_head_dim": value}
    latent["num_key_value_heads"] = given.get(ATTENTION.HEAD_COUNT)
    latent["routed_scaling_factor"] = given.get(LLM.EXPERT_WEIGHTS_SCALE) or 1.0  # 0: none, too
    if given.values.get("scoring_func") != "sigmoid":
        latent["topk_method"] = "greedy" if groups == best else "group_limited_greedy"
    return latent


def _write_latent(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("topk_method") == "group_limited_greedy":
        raise UserError(
            "llama.cpp judges a group by its best two experts, DeepSeek-V2's groups go by their "
            "best one: the model can't be written as GGUF"
        )
    rank, rotary = values["kv_lora_rank"], values["qk_rope_head_dim"]
    is_sigmoid = values["scoring_func"] == "sigmoid"
    gating = ExpertGatingFuncType.SIGMOID if is_sigmoid else ExpertGatingFuncType.SOFTMAX
    return {
        ATTENTION.HEAD_COUNT_KV: 1,
        ATTENTION.KEY_LENGTH: rank + rotary,
        ATTENTION.VALUE_LENGTH: rank,
        ATTENTION.KEY_LENGTH_MLA: values["qk_nope_head_dim"] + rotary,
        ATTENTION.VALUE_LENGTH_MLA: values["v_head_dim"],
        LLM.EXPERT_GATING_FUNC: int(gating),
    }


LATENT = Section(
    (
        *HEAD_KEYS,
        ATTENTION.HEAD_COUNT_KV,
        ATTENTION.KEY_LENGTH_MLA,
        ATTENTION.VALUE_LENGTH_MLA,
        LLM.EXPERT_GATING_FUNC,
    ),
    _read_latent,
    _write_latent,
)


def _write_query_rank(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["q_lora_rank"] is None and values["num_hidden_layers"] not in LITE_LAYERS:
        raise UserError(
            f"llama.cpp takes DeepSeek without a query rank for V2-Lite, of {LITE_LAYERS} layers, "
            f"the model has {values['num_hidden_layers']}: it can't be written as GGUF"
        )
    return {}


QUERY_RANK = Section((), lambda _: {}, _write_query_rank)
"""What llama.cpp's deepseek2 asks of queries."""


def _read_layer_norm(given: Given) -> dict[str, Any]:
    eps = given.get(ATTENTION.LAYERNORM_EPS)
    return {} if "layer_norm_epsilon" in given.values else {"layer_norm_epsilon": eps}


LAYER_NORM_EPS = Section(
    (ATTENTION.LAYERNORM_EPS,),
    _read_layer_norm,
    lambda values: {ATTENTION.LAYERNORM_EPS: values["layer_norm_epsilon"]},
)
"""Nemotron-H's files have the norms' epsilon twice."""


def _write_tied(values: Mapping[str, Any]) -> dict[str, Any]:
    if not values["tie_word_embeddings"]:
        raise UserError(
            "llama.cpp's models of this architecture have one table for embedding and output "
            "(tie_word_embeddings), this one has two: it can't be written as GGUF"
        )
    return {}


def _write_untied(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["tie_word_embeddings"]:
        raise UserError(
            "llama.cpp's models of this architecture have an output layer of their own, this one "
            "takes its embedding (tie_word_embeddings): it can't be written as GGUF"
        )
    return {}


TIED = Section((), lambda _: {}, _write_tied)
UNTIED = Section((), lambda _: {}, _write_untied)
