"""A model's settings in a GGUF file's metadata and in a config.json, in both directions.

Each family has a table of pairs (llama.cpp's key, config.json's name, see gguf_pairs.py); what is
no pair stands in sections (gguf_sections.py, gguf_rope.py, gguf_layers.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf.constants import Keys

from checkpoint.config_reader import Settings
from checkpoint.families import FAMILIES
from checkpoint.families.base import GGUF, Family, no_gguf
from checkpoint.gguf_rope import (
    FACTORS,
    ROPE_FREQS,
    SCALING_KEYS,
    read_scaling,
    written_scaling,
)
from checkpoint.gguf_sections import Given, plain
from configs.checks import UserError

LLM, ROPE = Keys.LLM, Keys.Rope
Shapes = Mapping[str, tuple[int, ...]]

_IDLE = (
    LLM.VOCAB_SIZE,  # the embedding says it
    LLM.TENSOR_DATA_LAYOUT,
    ROPE.SCALING_FINETUNED,  # but for Granite's, see gguf_layers.py
    ROPE.SCALING_YARN_ATTN_FACTOR,  # llama.cpp works it out
    LLM.NEXTN_PREDICT_LAYERS,  # checked apart
)
"""Keys that change nothing that is computed."""


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
    family, form = form_of_file(metadata, where)
    given = Given(metadata, form.architecture, where, {})
    values = {name: given.get(key) for key, name in form.pairs if given.get(key) is not None}
    values = {"model_type": family.model_type, "rope_theta": 10_000.0, **form.fixed, **values}
    _check_known(metadata, form, form.derived(values), where)
    values["tie_word_embeddings"] = "output.weight" not in shapes
    if "token_embd.weight" in shapes:
        values["vocab_size"] = shapes["token_embd.weight"][0]
    values |= {name: tensor in shapes for name, tensor in form.optional.items()}
    asked = Settings({key: plain(value) for key, value in metadata.items()}, where)
    values["rope_scaling"] = read_scaling(asked, form.architecture) or {"rope_type": "default"}
    for section in form.sections:
        values |= section.read(Given(metadata, form.architecture, where, values, shapes.keys()))
    if form.architecture in FACTORS:
        factors_C = read(ROPE_FREQS) if ROPE_FREQS in shapes else None
        values |= FACTORS[form.architecture].read(factors_C, values, where)
    return values


def config_to_gguf(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's metadata for a config.json as the family writes it.

    Raises:
      UserError: a family, or a setting, that llama.cpp doesn't know.
    """
    form = form_to_write(family, values)
    said = {key: values[name] for key, name in form.pairs if values.get(name) is not None}
    said[LLM.VOCAB_SIZE] = values["vocab_size"]
    said |= form.derived(values)
    said |= written_scaling(values.get("rope_scaling"), form.architecture)
    for section in form.sections:
        said |= section.write(values)
    metadata: dict[str, Any] = {Keys.General.ARCHITECTURE: form.architecture}
    return metadata | {key.format(arch=form.architecture): value for key, value in said.items()}


def form_to_write(family: Family, values: Mapping[str, Any]) -> GGUF:
    """That of a model with this config.json.

    Raises:
      UserError: llama.cpp has none for it.
    """
    form = next((form for form in family.gguf_forms if form.suits(values)), None)
    if form is None:
        raise UserError(no_gguf(family.model_type))
    return form


def form_of_file(metadata: Mapping[str, Any], where: str) -> tuple[Family, GGUF]:
    """The first of those that llama.cpp knows by this architecture, and the file may be of."""
    architecture = metadata.get(Keys.General.ARCHITECTURE)
    forms = [(family, form) for family in FAMILIES for form in family.gguf_forms]
    for family, form in forms:
        if form.architecture == architecture and form.is_meant(metadata):
            return family, form
    known = ", ".join(sorted({form.architecture for _, form in forms}))
    raise UserError(
        f"{where} has general.architecture={architecture!r}; those that can be read are {known}"
    )


def _check_known(
    metadata: Mapping[str, Any], form: GGUF, derived: Mapping[str, Any], where: str
) -> None:
    """A key that nothing here reads may change what is computed."""
    known = {*(key for key, _ in form.pairs), *SCALING_KEYS, *_IDLE, *derived}
    known |= {key for section in form.sections for key in section.keys}
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
