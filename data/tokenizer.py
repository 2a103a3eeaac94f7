"""A byte-level BPE tokenizer: any text goes in and comes out unchanged."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.checks import UserError

END_OF_TEXT = "<|endoftext|>"
"""Begins every document and so ends the one before it."""
END_OF_TEXT_ID = 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a BPE (Sennrich et al. 2016) over bytes with at most vocab_size entries.

    Raises:
      UserError: a vocabulary that cannot hold the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size} must be at least 257: all bytes and the end of text"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json. Text that spells a special token is read as text.

    Raises:
      UserError: the file is missing or is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: prepare the corpus again") from error
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{path} is no tokenizer ({error}): prepare the corpus again") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def fingerprint(path: Path) -> str:
    """SHA-256 of the tokenizer file: equal fingerprints mean equal token ids."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
