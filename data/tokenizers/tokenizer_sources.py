"""The public tokenizer that data.tokenizer names."""

import os
from pathlib import Path

from tokenizers import Tokenizer

from configs.checks import UserError
from data.smollm2 import NAME, packaged_gguf
from data.tokenizers.gguf_tokenizer import tokenizer_from_gguf
from data.tokenizers.public_tokenizer import PublicTokenizer, read_public_tokenizer
from formats.gguf.split_files import read_model_header


def load_public_tokenizer(source: str) -> Tokenizer:
    """The tokenizer alone of `open_public_tokenizer`."""
    return open_public_tokenizer(source).tokenizer


def open_public_tokenizer(source: str) -> PublicTokenizer:
    """The tokenizer of a GGUF file, of a folder with a tokenizer.json or that file, or "smollm2",
    with its special tokens and chat template.

    Raises:
      UserError: none of these, or a file that can't be read.
    """
    path = packaged_gguf() if source == NAME else Path(os.path.expanduser(source))
    if path.suffix == ".gguf":
        return tokenizer_from_gguf(read_model_header(path).metadata, str(path))
    folder = path.parent if path.name == "tokenizer.json" else path
    if not folder.is_dir():
        raise UserError(
            f"data.tokenizer={source!r} is no tokenizer: give a folder with a tokenizer.json, a "
            f"GGUF file, or {NAME!r}"
        )
    return read_public_tokenizer(folder)
