"""What each layer is, in a GGUF file's metadata and in a config.json: attention with a window or
without, delta nets, Mamba-2, short convolutions, experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import Keys

from checkpoint.gguf_rope import WHOLE, WINDOW
from checkpoint.gguf_sections import Given, Section, needs
from configs.checks import UserError

LLM, ATTENTION, ROPE, SSM = Keys.LLM, Keys.Attention, Keys.Rope, Keys.SSM
RECURRENT_LAYERS = "{arch}.attention.recurrent_layers"
"""Which the gguf package has no name of."""
LINEAR, FULL = "linear_attention", "full_attention"


def _by_period(count: int, period: int, *, kinds: tuple[str, str]) -> list[str]:
    """The last of each period is of the second kind."""
    return [kinds[(i + 1) % period == 0] for i in range(count)]


def windows(period: int | None, default_size: int | None = None) -> Section:
    """Layers with windows among those without.

    Args:
      period: the last of so many has none, where a file has no list; None: it has one.
      default_size: of the window, for architectures that always have some: without a key, too.
    """
    kinds = (WINDOW, WHOLE)

    def read(given: Given) -> dict[str, Any]:
        size = given.integer(ATTENTION.SLIDING_WINDOW, default_size or 0, least=0)
        count, pattern = given.num_layers, given.get(ATTENTION.SLIDING_WINDOW_PATTERN)
        if size == 0:
            found = [WHOLE] * count
        elif period is not None and (pattern is None or type(pattern) is int):
            every = given.integer(ATTENTION.SLIDING_WINDOW_PATTERN, period)
            found = _by_period(count, every, kinds=kinds)
        else:
            has_window = given.by_layer(ATTENTION.SLIDING_WINDOW_PATTERN)
            found = [WINDOW if each else WHOLE for each in has_window]
        return {"sliding_window": size or None, "layer_types": found}

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        found = values["layer_types"]
        if WINDOW not in found and default_size is None:
            return {}
        written: dict[str, Any] = {ATTENTION.SLIDING_WINDOW: values["sliding_window"]}
        if period is None or found != _by_period(len(found), period, kinds=kinds):
            has_window = [kind == WINDOW for kind in found]
            written[ATTENTION.SLIDING_WINDOW_PATTERN] = has_window
        return written

    return Section((ATTENTION.SLIDING_WINDOW, ATTENTION.SLIDING_WINDOW_PATTERN), read, write)


def query_scalar(layers_of_largest: int) -> Section:
    """query_pre_attn_scalar, which llama.cpp works out: d_model / heads in Gemma's largest model,
    by its number of layers, the width of a head in others.
    """

    def read(given: Given) -> dict[str, Any]:
        if given.num_layers != layers_of_largest:
            return {"query_pre_attn_scalar": given.values["head_dim"]}
        width, heads = given.integer(LLM.EMBEDDING_LENGTH), given.integer(ATTENTION.HEAD_COUNT)
        return {"query_pre_attn_scalar": width // heads}

    return Section((), read, lambda _: {})


def keys_by_layer(kinds: tuple[str, str], latent_heads: int | None = None) -> Section:
    """Heads of keys in layers with attention, 0 in others.

    Args:
      kinds: layer_types of those without and of those with.
      latent_heads: how many llama.cpp counts where attention is latent.
    """

    def read(given: Given) -> dict[str, Any]:
        found = given.by_layer(ATTENTION.HEAD_COUNT_KV)
        kinds_read = {"layer_types": [kinds[count > 0] for count in found]}
        if latent_heads is not None:
            return kinds_read
        return kinds_read | {"num_key_value_heads": given.the_one(ATTENTION.HEAD_COUNT_KV)}

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        heads = latent_heads or needs(values, "num_key_value_heads", "layers with attention")
        found = [heads if kind == kinds[1] else 0 for kind in values["layer_types"]]
        return {ATTENTION.HEAD_COUNT_KV: found}

    return Section((ATTENTION.HEAD_COUNT_KV,), read, write)


_STATE_KEYS = (
    SSM.CONV_KERNEL,
    SSM.INNER_SIZE,
    SSM.STATE_SIZE,
    SSM.TIME_STEP_RANK,
    SSM.GROUP_COUNT,
)


def _inner_width(given: Given) -> int:
    """Of one head of those whose outputs are INNER_SIZE wide together."""
    inner, heads = given.integer(SSM.INNER_SIZE), given.integer(SSM.TIME_STEP_RANK)
    if inner % heads:
        raise UserError(
            f"{given.where} has {given.name(SSM.INNER_SIZE)}={inner}, expected a multiple of "
            f"{given.name(SSM.TIME_STEP_RANK)}={heads}"
        )
    return inner // heads


def _read_delta(given: Given) -> dict[str, Any]:
    """Which layers have attention: by a list, or the last of every so many."""
    every = given.integer(LLM.FULL_ATTENTION_INTERVAL, 4)
    kinds = _by_period(given.num_layers, every, kinds=(LINEAR, FULL))
    if given.get(RECURRENT_LAYERS) is not None:
        kinds = [LINEAR if each else FULL for each in given.by_layer(RECURRENT_LAYERS)]
    return {
        "layer_types": kinds,
        "linear_conv_kernel_dim": given.integer(SSM.CONV_KERNEL),
        "linear_key_head_dim": given.integer(SSM.STATE_SIZE),
        "linear_num_key_heads": given.integer(SSM.GROUP_COUNT),
        "linear_num_value_heads": given.integer(SSM.TIME_STEP_RANK),
        "linear_value_head_dim": _inner_width(given),
    }


def _write_delta(values: Mapping[str, Any]) -> dict[str, Any]:
    width = needs(values, "linear_value_head_dim", "layers with delta nets")
    if width != values["linear_key_head_dim"]:
        raise UserError(
            "llama.cpp's delta nets have keys and values of one width, the model's are "
            f"{values['linear_key_head_dim']} and {width} wide: it can't be written as GGUF"
        )
    kinds = values["layer_types"]
    every = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    written = {
        SSM.CONV_KERNEL: values["linear_conv_kernel_dim"],
        SSM.STATE_SIZE: width,
        SSM.GROUP_COUNT: values["linear_num_key_heads"],
        SSM.TIME_STEP_RANK: values["linear_num_value_heads"],
        SSM.INNER_SIZE: width * values["linear_num_value_heads"],
        LLM.FULL_ATTENTION_INTERVAL: every,
    }
    if kinds != _by_period(len(kinds), every, kinds=(LINEAR, FULL)):
        written[RECURRENT_LAYERS] = [kind == LINEAR for kind in kinds]
    return written


DELTA_NETS = Section(
    (*_STATE_KEYS, LLM.FULL_ATTENTION_INTERVAL, RECURRENT_LAYERS), _read_delta, _write_delta
)
"""Qwen's."""


