"""Tokenizers of public models: their text, special tokens and chat template in one object."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.checks import UserError
from configs.small_files import read_small_file
from data.tokenizer import malformed


@dataclass(frozen=True)
class PublicTokenizer:
    """A tokenizer and what its model expects around a text."""

    tokenizer: Tokenizer
    """Text that spells a special token is read as text."""
    bos_id: int | None
    """Begins a text where `add_bos` says so."""
    eos_ids: frozenset[int]
    """Each ends an answer."""
    add_bos: bool
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, *, specials: bool = False, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
          specials: whether "<|im_end|>" in it is the special token: only for what a chat template
            made, never for what a user sent.
          bos: whether it begins with bos_id; None where `add_bos` says so. A chat template writes
            its own: False there.
        """
        tokenizer = self._reads_specials if specials else self.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        wants_bos = self.add_bos if bos is None else bos
        return [self.bos_id, *ids] if wants_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Their text; special tokens are left out unless asked for."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not specials)

    def text_of(self, token_id: int | None) -> str:
        """How a special token is spelt, for chat templates; empty for none."""
        return "" if token_id is None else self.tokenizer.id_to_token(token_id) or ""

    @functools.cached_property
    def _reads_specials(self) -> Tokenizer:
        """A second one: flipping the switch of the first would disturb other threads."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer


def read_public_tokenizer(folder: Path) -> PublicTokenizer:
    """The tokenizer of a checkpoint in Hugging Face form: tokenizer.json, and beside it, where they
    are there, tokenizer_config.json, generation_config.json and chat_template.jinja.

    Raises:
      UserError: no tokenizer.json (a sentencepiece or tiktoken model alone is not read), or files
        that contradict what they are for.
    """
    tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
    config = _read_object(folder / "tokenizer_config.json")
    generation = _read_object(folder / "generation_config.json")
    bos_id = _special_id(tokenizer, config, "bos_token", folder)
    eos_id = _special_id(tokenizer, config, "eos_token", folder)
    ends = generation.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    _check_ids(ends, tokenizer, folder / "generation_config.json")
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool):
        with malformed(f"{folder / 'tokenizer.json'} is no tokenizer", "download it again"):
            add_bos = bos_id is not None and tokenizer.encode("a").ids[:1] == [bos_id]
    tokenizer.encode_special_tokens = True
    return PublicTokenizer(
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_ids=frozenset(ends) | ({eos_id} if eos_id is not None else frozenset()),
        add_bos=add_bos,
        chat_template=_chat_template(folder, config),
    )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    try:
        text = read_small_file(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: other forms of a tokenizer are not read, save it with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    with malformed(f"{path} is no tokenizer", "download it again"):
        return Tokenizer.from_str(text)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    try:
        values = json.loads(read_small_file(path))
    except FileNotFoundError:
        return {}
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is a JSON {type(values).__name__}, expected an object")
    return values


def _special_id(
    tokenizer: Tokenizer, config: dict[str, Any], name: str, folder: Path
) -> int | None:
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has {name}={value!r}, which is no token of "
            "tokenizer.json"
        )
    return token_id


def _check_ids(ids: Iterable[Any], tokenizer: Tokenizer, path: Path) -> None:
    for token_id in ids:
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_id or not 0 <= token_id < 2**31 or tokenizer.id_to_token(token_id) is None:
            raise UserError(f"{path} has eos_token_id={token_id!r}, which is no token")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own goes before the configuration's; of several, the one named default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_small_file(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has a chat_template that is neither text nor a "
            "list with one named default"
        )
    return template


def write_public_tokenizer(folder: Path, tokenizer: PublicTokenizer) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    ends = sorted(tokenizer.eos_ids)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "bos_token": tokenizer.text_of(tokenizer.bos_id) or None,
        "eos_token": tokenizer.text_of(ends[0]) if ends else None,
        "chat_template": tokenizer.chat_template,
    }
    said = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
