"""Tokenizers of corpora: a byte-level BPE trained here, through which any text goes unchanged, or a
public model's.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.checks import UserError

END_OF_TEXT = "<|endoftext|>"
"""Begins every document and so ends the one before it."""
END_OF_TEXT_ID = 0
"""Of a tokenizer trained here; `end_of_text_id` says it of any."""
PUBLIC_ENDS = (END_OF_TEXT, "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>")
"""What public models have between their documents: GPT-2's, SmolLM2's and Qwen's name, then those
of Llama 3, DeepSeek, Gemma, Llama 2 and Mixtral. The first that a tokenizer has is meant."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, specials: tuple[str, ...] = ()
) -> Tokenizer:
    """Learns a BPE (Sennrich et al. 2016) over bytes with at most vocab_size entries.

    Args:
      specials: further tokens that no text spells.

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
        special_tokens=[END_OF_TEXT, *specials],
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
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: prepare the corpus again") from error
    return parse_tokenizer(data, str(path), "prepare the corpus again")


def parse_tokenizer(data: bytes | str, where: str, advice: str) -> Tokenizer:
    """A tokenizer.json's content. Text that spells a special token is read as text.

    Raises:
      UserError: it is no tokenizer; the sentence begins with `where` and ends with `advice`.
    """
    with malformed(f"{where} is no tokenizer", advice):
        text = data if isinstance(data, str) else data.decode()
        tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextlib.contextmanager
def malformed(what: str, advice: str) -> Iterator[None]:
    """Makes a sentence of what the tokenizers library raises for values that don't fit: a bare
    Exception, and where it panics (PyO3) what is not even that.

    Raises:
      UserError: "WHAT (the library's reason): ADVICE".
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({error}): {advice}") from error


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token that begins every document and so ends the one before it.

    Raises:
      UserError: the tokenizer has none of the names in PUBLIC_ENDS.
    """
    ids = [tokenizer.token_to_id(name) for name in PUBLIC_ENDS]
    found = [i for i in ids if i is not None]
    if not found:
        raise UserError(
            "the tokenizer has no token that stands between documents, expected one of "
            f"{', '.join(PUBLIC_ENDS)}: add it to its tokenizer.json, or leave data.tokenizer out"
        )
    return found[0]


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A public tokenizer without what it does for requests: it adds no special tokens, cuts and
    fills up nothing, and its offsets hold every character.
    """
    tree = json.loads(tokenizer.to_str())
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(tree))


def num_ids(tokenizer: Tokenizer) -> int:
    """The highest id and one: more than its entries where there are gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """
    Raises:
      UserError: an id that a model with this vocab_size has no embedding for.
    """
    needed = num_ids(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"data.tokenizer={name!r} has {needed} tokens, model.vocab_size={vocab_size} is below "
            "that: raise it, or use the tokenizer of the model"
        )


def vocabulary_difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """Says where two tokenizers give an id to different tokens; None where they never do.

    An id that only one of them has is no difference: models have embeddings to spare.
    """
    by_id = {i: token for token, i in theirs.get_vocab().items()}
    pairs = [(i, token, by_id[i]) for token, i in ours.get_vocab().items() if i in by_id]
    differing = sorted(pair for pair in pairs if pair[1] != pair[2])
    if not differing:
        return None
    first, token, other = differing[0]
    return (
        f"{len(differing):,} of {len(pairs):,} ids stand for other tokens, "
        f"{first} for {token!r} and {other!r}"
    )


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; equal ones of two tokenizer files mean equal token ids."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
