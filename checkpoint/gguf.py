"""Checkpoints in llama.cpp's form: one GGUF file with model and tokenizer, read and written."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, Keys

from checkpoint import assemble
from checkpoint.config_reader import Settings
from checkpoint.families.base import Family, no_gguf
from checkpoint.gguf_config import (
    config_from_gguf,
    config_to_gguf,
    form_of_file,
    form_to_write,
)
from checkpoint.gguf_fused import SplitTensors
from checkpoint.gguf_latent import JoinedTensors, split
from checkpoint.gguf_rope import FACTORS, ROPE_FREQS
from checkpoint.public import PublicCheckpoint, find_family, lost_settings, read_model, write_model
from checkpoint.rounded import RoundedPart, rounded_at
from checkpoint.weight_map import Entry, by_tensor, expand, flatten, whole_tensor
from configs.architecture import ModelConfig
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from data.tokenizers.gguf_tokenizer import tokenizer_from_gguf
from data.tokenizers.gguf_tokenizer_write import tokenizer_to_gguf
from data.tokenizers.public_tokenizer import PublicTokenizer
from formats.gguf.blocks import BLOCK, BlockKind, encode_blocks
from formats.gguf.reader import GGUFFile
from formats.gguf.writer import Encoded, Quantization, Tensor, write_gguf

IGNORED = (r"rope_freqs\.weight", r"blk\.\d+\.rope_freqs\.weight")
"""What the settings were read from."""
FOUR_BITS = frozenset(
    (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K)
)
"""Kinds of blocks whose weights are sixteen even steps apart."""
NO_TOKENIZER = "no_vocab"
"""llama.cpp's name for the kind of tokenizer of a file that has none."""


def open_checkpoint(path: Path) -> PublicCheckpoint:
    """Reads metadata and the tensors' places; no tensor but the rotary factors.

    Raises:
      UserError: no GGUF file, an architecture that is not built, or damage.
    """
    return _checkpoint(GGUFFile(path))


def open_file(path: Path) -> tuple[PublicCheckpoint, Callable[[], PublicTokenizer]]:
    """As `open_checkpoint`, and what makes the file's `tokenizer`, of one look at its header.

    Raises:
      UserError: as open_checkpoint.
    """
    file = GGUFFile(path)
    return _checkpoint(file), lambda: tokenizer_from_gguf(file.metadata, str(path))


def _checkpoint(file: GGUFFile) -> PublicCheckpoint:
    split, path = SplitTensors(file), file.path
    values = config_from_gguf(file.metadata, split.shapes, split.read, str(path))
    settings = Settings(values, str(path))
    family, form = form_of_file(file.metadata, str(path))
    tensors = JoinedTensors(split)
    config = read_model(family, settings, tensors)
    rows = form.rows
    family = dataclasses.replace(family, copies=(), ignored=IGNORED, unused=form.unused)
    return PublicCheckpoint(
        path, family, settings, config, rows, tensors, is_in_four_bits=_is_in_four_bits(file)
    )


def _is_in_four_bits(file: GGUFFile) -> bool:
    """Whether each matrix of the layers has four bits that is not, as routers are, float32."""
    kinds = {
        file.kind(name)
        for name, shape in file.shapes.items()
        if name.startswith("blk.") and len(shape) > 1
    }
    rounded = kinds - {GGMLQuantizationType.F32}
    return bool(rounded) and rounded <= FOUR_BITS


def tokenizer(path: Path) -> PublicTokenizer:
    """
    Raises:
      UserError: a kind of tokenizer that is not built.
    """
    return tokenizer_from_gguf(GGUFFile(path).metadata, str(path))


def has_tokenizer(path: Path) -> bool:
    """Whether the file has a vocabulary, of whatever kind."""
    return GGUFFile(path).metadata.get(Keys.Tokenizer.MODEL, NO_TOKENIZER) != NO_TOKENIZER


