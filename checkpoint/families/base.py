"""Records that describe a family of public checkpoints."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoint.config_reader import Settings
from checkpoint.gguf_pairs import GROUPED, Pairs
from checkpoint.gguf_sections import HEADS, Section
from checkpoint.weight_map import Row
from configs.architecture import ModelConfig

PackedDtype = Literal["float8", "mxfp4"]


@dataclass(frozen=True)
class Copy:
    """A tensor that repeats another one: read to see that it does, and written where asked."""

    name: str
    """May have * for the layer's number."""
    of: str
    is_written: bool = False


@dataclass(frozen=True)
class Packed:
    """Tensors that a family releases as small floats with scales (checkpoint/export_dtype.py)."""

    dtype: PackedDtype
    names: str
    """Regular expression of the tensors stored so."""
    plain_modules: tuple[str, ...] = ()
    """config.json's modules_to_not_convert, by which others know the rest."""

    def holds(self, name: str) -> bool:
        return re.fullmatch(self.names, name) is not None


@dataclass(frozen=True)
class GGUF:
    """The family, or some of its models, as llama.cpp knows them."""

    architecture: str
    """general.architecture, the prefix of its keys."""
    rows: tuple[Row, ...]
    pairs: Pairs = GROUPED
    """(llama.cpp's key, config.json's name) of settings that both have."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that llama.cpp has no key for, or whose key the file leaves out."""
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    """Further keys that follow from a config.json: written, and refused where a file has others."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Settings that no key tells, by the tensor that is there where they are true."""
    sections: tuple[Section, ...] = (HEADS,)
    """Settings that are no pair; one may go by what those before it have read."""
    unused: Callable[[ModelConfig], Sequence[str]] = lambda _: ()
    """As the family's, in llama.cpp's names."""
    is_meant: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether a file's metadata may be of this family, where several share an architecture."""
    suits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether the model of a config.json is written so, rather than as `other`."""
    other: "GGUF | None" = None
    """The form of the family's other models."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A public architecture; see checkpoint/weight_map.py for how rows read."""

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
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values for keys that a config.json leaves out: the defaults of transformers' config class.
    A GGUF's keys have llama.cpp's defaults instead (checkpoint/gguf_config.py)."""
    copies: tuple[Copy, ...] = ()
    multi_token: str | None = None
    """The tensor that each multi-token module has one of; None where the family has no modules."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that follow from the config."""
    unused: Callable[[ModelConfig], Sequence[str]] = lambda _: ()
    """Those of tensors that a model's files may hold and that nothing computes with."""
    unread: tuple[tuple[str, str], ...] = ()
    """Regular expressions of tensors of other parts than the text model, and what the parts are:
    they are left out, and the reader is told."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement) for parts of names that files may have instead of the
    released ones: read, never written."""
    fuses_experts: bool = False
    """Whether files may hold each layer's experts in two tensors, see weight_maps.FUSED_MOE: read,
    never written."""
    packed: Packed | None = None
    """None where released files are in plain floats."""
    gguf: GGUF | None = None
    """None where llama.cpp has no such family, or its table was not written here."""

    @property
    def gguf_forms(self) -> tuple[GGUF, ...]:
        """That and its other."""
        if self.gguf is None:
            return ()
        return (self.gguf,) if self.gguf.other is None else (self.gguf, self.gguf.other)


def no_gguf(model_type: str) -> str:
    """The sentence for a family without a table of GGUF's tensors."""
    return (
        f"GGUF files of the family {model_type} are neither read nor written here: take a folder "
        "in Hugging Face form (--to huggingface), which llama.cpp's own converter reads where it "
        "knows the family"
    )