def _read_kimi_heads(given: Given) -> dict[str, Any]:
    return {"linear_num_heads": given.get(ATTENTION.HEAD_COUNT)}


KIMI_HEADS = Section((), _read_kimi_heads, lambda _: {})
"""Kimi's delta nets have as many heads as its attention."""


def mamba2(heads: str, width: str, state: str, groups: str, taps: str) -> Section:
    """
    Args:
      heads, width, state, groups, taps: config.json's names.
    """

    def read(given: Given) -> dict[str, Any]:
        return {
            heads: given.integer(SSM.TIME_STEP_RANK),
            width: _inner_width(given),
            state: given.integer(SSM.STATE_SIZE),
            groups: given.integer(SSM.GROUP_COUNT),
            taps: given.integer(SSM.CONV_KERNEL),
        }

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        count = needs(values, heads, "layers of Mamba-2")
        return {
            SSM.TIME_STEP_RANK: count,
            SSM.INNER_SIZE: count * values[width],
            SSM.STATE_SIZE: values[state],
            SSM.GROUP_COUNT: values[groups],
            SSM.CONV_KERNEL: values[taps],
        }

    return Section(_STATE_KEYS, read, write)


def _read_positions(given: Given) -> dict[str, Any]:
    has_rope = given.flag(ROPE.SCALING_FINETUNED, default=True)
    return {"position_embedding_type": "rope" if has_rope else "nope"}