def export(
    path: Path,
    family: Family,
    config: ModelConfig,
    variables: Any,
    tokenizer: PublicTokenizer | None,
    quantization: Quantization,
    progress: assemble.Progress = lambda _: None,
) -> None:
    """Writes one file that llama.cpp loads, or goes on with it (see `write_gguf`). Modules that
    only training uses are left out.

    Args:
      variables: arrays of one device, or `assemble.LazyParameter`.
      progress: is told elements.
    Raises:
      UserError: llama.cpp can't say what the model does, or a value does not fit.
    """
    if family.gguf is None:
        raise UserError(no_gguf(family.model_type))
    config = dataclasses.replace(config, multi_token=None)
    leaves = {
        name: leaf
        for name, leaf in flatten(variables).items()
        if not name.split(".")[1].startswith("multi_token_")
    }
    values = write_model(family, config)
    metadata = config_to_gguf(family, values)
    if tokenizer is None:
        metadata[Keys.Tokenizer.MODEL] = NO_TOKENIZER
    else:
        metadata |= tokenizer_to_gguf(tokenizer, config.vocab_size)
    form = form_to_write(family, values)
    entries = expand(form.rows, config, leaves)
    tensors = [_tensor(sharing, leaves) for sharing in by_tensor(entries).values()]
    factors = FACTORS.get(form.architecture)
    frequencies_C = None if factors is None else factors.write(values)
    if frequencies_C is not None:
        tensors.insert(0, (ROPE_FREQS, frequencies_C.shape, lambda: frequencies_C))
    _check_said(config, metadata, tensors, path)
    encoded = _encoded(entries, leaves)
    layers = (*config.prefix, *config.pattern)
    attention = next((x.attention for x in layers if x.attention.kind == "latent"), None)
    if isinstance(attention, LatentAttentionConfig):
        _check_split(encoded)
        tensors = list(split(tensors, attention.nope_head_dim, attention.value_head_dim))
    write_gguf(path, metadata, tensors, quantization, progress, encoded)


def _check_split(encoded: dict[str, Encoded]) -> None:
    """
    Raises:
      UserError: a tensor that llama.cpp holds as two was rounded as one.
    """
    joined = [name for name in encoded if name.endswith("attn_kv_b.weight")]
    if joined:
        raise UserError(
            f"llama.cpp holds {joined[0]} as two tensors, which this one can't be cut into once it "
            "is rounded: write a folder instead"
        )


def _check_said(
    config: ModelConfig,
    metadata: dict[str, Any],
    tensors: list[Tensor],
    path: Path,
) -> None:
    """Reads the metadata back, as whichever family of the architecture: it must say all that the
    model does.
    """
    shapes = {name: shape for name, shape, _ in tensors}
    reads = {name: read for name, _, read in tensors}
    values = config_from_gguf(metadata, shapes, lambda name: reads[name](), str(path))
    settings = Settings(values, str(path))
    lost = lost_settings(config, find_family(settings).read_config(settings))
    if lost:
        raise UserError(
            f"llama.cpp's {metadata['general.architecture']} can't say all that this model does: "
            f"{'; '.join(lost[:3])}"
        )


def _tensor(sharing: Sequence[Entry], leaves: dict[str, Any]) -> Tensor:
    whole = whole_tensor(sharing)
    return whole.name, whole.shape, functools.partial(_read, sharing, leaves)


def _encoded(entries: list[Entry], leaves: dict[str, Any]) -> dict[str, Encoded]:
    """The tensors whose parameters come in codes.

    Raises:
      UserError: a format that llama.cpp has no blocks of, or a tensor of several parameters.
    """
    encoded: dict[str, Encoded] = {}
    for entry in entries:
        found = rounded_at(leaves[entry.leaf], entry.place)
        if found is None:
            continue
        kind = block_kind(found)
        if entry.public_rows is not None:
            raise UserError(
                f"llama.cpp holds {entry.leaf} and another parameter as one tensor, {entry.name}, "
                "which is not put together of rounded ones: write a model folder instead"
            )
        encoded[entry.name] = kind, functools.partial(_blocks, kind, entry, leaves)
    return encoded


def block_kind(rounded: RoundedPart) -> BlockKind:
    """
    Raises:
      UserError: llama.cpp has no such blocks.
    """
    kinds: dict[tuple[str, bool], BlockKind] = {
        ("int8", False): "Q8_0",
        ("int4", False): "Q4_0",
        ("int4", True): "Q4_1",
    }
    kind = kinds.get((rounded.format, rounded.offsets is not None))
    if kind is None or rounded.block != BLOCK:
        raise UserError(
            f"GGUF holds int8 and int4 in blocks of {BLOCK}, not {rounded.format} in blocks of "
            f"{rounded.block}: write a folder instead"
        )
    return kind


def _blocks(kind: BlockKind, entry: Entry, leaves: dict[str, Any]) -> np.ndarray:
    found = rounded_at(leaves[entry.leaf], entry.place)
    assert found is not None
    arrays = (found.codes, found.scales, found.offsets)
    codes, scales, offsets = (
        None if x is None else entry.to_public(x).reshape(-1, entry.shape[-1]) for x in arrays
    )
    assert codes is not None
    assert scales is not None
    steps = None if offsets is None else offsets[:, ::BLOCK]
    return encode_blocks(kind, codes, scales[:, ::BLOCK], steps)


def _read(sharing: Sequence[Entry], leaves: dict[str, Any]) -> np.ndarray:
    return assemble.public_tensor(sharing, leaves).astype(np.float32, copy=False)
