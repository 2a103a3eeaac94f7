"""Special tokens of a checkpoint in Hugging Face form: which token begins a text, which end it.

Four files name them. tokenizer_config.json, and special_tokens_map.json for what it leaves out,
spell `bos_token` and `eos_token`; generation_config.json, or config.json where it says nothing,
lists in `eos_token_id` every id that ends an answer (transformers' GenerationConfig).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.checks import UserError
from formats.small_files import read_json_object

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG, MODEL_CONFIG = "generation_config.json", "config.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    """The eos_token, or the first that is listed where none is spelt."""
    eos_ids: frozenset[int]
    """Each ends an answer."""


def read_special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    """
    Raises:
      UserError: a name that is no token, an id that is none, or a file that is no JSON object.
    """
    eos_id = _spelt_id(folder, tokenizer, "eos_token")
    listed = _listed_ends(folder, tokenizer)
    ends = listed if eos_id is None else [eos_id, *listed]
    bos_id = _spelt_id(folder, tokenizer, "bos_token")
    return SpecialTokens(bos_id, ends[0] if ends else None, frozenset(ends))


def listed_token_ids(folder: Path) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` as the files of a model without a tokenizer have them."""
    named = (read_object(folder / name) for name in (MODEL_CONFIG, GENERATION_CONFIG))
    return {
        name: value
        for values in named
        for name in ("bos_token_id", "eos_token_id")
        if (value := values.get(name)) is not None
    }


def token_ids(bos_id: int | None, eos_id: int | None, eos_ids: frozenset[int]) -> dict[str, Any]:
    """The same two keys for a config.json: the eos_token first, one id without a list."""
    ends = sorted(eos_ids, key=lambda i: (i != eos_id, i))
    ids: dict[str, Any] = {} if bos_id is None else {"bos_token_id": bos_id}
    return ids | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing.

    Raises:
      UserError: something else.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}


def _spelt_id(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the token that the first file to spell it names; None where none does."""
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        value = read_object(folder / file).get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None or text == "":
            continue
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is None:
            raise UserError(
                f"{folder / file} has {name}={value!r}, which is no token of tokenizer.json"
            )
        return token_id
    return None


def _listed_ends(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """eos_token_id of the first file that has one. config.json may be of a model with more ids
    than its tokenizer has tokens: those are passed over.
    """
    for file in (GENERATION_CONFIG, MODEL_CONFIG):
        value = read_object(folder / file).get("eos_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        for token_id in ids:
            is_known = _is_id(token_id) and tokenizer.id_to_token(token_id) is not None
            if not is_known and (file == GENERATION_CONFIG or type(token_id) is not int):
                raise UserError(f"{folder / file} has eos_token_id={token_id!r}, which is no token")
        if ids:
            return [i for i in ids if _is_id(i) and tokenizer.id_to_token(i) is not None]
    return []


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