def _write_positions(values: Mapping[str, Any]) -> dict[str, Any]:
    return {ROPE.SCALING_FINETUNED: values.get("position_embedding_type") == "rope"}


POSITIONS = Section((ROPE.SCALING_FINETUNED,), _read_positions, _write_positions)
"""Whether Granite 4's attention knows positions."""


def one_part_each(mamba: str, attention: str, feed_forward: str, width: str) -> Section:
    """Layers of one part each: Mamba-2, where there are neither heads of keys nor hidden units,
    attention, or a feed-forward (Nemotron-H).

    Args:
      mamba, attention, feed_forward: their kinds.
      width: config.json's name of the feed-forward's hidden units.
    """

    def read(given: Given) -> dict[str, Any]:
        heads = given.by_layer(ATTENTION.HEAD_COUNT_KV)
        units = given.by_layer(LLM.FEED_FORWARD_LENGTH)
        kinds = [
            feed_forward if wide else attention if count else mamba
            for count, wide in zip(heads, units, strict=True)
        ]
        found: dict[str, Any] = {"layers_block_type": kinds}
        if any(heads):
            found["num_key_value_heads"] = given.the_one(ATTENTION.HEAD_COUNT_KV)
        if any(units):
            found[width] = given.the_one(LLM.FEED_FORWARD_LENGTH)
        return found

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        kinds: Sequence[str] = values["layers_block_type"]
        others = set(kinds) - {mamba, attention, feed_forward}
        if others:
            raise UserError(
                "llama.cpp's Nemotron-H has dense layers or experts, the model has both: it can't "
                "be written as GGUF"
            )
        heads = needs(values, "num_key_value_heads", "layers with attention")
        units = values.get(width, 0)
        return {
            ATTENTION.HEAD_COUNT_KV: [heads if kind == attention else 0 for kind in kinds],
            LLM.FEED_FORWARD_LENGTH: [units if kind == feed_forward else 0 for kind in kinds],
        }

    return Section((ATTENTION.HEAD_COUNT_KV, LLM.FEED_FORWARD_LENGTH), read, write)


INDEXER_TYPES = "{arch}.attention.indexer.types"
LONG = 1_048_576
"""Tokens from which llama.cpp takes a GLM-5 without a list to share indexers, as GLM-5.2 does: the
first of every four layers from the third on has one, of those that GLM-5.2 has, and the first two.
"""
LAYERS_OF_GLM_5_2 = 78


def _read_indexers(given: Given) -> dict[str, Any]:
    places = range(given.num_layers)
    has_own: Sequence[int] = [1 for _ in places]
    if given.get(INDEXER_TYPES) is not None:
        has_own = given.by_layer(INDEXER_TYPES)
    elif given.integer(LLM.CONTEXT_LENGTH) >= LONG:
        has_own = [i < 2 or (i < LAYERS_OF_GLM_5_2 and (i - 2) % 4 == 0) for i in places]
    return {"indexer_types": ["full" if own else "shared" for own in has_own]}


def _write_indexers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {INDEXER_TYPES: [kind == "full" for kind in values["indexer_types"]]}


INDEXERS = Section((INDEXER_TYPES,), _read_indexers, _write_indexers)
"""Whether each layer of GLM-5 has an indexer of its own."""


def _read_llama4(given: Given) -> dict[str, Any]:
    """Experts in every so many layers, and chunks with RoPE in three of four; heads are normed in
    all models but the one of 128 experts.
    """
    every, count = given.integer(LLM.INTERLEAVE_MOE_LAYER_STEP), given.num_layers
    return {
        "moe_layers": list(range(every - 1, count, every)),
        "use_qk_norm": given.get(LLM.EXPERT_COUNT) != 128,
    }


def _write_llama4(values: Mapping[str, Any]) -> dict[str, Any]:
    return {LLM.INTERLEAVE_MOE_LAYER_STEP: values["moe_layers"][0] + 1}


LLAMA4 = Section((LLM.INTERLEAVE_MOE_LAYER_STEP,), _read_llama4, _write_llama4)
