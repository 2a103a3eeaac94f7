"""What a family's file says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoint.settings import Settings
from checkpoint.tables import Row
from configs.architecture import ModelConfig


@dataclass(frozen=True)
class Copy:
    """A tensor that repeats another one: read to see that it does, and written where asked."""

    name: str
    """May have * for the layer's number."""
    of: str
    is_written: bool = False


@dataclass(frozen=True)
class GGUF:
    """The family as llama.cpp knows it."""

    architecture: str
    """general.architecture, the prefix of its keys."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A public architecture; see checkpoint/tables.py for how rows read."""

    model_type: str
    """config.json's model_type."""
    architecture: str
    """config.json's architectures[0], a class of transformers."""
    read_config: Callable[[Settings], ModelConfig]
    """The model of a config.json."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """The config.json of a model, without model_type, architectures and what is the same for all;
    UserError where the family can't say what the model does."""
    rows: tuple[Row, ...]
    copies: tuple[Copy, ...] = ()
    multi_token: str | None = None
    """The tensor that each multi-token module has one of; None where the family has no modules."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that follow from the config."""
    gguf: GGUF | None = None
