"""Layers with a sliding window among those without, as config.json lists them (layer_types)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import config_sections
from configs.architecture import ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError

WINDOW, WHOLE = "sliding_attention", "full_attention"


def read(
    settings: Settings, default: list[str], default_size: int | None = None
) -> list[int | None]:
    """The window of each layer, None for those without.

    Args:
      default: layer_types where the config has none.
      default_size: of the window where it says none.
    """
    kinds = settings.items("layer_types", of=str, default=default)
    if len(kinds) != len(default) or not set(kinds) <= {WINDOW, WHOLE}:
        raise UserError(
            f"{settings.where} has layer_types={kinds}, expected {WINDOW!r} or {WHOLE!r} for each "
            f"of num_hidden_layers={len(default)}"
        )
    size = settings.integer("sliding_window", default=default_size)
    if size is None and WINDOW in kinds:
        raise UserError(
            f"{settings.where} has {WINDOW!r} in layer_types and no sliding_window: it must say "
            "how many tokens the window holds"
        )
    return [size if kind == WINDOW else None for kind in kinds]


def split(config: ModelConfig) -> tuple[AttentionConfig, list[int | None]]:
    """The attention that all layers share but for the window and its sink tokens, without them, and
    each layer's window.

    Raises:
      UserError: they share none, or it is of another kind.
    """
    attentions = config_sections.grouped_queries(config)
    bare = [dataclasses.replace(x, window_size=None, num_sink_tokens=0) for x in attentions]
    return config_sections.the_one(bare, "attention"), [each.window_size for each in attentions]


def write(sizes: Sequence[int | None], unused: int | None = None) -> dict[str, Any]:
    """
    Args:
      unused: sliding_window of a model without windows.
    """
    found = [size for size in sizes if size is not None]
    return {
        "sliding_window": config_sections.the_one(found, "sliding window") if found else unused,
        "layer_types": [WHOLE if size is None else WINDOW for size in sizes],
    }
