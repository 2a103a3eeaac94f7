"""Tokenizers of public models: their text, special tokens and chat template in one object."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from configs.checks import UserError
from data.tokenizers.special_tokens import TOKENIZER_CONFIG, read_object, read_special_tokens
from data.tokenizers.tokenizer import malformed
from formats.small_files import read_small_file


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
    eos_id: int | None = None
    """The eos_token among them: a chat template writes it, an export names it first."""

    def __post_init__(self) -> None:
        """The only one of eos_ids is the eos_token."""
        if self.eos_id is None and len(self.eos_ids) == 1:
            object.__setattr__(self, "eos_id", *self.eos_ids)

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

    def encode_rendered(self, texts: list[str]) -> list[Encoding]:
        """What a chat template made, special tokens read as such, with each token's characters."""
        return self._reads_specials.encode_batch(texts, add_special_tokens=False)

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
    are there, tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json
    and chat_template.jinja.

    Raises:
      UserError: no tokenizer.json (a sentencepiece or tiktoken model alone is not read), or files
        that contradict what they are for.
    """
    tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
    config = read_object(folder / TOKENIZER_CONFIG)
    special = read_special_tokens(folder, tokenizer)
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool):
        with malformed(f"{folder / 'tokenizer.json'} is no tokenizer", "download it again"):
            add_bos = special.bos_id is not None and adds_bos(tokenizer, special.bos_id)
    tokenizer.encode_special_tokens = True
    return PublicTokenizer(
        tokenizer=tokenizer,
        bos_id=special.bos_id,
        eos_ids=special.eos_ids,
        eos_id=special.eos_id,
        add_bos=add_bos,
        chat_template=_chat_template(folder, config),
    )


def adds_bos(tokenizer: Tokenizer, bos_id: int) -> bool:
    """Whether the tokenizer's own post-processor begins a text with the token."""
    return tokenizer.encode("a").ids[:1] == [bos_id]


def _read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer without the truncation and padding that it was saved with: settings of
    somebody's batches, which would cut a prompt.
    """
    try:
        text = read_small_file(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: other forms of a tokenizer are not read, save it with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    with malformed(f"{path} is no tokenizer", "download it again"):
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
