"""Tokenizers written as transformers reads them.

transformers 5 adds what the post-processor of tokenizer.json adds, and nothing because of
`add_bos_token` in tokenizer_config.json: both are written. Truncation and padding are settings of
a batch and stay out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizers.public_tokenizer import PublicTokenizer, adds_bos
from data.tokenizers.special_tokens import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    listed_token_ids,
    read_object,
    token_ids,
)
from formats.small_files import read_json_object

TOKENIZER = "tokenizer.json"
OTHER_FORMS = (
    "tokenizer.model",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
"""Tokenizers that are copied and not read."""
COPIED = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "chat_template.jinja",
    *OTHER_FORMS,
)


def write_public_tokenizer(folder: Path, tokenizer: PublicTokenizer) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the ids that end an answer."""
    write_tokenizer_config(folder, tokenizer)
    state = json.loads(tokenizer.tokenizer.to_str())
    _write(folder / TOKENIZER, _exported(state, tokenizer), indent=None)


def write_tokenizer_config(folder: Path, tokenizer: PublicTokenizer) -> None:
    """Writes what stands beside tokenizer.json: special tokens, chat template, ends."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "bos_token": tokenizer.text_of(tokenizer.bos_id) or None,
        "eos_token": tokenizer.text_of(tokenizer.eos_id) or None,
        "chat_template": tokenizer.chat_template,
    }
    present = {name: value for name, value in config.items() if value is not None}
    _write(folder / TOKENIZER_CONFIG, present)
    write_generation_config(folder, _ids(tokenizer))


def copy_tokenizer(source: Path, folder: Path, tokenizer: PublicTokenizer | None) -> None:
    """Copies a folder's tokenizer files; tokenizer.json as it is unless something must change.

    Args:
      tokenizer: what they were read as; None where they are in a form that is not read.
    """
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if tokenizer is not None:
        state = read_json_object(source / TOKENIZER)
        exported = _exported(state, tokenizer)
        if exported == state:
            shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
        else:
            _write(folder / TOKENIZER, exported, indent=None)
    ids = exported_token_ids(source, tokenizer)
    write_generation_config(folder, generation_settings(source) | ids)


def exported_token_ids(source: Path | None, tokenizer: PublicTokenizer | None) -> dict[str, Any]:
    """config.json's `bos_token_id` and `eos_token_id`: the tokenizer's, and where it has none those
    that the source's files list.

    Args:
      source: a folder in Hugging Face form or of scripts.convert, None for other sources.
    """
    listed = {} if source is None else listed_token_ids(source)
    return listed if tokenizer is None else listed | _ids(tokenizer)


def generation_settings(source: Path | None) -> dict[str, Any]:
    """Sampling settings of a source's generation_config.json: all of it but token ids."""
    settings = {} if source is None else read_object(source / GENERATION_CONFIG)
    return {
        name: value
        for name, value in settings.items()
        if name not in ("bos_token_id", "eos_token_id", "_from_model_config")
    }


def write_generation_config(folder: Path, values: dict[str, Any]) -> None:
    """Writes generation_config.json, where there is something to say."""
    if values:
        _write(folder / GENERATION_CONFIG, values)


def with_bos(state: dict[str, Any], bos: str, bos_id: int) -> dict[str, Any]:
    """A tokenizer.json whose post-processor begins each text with the token."""
    begin = [{"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1)]
    token = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    processor = state.get("post_processor")
    if processor is not None and processor["type"] == "TemplateProcessing":
        pair = list(processor["pair"])
        second = next(i for i, item in enumerate(pair) if item.get("Sequence", {}).get("id") == "B")
        template = {
            "type": "TemplateProcessing",
            "single": [begin[0], *processor["single"]],
            "pair": [begin[0], *pair[:second], begin[1], *pair[second:]],
            "special_tokens": processor["special_tokens"] | token,
        }
        return state | {"post_processor": template}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    template = {
        "type": "TemplateProcessing",
        "single": [begin[0], texts[0]],
        "pair": [begin[0], texts[0], begin[1], texts[1]],
        "special_tokens": token,
    }
    if processor is None:
        return state | {"post_processor": template}
    parts = processor["processors"] if processor["type"] == "Sequence" else [processor]
    return state | {"post_processor": {"type": "Sequence", "processors": [*parts, template]}}


def _exported(state: dict[str, Any], tokenizer: PublicTokenizer) -> dict[str, Any]:
    """The tokenizer.json without truncation and padding, with the bos that the tokenizer adds."""
    state = state | {name: None for name in ("truncation", "padding") if state.get(name)}
    if not tokenizer.add_bos or tokenizer.bos_id is None:
        return state
    if adds_bos(tokenizer.tokenizer, tokenizer.bos_id):
        return state
    return with_bos(state, tokenizer.text_of(tokenizer.bos_id), tokenizer.bos_id)


def _ids(tokenizer: PublicTokenizer) -> dict[str, Any]:
    return token_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids)


def _write(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n")
